"""Pictures of detections: what must hold of every one of them, and what users get told."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import run
from tools import draw_detections, plot_logs
from util.errors import UserError
from util.visualizer import (
    INK,
    OKABE_ITO,
    _lay_out,
    _style_for,
    class_colors,
    contact_sheet,
    display_scale,
    draw_boxes,
    luminance,
    palette,
    perceived,
    place_tags,
    side_by_side,
)

SIZES = [(64, 48), (128, 128), (640, 427), (1600, 1000), (480, 40), (30, 900), (1, 1)]


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def random_boxes(count: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 1, (count, 2)) * size
    return np.concatenate([corners, corners + rng.uniform(0.02, 0.3, (count, 2)) * size], axis=1)


def enlarged(image: Image.Image) -> np.ndarray:
    scale = display_scale(image.size)
    size = image.width * scale, image.height * scale
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))


def colors_in(image: Image.Image) -> set[tuple[int, ...]]:
    return {color for _, color in image.getcolors(image.width * image.height)}


def extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    ys, xs = np.nonzero(mask)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


# ---- colours ----


def test_a_new_class_recolours_none():
    assert palette(100)[:40] == palette(40)
    assert len(set(palette(300))) == 300


@pytest.mark.parametrize(("count", "apart"), [(7, 0.07), (20, 0.04), (80, 0.02)])
def test_colours_differ_for_every_eye(count, apart):
    """A step of 0.02 in OKLab is what an eye just tells apart in neighbouring patches."""
    seen = perceived(palette(count))
    distance = np.linalg.norm(seen[:, :, None] - seen[:, None], axis=-1)
    distance[:, np.arange(count), np.arange(count)] = np.inf
    assert distance.min() > apart


def test_colours_show_on_black_and_the_casing_on_white():
    assert (luminance(palette(80)) + 0.05).min() / 0.05 > 3  # the ratio that WCAG asks of graphics
    assert 1.05 / (luminance(INK) + 0.05) > 10


def test_red_blind_sight_is_simulated():
    red, green = (160, 90, 0), (110, 110, 0)
    normal, red_blind, _ = np.linalg.norm(np.diff(perceived([red, green]), axis=1), axis=-1)
    assert red_blind < normal / 2


# ---- boxes ----


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [0, 1, 100])
def test_any_size_and_number_of_boxes(size, count):
    image = noise(size)
    before = image.tobytes()
    drawn = draw_boxes(image, random_boxes(count, size), [f"class {i % 9}" for i in range(count)], [0.5] * count)
    assert image.tobytes() == before
    assert drawn.mode == "RGB"
    assert drawn.size == (size[0] * display_scale(size), size[1] * display_scale(size))
    assert max(drawn.size) >= 480
    assert np.array_equal(np.asarray(drawn), enlarged(image)) == (count == 0)


@pytest.mark.parametrize("size", [(64, 64), (640, 427), (2000, 1333)])
def test_pixels_away_from_box_and_tag_stay(size):
    image = noise(size)
    width, height = size
    box = np.array([0.4 * width, 0.5 * height, 0.6 * width, 0.7 * height])
    drawn = np.asarray(draw_boxes(image, [box], ["cat"], [0.9]))
    original = enlarged(image)
    changed = (drawn != original).any(axis=-1)
    x0, y0, x1, y1 = extent(changed)
    left, top, right, bottom = box * display_scale(size)
    slack = 0.02 * max(original.shape)
    assert left - slack < x0 <= left and right <= x1 < right + slack
    assert bottom <= y1 < bottom + slack and top - 6 * slack < y0 < top  # the tag is on top
    inside = np.s_[int(top) + 2 : int(bottom) - 2, int(left) + 2 : int(right) - 2]
    assert not changed[inside].any()


@pytest.mark.parametrize("ground", [0, 128, 255])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK", "I;16", "F"])
def test_classes_have_their_colours_on_any_ground(mode, ground):
    image = Image.new("L", (640, 480), ground)
    grounds = {"I;16": ground * 257, "F": ground / 255}
    image = Image.new(mode, image.size, grounds[mode]) if mode in grounds else image.convert(mode)
    names = [f"thing {i}" for i in range(12)]
    boxes = [[20 + 150 * (i % 4), 40 + 140 * (i // 4), 120 + 150 * (i % 4), 120 + 140 * (i // 4)] for i in range(12)]
    colors = class_colors(names)
    assert set(colors.values()) | {INK} <= colors_in(draw_boxes(image, boxes, names, colors=colors))


def test_one_class_one_colour_in_every_picture():
    def color_of(names):
        image = Image.new("RGB", (640, 480))
        boxes = [[50 + 90 * i, 100, 110 + 90 * i, 200] for i in range(len(names))]
        return colors_in(draw_boxes(image, boxes, names)) & set(palette(128))

    alone = color_of(["zebra"])
    assert len(alone) == 1
    assert color_of(["zebra", "zebra"]) == alone
    assert alone < color_of(["dog", "zebra", "cat"])
    assert len(color_of(["dog", "zebra", "cat", "bird", "tree"])) == 5


ODD_BOXES = {
    "beyond the border": [-50, -70, 900, 800],
    "over a corner": [600, 400, 900, 900],
    "a point": [100, 100, 100, 100],
    "a line": [100, 100, 300, 100],
    "swapped corners": [300, 250, 200, 150],
    "at the far corner": [639.9, 426.9, 640, 427],
    "infinite": [-np.inf, 10, np.inf, 50],
}


@pytest.mark.parametrize("box", ODD_BOXES.values(), ids=ODD_BOXES.keys())
def test_odd_boxes_are_drawn(box):
    colors = {"odd": OKABE_ITO[1]}
    assert OKABE_ITO[1] in colors_in(draw_boxes(Image.new("RGB", (640, 427)), [box], ["odd"], [0.5], colors=colors))


@pytest.mark.parametrize("box", [[700, 10, 800, 50], [-90, 0, -1, 9], [np.nan, 0, 10, 10], [0, 427, 9, 500]])
def test_what_is_not_in_the_picture_is_left_out(box):
    image = noise((640, 427))
    assert draw_boxes(image, [box], ["gone"]).tobytes() == image.tobytes()
    one = draw_boxes(image, [[50, 50, 90, 90]], ["here"], [0.25])
    both = draw_boxes(image, [box, [50, 50, 90, 90]], ["here", "here"], [0.75, 0.25])
    assert both.tobytes() == one.tobytes()


def test_swapped_corners_are_the_same_box():
    image = noise((640, 427))
    boxes = [[100, 80, 300, 200], [300, 200, 100, 80]]
    first, second = (draw_boxes(image, [box], ["cat"]).tobytes() for box in boxes)
    assert first == second


def test_a_small_object_stays_visible():
    image = noise((640, 427))
    boxes = np.array([[300, 200, 308, 207], [0, 0, 12, 12], [630, 420, 640, 427]])
    drawn = np.asarray(draw_boxes(image, boxes, ["a small object"] * 3, [0.5] * 3))
    same = (drawn == np.asarray(image)).all(axis=-1)
    for (x0, y0, x1, y1), least in zip(boxes, (1.0, 0.3, 0.05), strict=True):  # at the border the line lies inside
        assert same[y0:y1, x0:x1].mean() >= least


def test_a_box_as_large_as_the_picture_has_its_line():
    drawn = draw_boxes(Image.new("RGB", (640, 480)), [[0, 0, 640, 480]], ["all"], colors={"all": OKABE_ITO[1]})
    ours = (np.asarray(drawn) == OKABE_ITO[1]).all(axis=-1)
    for strip in (ours[:6], ours[-6:], ours[:, :6].T, ours[:, -6:].T):
        assert strip.any(axis=0).mean() > 0.8


def test_long_names_are_cut_but_not_their_scores():
    image, box = Image.new("RGB", (640, 427)), [[300, 200, 340, 240]]

    def draw(name, score):
        return draw_boxes(image, box, [name], [score], colors={name: OKABE_ITO[1]})

    name = "a very long name " * 20
    assert draw(name, 0.25).tobytes() == draw(name + "and more", 0.25).tobytes()
    assert draw(name, 0.25).tobytes() != draw(name, 0.75).tobytes()
    x0, _, x1, _ = extent(np.asarray(draw(name, 0.25)).any(axis=-1))
    assert 100 < x1 - x0 < 400
    draw("two\nlines", 0.5)


def test_names_of_other_alphabets_are_drawn():
    """Letters that a font lacks would all be the same box."""
    image, box = Image.new("RGB", (640, 427)), [[300, 200, 340, 240]]
    drawn = {draw_boxes(image, box, [name], colors={name: OKABE_ITO[1]}).tobytes() for name in ("é", "ü", "ж", "λ", "ł", "…")}
    assert len(drawn) == 6


def test_in_a_crowd_long_names_give_way():
    size, name = (2000, 100), "a rather long class name of a data set"
    boxes = random_boxes(60, size).clip(0, [*size, *size])
    words, rects = {}, {}
    for n in (1, 60):
        _, words[n], rects[n] = _lay_out(boxes[:n], [(name, " 0.50")] * n, size, _style_for(size))
    assert words[1] == [f"{name} 0.50"]
    assert max(map(len, words[60])) < 0.8 * len(words[1][0])
    assert all(word.endswith("… 0.50") for word in words[60])
    assert shared_area(rects[60]) < 0.2 * (rects[60][:, 2:] - rects[60][:, :2]).prod(axis=1).sum()


def test_crowd_regions_look_different():
    image = Image.new("RGB", (640, 427), (255, 255, 255))
    plain, crowd = (np.asarray(draw_boxes(image, [[100, 100, 300, 300]], ["cow"], crowd=[flag])) for flag in (0, 1))
    centre = np.s_[150:250, 150:250]
    assert (plain[centre] == 255).all()
    changed = (crowd[centre] != 255).any(axis=-1).mean()
    assert 0.05 < changed < 0.5  # hatched, with most of the picture left to see


@pytest.mark.parametrize("kwargs", [
    {"boxes": [[0, 0, 1]], "labels": ["a"]},
    {"boxes": [0, 0, 1, 1], "labels": ["a"]},
    {"boxes": [[0, 0, 1, 1]], "labels": []},
    {"boxes": [[0, 0, 1, 1]], "labels": ["a"], "scores": [0.1, 0.2]},
    {"boxes": [[0, 0, 1, 1]], "labels": ["a"], "crowd": []},
    {"boxes": [[0, 0, 1, 1]], "labels": ["a"], "colors": {"b": (1, 2, 3)}},
])  # fmt: skip
def test_wrong_arguments(kwargs):
    with pytest.raises(ValueError, match="labels|scores|crowd|colors|boxes"):
        draw_boxes(Image.new("RGB", (64, 64)), **kwargs)


# ---- tags ----


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    return float(np.clip(high - low, 0, None).prod())


def shared_area(rects: np.ndarray) -> float:
    return sum(overlap(rects[i], rects[j]) for i in range(len(rects)) for j in range(i))


@pytest.mark.parametrize("seed", range(5))
def test_tags_stay_in_the_picture_and_apart(seed):
    size = (640, 480)
    boxes = random_boxes(20, size, seed).clip(0, [*size, *size])
    tags = np.tile([70, 18], (20, 1))
    rects = place_tags(boxes, tags, size, 4)
    assert (rects[:, :2] >= 0).all() and (rects[:, 2:] <= size).all()
    assert np.array_equal(rects[:, 2:] - rects[:, :2], tags)
    above = np.clip(boxes[:, :2] - [4, 22], 0, np.array(size) - tags)  # where everyone would put them
    assert shared_area(rects) <= 0.2 * shared_area(np.concatenate([above, above + tags], axis=1))


def test_equal_boxes_have_separate_tags():
    rects = place_tags(np.tile([200.0, 200, 260, 260], (4, 1)), np.tile([80, 18], (4, 1)), (640, 480), 4)
    assert shared_area(rects) == 0


def test_a_tag_does_not_cover_its_small_object():
    for box in random_boxes(50, (620, 440), seed=3):
        box[2:] = box[:2] + 15
        assert overlap(place_tags(box[None], np.array([[90, 18]]), (640, 480), 4)[0], box) == 0


def test_a_tag_larger_than_the_picture_has_no_place():
    rects = place_tags(np.array([[0.0, 0, 5, 5], [0, 0, 5, 5]]), np.array([[50, 9], [10, 9]]), (20, 20), 2)
    assert np.isnan(rects[0]).all() and not np.isnan(rects[1]).any()


# ---- pages ----


def test_side_by_side_keeps_both_pictures():
    left, right = noise((300, 200), 1), noise((100, 260), 2)
    page = np.asarray(side_by_side(left, right, ("left", "a title far too long for its picture " * 9)))
    gap = 8
    top = page.shape[0] - 260 - gap
    assert np.array_equal(page[top : top + 200, gap : gap + 300], np.asarray(left))
    assert np.array_equal(page[top : top + 260, 300 + 2 * gap : 400 + 2 * gap], np.asarray(right))
    assert (page[:top, 300 : 300 + 2 * gap] == 255).all()  # no title runs into the other
    assert (page[:top, -gap:] == 255).all()


def test_contact_sheet():
    pictures = [Image.new("RGB", (60 + 20 * i, 40), color) for i, color in enumerate(OKABE_ITO)]
    sheet = np.asarray(contact_sheet([pictures[:3], pictures[3:5], [], pictures[5:]]))
    for picture, color in zip(pictures, OKABE_ITO, strict=True):
        assert (sheet == color).all(axis=-1).sum() == picture.width * picture.height
    assert max(contact_sheet([[Image.new("L", (9000, 300))]]).size) < 1500
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([[]])


# ---- tools/draw_detections.py ----


@pytest.fixture
def coco(tmp_path):
    """Six pictures; image 7 has a crowd, image 8 nothing; the flags of the tool."""
    (tmp_path / "images" / "val").mkdir(parents=True)
    images = [{"id": i, "file_name": f"val/{i}.png", "width": 80, "height": 60} for i in range(7, 13)]
    for info in images:
        noise((80, 60), info["id"]).save(tmp_path / "images" / info["file_name"])
    annotations = [{"id": i, "image_id": i, "category_id": 3, "bbox": [10, 10, 30, 20], "area": 600, "iscrowd": i == 7}
                   for i in range(7, 13) if i != 8]  # fmt: skip
    results = [{"image_id": i, "category_id": c, "bbox": [12.5, 9, 28, 22], "score": s}
               for i, c, s in ((7, 3, 0.9), (7, 3, 0.1), (9, 55, 0.6))]  # fmt: skip
    data = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "cow"}]}
    (tmp_path / "instances.json").write_text(json.dumps(data))
    (tmp_path / "results.json").write_text(json.dumps(results))
    flags = {"annotations": "instances.json", "images": "images", "predictions": "results.json", "output_dir": "out"}
    return {f"--{name}": str(tmp_path / value) for name, value in flags.items()}


def draw(flags: dict[str, str], *more: str) -> list[str]:
    draw_detections.main([word for pair in flags.items() for word in pair] + list(more))
    return sorted(path.name for path in Path(flags["--output_dir"]).iterdir())


def test_draws_a_picture_an_image_and_the_sheet(coco):
    assert draw(coco) == sorted([f"val_{i}.png" for i in range(7, 13)] + ["contact_sheet.png"])


def test_images_are_taken_evenly(coco):
    assert draw(coco, "--num_images", "2") == ["contact_sheet.png", "val_12.png", "val_7.png"]


def test_images_by_id_once_each(coco):
    assert draw(coco, "--image_ids", "9", "8", "9") == ["contact_sheet.png", "val_8.png", "val_9.png"]


def test_the_threshold_leaves_detections_out(coco):
    def picture(threshold):
        draw(coco, "--image_ids", "7", "--score_threshold", threshold)
        page = np.asarray(Image.open(Path(coco["--output_dir"]) / "val_7.png"))
        height = 60 * display_scale((80, 60))
        left, right = page[-height - 8 : -8, 8:488], page[-height - 8 : -8, 496:976]
        return left.tobytes(), right.tobytes()

    (truth, low), (same_truth, middle), (_, high) = map(picture, ("0.05", "0.5", "0.95"))
    assert truth == same_truth
    assert len({truth, low, middle, high}) == 4


def refusal(flags: dict[str, str], *more: str) -> str:
    with pytest.raises(UserError) as caught:
        draw(flags, *more)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("flag", ["--annotations", "--predictions"])
@pytest.mark.parametrize("content", [None, "{", b"\x89PNG\xff", "7", "[7]", '{"a": 1}', '[{"image_id": 7}]'])
def test_broken_files_are_named(coco, tmp_path, flag, content):
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(path) in refusal({**coco, flag: str(path)})


@pytest.mark.parametrize("change", [
    {"bbox": None}, {"bbox": [1, 2, 3]}, {"bbox": ["1", 2, 3, 4]}, {"score": "high"}, {"image_id": [7]},
    {"category_id": None},
])  # fmt: skip
def test_a_broken_detection_is_named(coco, change):
    path = Path(coco["--predictions"])
    results = json.loads(path.read_text())
    path.write_text(json.dumps([*results, {**results[0], **change}]))
    assert f"entry {len(results)}" in refusal(coco)


def test_an_annotation_without_a_box(coco):
    path = Path(coco["--annotations"])
    data = json.loads(path.read_text())
    del data["annotations"][0]["bbox"]
    path.write_text(json.dumps(data))
    assert "bbox" in refusal(coco)


def test_unknown_images(coco):
    assert "99" in refusal(coco, "--image_ids", "7", "99")
    path = Path(coco["--predictions"])
    path.write_text(path.read_text().replace('"image_id": 9', '"image_id": 1234'))
    assert "1234" in refusal(coco)


def test_unreadable_images(coco):
    path = Path(coco["--images"]) / "val" / "9.png"
    whole = path.read_bytes()
    for content in (b"", b"no picture", whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert str(path) in refusal(coco)
    noise((40, 30)).save(path)
    assert "40 x 30" in refusal(coco) and "80 x 60" in refusal(coco)
    path.unlink()
    assert "No such file" in refusal(coco)


def test_numbers_of_images(coco):
    assert "at least 1" in refusal(coco, "--num_images", "0")
    assert "not allowed with" in refusal(coco, "--num_images", "2", "--image_ids", "7")


# ---- as commands ----


@pytest.mark.parametrize("script", ["draw_detections.py", "plot_logs.py"])
def test_a_mistake_ends_the_command_with_one_line(coco, tmp_path, script):
    flags = [word for pair in coco.items() for word in pair] + ["--image_ids", "99"]
    done = run(sys.executable, f"tools/{script}", *(flags if script == "draw_detections.py" else [str(tmp_path / "run 99")]))
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "99" in done.stderr


@pytest.mark.parametrize("tool", [draw_detections, plot_logs])
def test_help_has_an_example(tool, capsys):
    with pytest.raises(SystemExit) as caught:
        tool.main(["--help"])
    told = capsys.readouterr().out
    assert caught.value.code == 0 and "example:" in told and "(default: " in told and "SUPPRESS" not in told

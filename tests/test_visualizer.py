"""Pictures of detections: what must hold of every one of them, and what users get told."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from tests.helpers import run
from tools import draw_detections, plot_logs
from util.draw.boxes import COLORS, contact_sheet, draw_boxes, side_by_side
from util.errors import UserError

SIZES = [(64, 48), (32, 32), (640, 427), (4000, 1500), (480, 40), (30, 900), (1, 1)]
PALETTE = [tuple(bytes.fromhex(color)) for color in COLORS.split()]
GREY = 90


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )


def grey(size: tuple[int, int] = (640, 427)) -> Image.Image:
    return Image.new("RGB", size, (GREY, GREY, GREY))


def random_boxes(count: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 1, (count, 2)) * size
    return np.concatenate([corners, corners + rng.uniform(0.02, 0.3, (count, 2)) * size], axis=1)


def enlarged(image: Image.Image) -> np.ndarray:
    """The longer side has at least 480 pixels."""
    scale = math.ceil(480 / max(image.size))
    size = image.width * scale, image.height * scale
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))


def colors_in(image: Image.Image) -> set[tuple[int, ...]]:
    return {color for _, color in image.getcolors(image.width * image.height)}


def extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    ys, xs = np.nonzero(mask)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


# ---- colours ----


def test_colours_differ_and_show_on_black_and_under_black_letters():
    assert len(set(PALETTE)) == len(PALETTE) >= 80, "COCO's classes"
    srgb = np.array(PALETTE) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    contrast = (linear @ [0.2126, 0.7152, 0.0722] + 0.05) / 0.05  # WCAG 2
    assert contrast.min() > 4


@pytest.mark.parametrize("place", [0, 7, 79, len(PALETTE) + 3])
def test_the_place_of_a_class_decides_its_colour_in_every_picture(place):
    classes = [f"thing {i}" for i in range(120)]
    alone = draw_boxes(grey(), [[300, 200, 340, 240]], [classes[place]], classes=classes)
    boxes, labels = [[20, 200, 90, 240], [300, 200, 340, 240]], [classes[1], classes[place]]
    among = draw_boxes(grey(), boxes, labels, classes=classes)
    expected = PALETTE[place % len(PALETTE)]
    for picture in (alone, among):
        assert picture.getpixel((320, 200 - 3)) == expected, "on the line above the object"


def test_without_the_list_of_classes_a_name_has_one_colour():
    def colors(*names):
        boxes = [[50 + 90 * i, 100, 110 + 90 * i, 200] for i in range(len(names))]
        return colors_in(draw_boxes(grey(), boxes, names)) & set(PALETTE)

    assert len(colors("zebra")) == 1
    assert colors("zebra", "zebra") == colors("zebra") == colors("zebra", "dog") - colors("dog")


# ---- boxes ----


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [0, 1, 100])
def test_any_size_and_number_of_boxes(size, count):
    image = noise(size)
    before = image.tobytes()
    drawn = draw_boxes(
        image, random_boxes(count, size), [f"class {i % 9}" for i in range(count)], [0.5] * count
    )
    assert image.tobytes() == before
    assert drawn.mode == "RGB"
    assert drawn.size == enlarged(image).shape[1::-1]
    assert np.array_equal(np.asarray(drawn), enlarged(image)) == (count == 0)


LINE = [[0, 0, 0], *[list(PALETTE[0])] * 3, [0, 0, 0]]  # across it, in a picture of 640 x 427


def test_the_line_lies_around_the_object_in_its_colour_between_black_edges():
    drawn = np.asarray(draw_boxes(grey(), [[100.4, 80, 300, 200]], ["cat"], classes=["cat"])).tolist()
    background = [GREY] * 3
    assert drawn[150][94:101] == [background, *LINE, background], "left of the object"
    assert drawn[150][299:306] == [background, *LINE, background], "right of it"
    column = [row[250] for row in drawn]
    assert column[74:81] == [background, *LINE, background]
    assert column[199:206] == [background, *LINE, background]
    assert drawn[85][105:295] == [background] * 190, "the inside stays"


@pytest.mark.parametrize("ground", [0, 128, 255])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK", "I;16", "F"])
def test_classes_have_their_colours_on_any_ground(mode, ground):
    image = Image.new("L", (640, 480), ground)
    grounds = {"I;16": ground * 257, "F": ground / 255}
    image = Image.new(mode, image.size, grounds[mode]) if mode in grounds else image.convert(mode)
    names = [f"thing {i}" for i in range(12)]
    boxes = [
        [20 + 150 * (i % 4), 40 + 140 * (i // 4), 120 + 150 * (i % 4), 120 + 140 * (i // 4)]
        for i in range(12)
    ]
    assert set(PALETTE[:12]) | {(0, 0, 0)} <= colors_in(draw_boxes(image, boxes, names, classes=names))


def test_masks_have_a_tint_and_a_line_and_the_best_one_is_seen():
    masks = np.zeros((3, 60, 80), dtype=bool)
    masks[0, 10:40, 10:40] = masks[1, 20:50, 20:50] = masks[2, 20:50, 60:] = True
    classes, scores, scale = ["cat", "dog", "cow"], [0.9, 0.5, 0.6], 6
    # the ground has the colour of the first class: its mask would not show without a line
    picture, boxes = Image.new("RGB", (80, 60), PALETTE[0]), [[76, 2, 78, 4]] * 3
    plain, drawn = (
        np.asarray(draw_boxes(picture, boxes, classes, scores, classes=classes, masks=some)).astype(int)
        for some in (None, iter(masks))
    )
    large = picture.resize((80 * scale, 60 * scale))
    larger = masks.repeat(scale, 1).repeat(scale, 2), np.array(boxes) * scale
    same = draw_boxes(large, larger[1], classes, scores, classes=classes, masks=larger[0])
    assert np.array_equal(drawn[130:], np.asarray(same)[130:]), "below the labels"

    near = ndimage.binary_dilation(larger[0].any(0), np.ones((3, 3)))
    assert not ((plain != drawn).any(-1) & ~near).any(), "elsewhere nothing changes"
    for (x, y), color in {(25, 35): 0, (35, 25): 0, (45, 45): 1, (70, 35): 2, (79.9, 35): 2}.items():
        mixed = 0.55 * np.array(PALETTE[0]) + 0.45 * np.array(PALETTE[color])
        seen = drawn[int(y * scale), int(x * scale)]
        assert seen == pytest.approx(mixed, abs=1.5), "one colour, also at the border of the picture"
    edge, orange, mixed = [0, 0, 0], list(PALETTE[1]), drawn[270, 270].tolist()
    assert drawn[270, 297:302].tolist() == [mixed, orange, orange, edge, list(PALETTE[0])]
    assert drawn[150, 58:61].tolist() == [list(PALETTE[0]), edge, list(PALETTE[0])]


ODD_BOXES = {
    "beyond the border": [-50, -70, 900, 800],
    "over a corner": [600, 400, 900, 900],
    "a point": [100, 100, 100, 100],
    "a line": [100, 100, 300, 100],
    "at the far corner": [639.9, 426.9, 640, 427],
    "infinite": [-np.inf, 10, np.inf, 50],
}


@pytest.mark.parametrize("box", ODD_BOXES.values(), ids=ODD_BOXES.keys())
def test_odd_boxes_are_drawn(box):
    assert PALETTE[0] in colors_in(draw_boxes(grey(), [box], ["odd"], [0.5], classes=["odd"]))


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
    drawn = np.asarray(draw_boxes(image, [[300, 200, 308, 207]], ["a small object"], [0.5]))
    assert np.array_equal(drawn[200:207, 300:308], np.asarray(image)[200:207, 300:308])


def test_a_box_as_large_as_the_picture_has_its_line():
    drawn = np.asarray(draw_boxes(grey(), [[0, 0, 640, 427]], ["all"], classes=["all"]))
    middle_row, middle_column = drawn[200].tolist(), drawn[:, 300].tolist()
    assert middle_row[:5] == middle_row[-5:] == middle_column[:5] == middle_column[-5:] == LINE


def test_crowd_regions_are_tinted_and_say_so():
    image = Image.new("RGB", (640, 427), (255, 255, 255))
    cow = {"boxes": [[100, 100, 300, 300]], "labels": ["cow"], "classes": ["cow"]}
    plain, crowd = draw_boxes(image, **cow), draw_boxes(image, **cow, crowd=[True])
    assert plain.getpixel((200, 200)) == (255, 255, 255)
    mixed = 0.35 * np.array(PALETTE[0]) + 0.65 * 255
    assert np.abs(mixed - crowd.getpixel((200, 200))).max() <= 1
    assert crowd.getpixel((310, 200)) == (255, 255, 255), "not beside it"
    assert label_width(crowd) > label_width(plain) + 30


@pytest.mark.parametrize(
    "kwargs",
    [
        {"boxes": [[0, 0, 1]], "labels": ["a"]},
        {"boxes": [[0, 0, 1, 1]], "labels": []},
        {"boxes": [], "labels": ["a"]},
        {"boxes": [[0, 0, 1, 1]], "labels": ["a"], "scores": [0.1, 0.2]},
        {"boxes": [[0, 0, 1, 1]], "labels": ["a"], "crowd": [True, False]},
    ],
)
def test_wrong_arguments(kwargs):
    with pytest.raises(ValueError, match="shape|Shape"):
        draw_boxes(Image.new("RGB", (64, 64)), **kwargs)


# ---- labels ----


def label(name: str, score: float | None = 0.5, **kwargs) -> np.ndarray:
    """The pixels of a label, (height, width, 3), drawn where there is room."""
    scores = None if score is None else [score]
    drawn = np.asarray(draw_boxes(grey(), [[300, 200, 304, 204]], [name], scores, **kwargs))
    first_line = 200 - 5  # the upper edge of the line around the object
    x0, y0, x1, _ = extent((drawn != GREY).any(axis=-1))
    return drawn[y0:first_line, x0:x1]


def label_width(picture: Image.Image) -> int:
    """Of the highest label of a picture."""
    ours = (np.asarray(picture) == PALETTE[0]).all(axis=-1)
    x0, _, x1, _ = extent(ours[: extent(ours)[1] + 3])
    return x1 - x0


def holds(picture: Image.Image, part: np.ndarray) -> bool:
    """Whether the pixels of `part` are somewhere in the picture."""
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(picture), part.shape)[:, :, 0]
    candidates = windows[(windows[:, :, 0, :8] == part[0, :8]).all(axis=(2, 3))]
    return any(np.array_equal(window, part) for window in candidates)


@pytest.mark.parametrize("corner", [(0, 0), (610, 0), (0, 400), (610, 400), (300, 0)])
def test_labels_stay_in_the_picture(corner):
    x, y = corner
    drawn = draw_boxes(grey(), [[x, y, x + 30, y + 27]], ["fire hydrant"], [0.5])
    # at the right border supervision cuts a column of the padding
    assert holds(drawn, label("fire hydrant")[:, :-1])
    assert not holds(drawn, label("fire hydrant", 0.75)[:, :-1])


def test_labels_of_equal_boxes_do_not_hide_one_another():
    names = ["cat", "dog", "cow", "hen"]
    drawn = draw_boxes(grey(), [[200, 200, 260, 260]] * 4, names, [0.9, 0.8, 0.7, 0.6])
    for name, score in zip(names, (0.9, 0.8, 0.7, 0.6), strict=True):
        assert holds(drawn, label(name, score))


def test_the_surest_detection_is_on_top():
    boxes, names = [[10, 10, 60, 60]] * 60, [f"class {i}" for i in range(60)]
    scores = np.random.default_rng(0).permutation(np.linspace(0.1, 0.9, 60))
    drawn = draw_boxes(grey(), boxes, names, scores, classes=names)
    assert drawn.getpixel((40, 60 + 2)) == PALETTE[scores.argmax()]


def test_many_labels_are_smaller():
    far = [[560, 380, 600, 420]] * 60
    widths = []
    for count in (9, 60):
        boxes = [[100, 100, 200, 200], *far[:count]]
        drawn = draw_boxes(grey(), boxes, ["cat"] * len(boxes), classes=["cat"])
        widths.append(label_width(drawn.crop((0, 0, 320, 320))))
    assert widths[1] < 0.8 * widths[0]


def test_long_names_are_shortened_but_not_their_scores():
    name, longer = "a very long name " * 20, "a very long name " * 25
    cut = label(name, 0.25, classes=[name])
    assert 150 < cut.shape[1] < 320
    assert np.array_equal(cut[:, :40], label(longer, 0.25, classes=[longer])[:, :40]), "the beginning"
    assert np.array_equal(cut[:14, -28:], label("cat", 0.25, classes=["cat"])[:14, -28:]), "the score"
    assert not np.array_equal(cut, label(name, 0.75, classes=[name]))


@pytest.mark.parametrize("name", ["", " ", "two\nlines", "\ud800", "nul\0", "\u202ertl", "עברית", "🚗"])
def test_any_letters_can_be_drawn(name):
    assert PALETTE[0] in colors_in(draw_boxes(grey(), [[300, 200, 340, 240]], [name], [0.5], classes=[name]))


def test_names_of_other_alphabets_are_legible():
    """Letters that a font lacks would all be the same box."""
    drawn = {label(name, classes=[name]).tobytes() for name in ("é", "ü", "ж", "λ", "ł", "…")}
    assert len(drawn) == 6


# ---- pages ----


def test_side_by_side_keeps_both_pictures():
    left, right = noise((300, 200), 1), noise((100, 260), 2)
    page = np.asarray(side_by_side(left, right, ("left", "a title far too long for its picture " * 9)))
    gap = 8
    top = page.shape[0] - 260 - gap
    assert np.array_equal(page[top : top + 200, gap : gap + 300], np.asarray(left))
    assert np.array_equal(page[top : top + 260, 300 + 2 * gap : 400 + 2 * gap], np.asarray(right))
    assert (page[:top, gap : gap + 300] < 128).any(), "a title"
    assert (page[:top, 300 + gap : 300 + 2 * gap] == 255).all(), "not into the other's place"
    assert (page[:top, 400 + 2 * gap :] == 255).all(), "no wider than its picture"


def test_contact_sheet():
    pictures = [Image.new("RGB", (60 + 20 * i, 40 + i), color) for i, color in enumerate(PALETTE[:7])]
    sheet = np.asarray(contact_sheet(pictures, 3))
    assert sheet.shape == (42 + 45 + 46 + 4 * 8, 3 * 180 + 4 * 8, 3), "rows as high as needed, equal columns"
    for i, (picture, color) in enumerate(zip(pictures, PALETTE, strict=False)):
        x0, y0 = 8 + i % 3 * 188, 8 + [0, 50, 103][i // 3]
        assert extent((sheet == color).all(axis=-1)) == (x0, y0, x0 + picture.width, y0 + picture.height)
    assert contact_sheet([Image.new("L", (9000, 300))], 1).width < 1500


# ---- tools/draw_detections.py ----


@pytest.fixture
def coco(tmp_path):
    """Six pictures; image 7 has a crowd, image 8 nothing; the flags of the tool."""
    (tmp_path / "images" / "val").mkdir(parents=True)
    images = [{"id": i, "file_name": f"val/{i}.png", "width": 80, "height": 60} for i in range(7, 13)]
    for info in images:
        noise((80, 60), info["id"]).save(tmp_path / "images" / info["file_name"])
    annotations = [
        {"id": i, "image_id": i, "category_id": 3, "bbox": [10, 10, 30, 20], "area": 600, "iscrowd": i == 7}
        for i in range(7, 13)
        if i != 8
    ]
    results = [
        {"image_id": i, "category_id": c, "bbox": [12.5, 9, 28, 22], "score": s}
        for i, c, s in ((7, 3, 0.9), (7, 3, 0.1), (9, 55, 0.6))
    ]
    data = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "cow"}]}
    (tmp_path / "instances.json").write_text(json.dumps(data))
    (tmp_path / "results.json").write_text(json.dumps(results))
    flags = {
        "annotations": "instances.json",
        "images": "images",
        "predictions": "results.json",
        "output_dir": "out",
    }
    return {f"--{name}": str(tmp_path / value) for name, value in flags.items()}


def draw(flags: dict[str, str], *more: str) -> list[str]:
    draw_detections.main([word for pair in flags.items() for word in pair] + list(more))
    return sorted(path.name for path in Path(flags["--output_dir"]).iterdir())


def test_draws_a_picture_an_image_and_the_sheet(coco):
    assert draw(coco) == sorted([f"val_{i}.png" for i in range(7, 13)] + ["contact_sheet.png"])


def test_both_sides_have_the_colours_of_the_categories(coco):
    draw(coco, "--image_ids", "7", "--score_threshold", "0.5")
    page = np.asarray(Image.open(Path(coco["--output_dir"]) / "val_7.png"))
    first_category = (page == PALETTE[0]).all(axis=-1)
    assert [side.sum() > 1000 for side in np.array_split(first_category, 2, axis=1)] == [True, True]


def test_images_are_taken_evenly(coco):
    assert draw(coco, "--num_images", "2") == ["contact_sheet.png", "val_12.png", "val_7.png"]


def test_images_by_id_once_each(coco):
    assert draw(coco, "--image_ids", "9", "8", "9") == ["contact_sheet.png", "val_8.png", "val_9.png"]


def test_the_threshold_leaves_detections_out(coco):
    def picture(threshold):
        draw(coco, "--image_ids", "7", "--score_threshold", threshold)
        page = np.asarray(Image.open(Path(coco["--output_dir"]) / "val_7.png"))
        height = 60 * 6  # enlarged to a width of 480
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


@pytest.mark.parametrize(
    "change",
    [
        {"bbox": None},
        {"bbox": [1, 2, 3]},
        {"bbox": ["1", 2, 3, 4]},
        {"score": "high"},
        {"image_id": [7]},
        {"category_id": None},
    ],
)
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


def test_importing_warns_of_nothing():
    done = run(sys.executable, "-W", "error", "-c", "import util.draw.boxes")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", ["draw_detections.py", "plot_logs.py"])
def test_a_mistake_ends_the_command_with_one_line(coco, tmp_path, script):
    flags = [word for pair in coco.items() for word in pair] + ["--image_ids", "99"]
    done = run(
        sys.executable,
        f"tools/{script}",
        *(flags if script == "draw_detections.py" else [str(tmp_path / "run 99")]),
    )
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "99" in done.stderr


@pytest.mark.parametrize("tool", [draw_detections, plot_logs])
def test_help_has_an_example(tool, capsys):
    with pytest.raises(SystemExit) as caught:
        tool.main(["--help"])
    told = capsys.readouterr().out
    assert caught.value.code == 0 and "example:" in told and "(default: " in told and "SUPPRESS" not in told

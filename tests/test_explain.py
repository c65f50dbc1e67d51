"""tools/explain.py: pictures of what a detector looks at."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from models import build_model, load_detector
from models.inspection import recording
from tests.helpers import BATCHFORMER, ROOT, SMALL_IMAGES, SMALL_MODEL, run
from tools import explain
from tools.explained.attention import _tokens
from tools.explained.batchformer import _difference
from util.checkpoint import write_atomically
from util.class_map import Category, ClassMap
from util.config import parse_config
from util.draw.attention import Samples, plot_samples
from util.draw.batch_attention import (
    MarkedPosition,
    on_padding,
    plot_batch_attention,
    plot_other_shares,
)
from util.errors import UserError

CLASSES = ClassMap(
    4, tuple(Category(i, 10 * i, name) for i, name in enumerate(("dog", "cat", "$bird$", "_ox")))
)


def write_checkpoint(path, *flags):
    torch.manual_seed(0)
    config = parse_config([*SMALL_MODEL, *SMALL_IMAGES, *flags])
    model = build_model(config)[0]
    write_atomically(
        {"model": model.state_dict(), "args": config.flags(), "classes": CLASSES.to_plain()}, path
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """plain.pth, batchformer.pth, and three pictures of different shapes."""
    folder = tmp_path_factory.mktemp("explain")
    write_checkpoint(folder / "plain.pth", "--with_box_refine")
    write_checkpoint(folder / "batchformer.pth", *BATCHFORMER)
    write_checkpoint(
        folder / "deep.pth", "--bf", "1", "--insert_idx", "0", "--insert_idx", "1", "--bt_num_layers", "2"
    )
    write_checkpoint(folder / "one_stream.pth", "--bf", "7", "--insert_idx", "1", "--eval_bf")
    rng = np.random.default_rng(0)
    for name, size in (("a", (64, 48)), ("b", (40, 90)), ("c", (120, 50))):
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(
            folder / f"{name}.png"
        )
    return folder


def attention(folder, out, *flags, checkpoint="plain", image="a.png"):
    explain.main(
        [
            "attention",
            "--resume",
            f"{folder / checkpoint}.pth",
            str(folder / image),
            "--output_dir",
            str(out),
            *flags,
        ]
    )
    return sorted(path.name for path in out.iterdir())


def batchformer(folder, out, *flags, checkpoint="batchformer", images=("a.png", "b.png", "c.png")):
    paths = [str(folder / image) for image in images]
    explain.main(
        ["batchformer", "--resume", f"{folder / checkpoint}.pth", *paths, "--output_dir", str(out), *flags]
    )
    return sorted(path.name for path in out.iterdir())


def test_the_best_detections_are_explained_by_default(folder, tmp_path):
    assert attention(folder, tmp_path) == [f"a_detection{i}_decoder1.png" for i in range(3)]


def test_chosen_queries_layers_and_a_pixel_get_a_picture_each(folder, tmp_path):
    names = attention(folder, tmp_path / "query", "--query", "3", "11", "--layer", "0", "1", "--head", "2")
    assert names == [f"a_query{query}_decoder{layer}.png" for query in (11, 3) for layer in (0, 1)]
    names = attention(
        folder, tmp_path / "pixel", "--pixel", "63.5", "0", "--level", "0", "3", "--format", "jpg"
    )
    assert names == [f"a_pixel63.5_0_level{level}_encoder1.jpg" for level in (0, 3)]
    with Image.open(tmp_path / "pixel" / names[0]) as picture:
        assert picture.format == "JPEG"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--query", "12"), "--query 12 must be from 0 to 11"),
        (("--detection", "48"), "--detection 48 must be from 0 to 47"),
        (("--pixel", "64", "10"), "outside of"),
        (("--pixel", "6", "10", "--level", "4"), "--level 4 must be from 0 to 3"),
        (("--layer", "2"), "--layer 2 must be from 0 to 1"),
        (("--head", "-1"), "--head -1 must be from 0 to 3"),
        (("--query", "1", "--pixel", "1", "1"), "not allowed with argument"),
    ],
)
def test_what_is_not_there_is_refused_and_nothing_is_written(folder, tmp_path, flags, said):
    with pytest.raises(UserError, match=said):
        attention(folder, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_batchformer_needs_several_images_and_a_checkpoint_that_has_it(folder, tmp_path):
    with pytest.raises(UserError, match="one image has no other"):
        batchformer(folder, tmp_path, images=("a.png",))
    with pytest.raises(UserError, match="trained without BatchFormerV2"):
        batchformer(folder, tmp_path, checkpoint="plain")
    with pytest.raises(UserError, match="must lie in"):
        batchformer(folder, tmp_path, "--position", "1.5", "0.5")


def test_every_layer_of_batchformer_gets_its_pages(folder, tmp_path, capsys):
    assert batchformer(folder, tmp_path / "a") == ["others_layer0.png", "positions_layer0.png", "streams.png"]
    assert "after encoder layer 0" in capsys.readouterr().out
    images = "a.png", "c.png"
    names = batchformer(
        folder, tmp_path / "b", "--level", "3", "--position", "1", "1", checkpoint="deep", images=images
    )
    layers = ("0_0", "0_1", "1_0", "1_1")
    assert names == [
        *(f"others_layer{i}.png" for i in layers),
        *(f"positions_layer{i}.png" for i in layers),
        "streams.png",
    ]


def test_the_streams_are_drawn_for_a_module_of_one_stream_too(folder, tmp_path):
    """Its plain side is an evaluation without the module, even if the training evaluated with it."""
    args = ("--score_threshold", "0", "--position", "0.5", "0.5")
    assert "streams.png" in batchformer(
        folder, tmp_path, *args, checkpoint="one_stream", images=("a.png", "c.png")
    )
    with Image.open(tmp_path / "streams.png") as picture:
        pixels = np.asarray(picture)
    detector = load_detector(folder / "one_stream.pth", batchformer=True)
    plain = load_detector(folder / "one_stream.pth")
    batch = [plain.prepare(folder / "a.png"), plain.prepare(folder / "c.png")]
    assert not torch.equal(detector.outputs(batch)["pred_logits"], plain.outputs(batch)["pred_logits"])
    assert pixels.std() > 0


def test_scores_of_the_streams_are_compared_where_one_of_them_finds_something():
    scores = torch.tensor([[[0.5, 0.1]], [[0.1, 0.2]], [[0.2, 0.1]]])  # [N, Q, C]
    mixed = torch.tensor([[[0.4, 0.1]], [[0.1, 0.35]], [[0.0, 0.1]]])
    line = _difference(scores.logit(), mixed.logit(), 0.3)
    assert line.startswith("2 queries that score at least 0.3 in one of the streams")
    assert line.endswith("their scores differ by 0.125 on average, at most 0.150")
    line = _difference(scores.logit(), mixed.logit(), 0.6)
    assert line.startswith("no query scores 0.6") and "best scores 0.5; lower --score_threshold" in line


def test_what_a_checkpoint_does_not_tell_is_told_by_flags(folder, tmp_path, caplog):
    torch.save(
        {"model": torch.load(folder / "plain.pth", weights_only=True)["model"]}, folder / "weights.pth"
    )
    with pytest.raises(UserError, match="nheads"):  # 5 does not divide the width
        attention(folder, tmp_path, "--nheads", "5", checkpoint="weights")
    flags = ("--nheads", "4", "--eval_size", "64", "--detection", "0")
    assert attention(folder, tmp_path, *flags, checkpoint="weights") == ["a_detection0_decoder1.png"]
    assert "nheads 4" in caplog.text


def test_detections_say_which_query_made_them(folder):
    detector = load_detector(folder / "plain.pth")
    batch = [detector.prepare(folder / "b.png")]
    outputs = detector.outputs(batch)
    found = detector.detections(outputs, batch)[0]
    scores = outputs["pred_logits"][0, found.queries, found.labels].sigmoid()
    torch.testing.assert_close(scores, found.scores)
    assert len(set(found.queries.tolist())) == 12


def test_the_token_of_a_pixel_is_the_one_whose_reference_point_is_nearest(folder):
    detector = load_detector(folder / "plain.pth")
    picture = Image.open(folder / "c.png")
    with recording(detector.model) as record:
        detector(picture)
    shapes = record.encoder[0].spatial_shapes
    flags = [
        "attention",
        "--resume",
        "x",
        "c.png",
        "--output_dir",
        "x",
        "--pixel",
        "101",
        "13",
        "--level",
        "0",
        "1",
        "2",
        "3",
    ]
    args = explain._parser().parse_args(flags)
    for level, target in enumerate(_tokens(args, picture.size, shapes)):
        first = sum(h * w for h, w in shapes[:level])
        own = range(first, first + shapes[level][0] * shapes[level][1])
        places = record.encoder[0].references_in_image()[0, :, level] * torch.tensor(picture.size)
        assert target.index == min(
            own, key=lambda i, at=places: (at[i] - torch.tensor([101.0, 13.0])).norm().item()
        )
        x0, y0, x1, y1 = target.outcome
        assert x0 <= 101 < x1
        assert y0 <= 13 < y1


def samples(num_levels=3, num_heads=2, reference=(30.0, 20.0)):
    rng = np.random.default_rng(0)
    weights = rng.random((num_heads, num_levels, 4))
    weights /= weights.sum((1, 2), keepdims=True)
    points = rng.uniform(10, 40, (num_heads, num_levels, 4, 2))
    shapes = [(8 >> level, 12 >> level) for level in range(num_levels)]
    return Samples(points, weights, np.array(reference), (25.0, 15.0, 35.0, 25.0), "box", shapes)


@pytest.mark.parametrize("size", [(640, 480), (90, 60), (2000, 90), (50, 900)], ids=str)
def test_a_page_has_a_panel_for_every_level_in_the_pictures_proportions(size):
    picture = Image.new("RGB", size, "gray")
    figure = plot_samples(picture, samples(), "title", heads=[0, 1])
    figure.draw_without_rendering()
    panels = [axes for axes in figure.axes if axes.get_images()]
    assert len(panels) == 1 + 3
    for axes in panels:
        box = axes.get_window_extent()
        (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
        assert box.width / box.height == pytest.approx((x1 - x0) / (y0 - y1), rel=1e-3)
        assert figure.bbox.contains(box.x0, box.y0)
        assert figure.bbox.contains(box.x1, box.y1)


def test_points_are_drawn_where_they_are_with_the_heaviest_last(folder):
    content = samples(num_levels=1, num_heads=1)
    figure = plot_samples(Image.new("RGB", (60, 60)), content, "$title_", heads=[0])
    marks = next(axes for axes in figure.axes if axes.get_images()).collections[0]
    # each mark is three discs: two rings and the colour
    assert np.allclose(
        marks.get_offsets()[2::3], content.points.reshape(-1, 2)[np.argsort(content.weights.flatten())]
    )
    assert (np.diff(marks.get_sizes()[2::3]) >= 0).all()


def test_titles_count_the_points_that_are_not_seen():
    content = samples()
    content.points[:, 1] = -500.0
    titles = [
        axes.get_title("left")
        for axes in plot_samples(Image.new("RGB", (60, 60)), content, "", heads=[0]).axes
    ]
    assert any(title.startswith("level 1") and "4/4 points outside" in title for title in titles)
    assert not any(title.startswith("level 0") and "outside" in title for title in titles)


@pytest.mark.parametrize("count", [2, 3, 12])
def test_matrices_mark_images_that_are_padded_at_the_position(count):
    sheets = [on_padding(Image.new("RGB", (30, 20)), (20, 30), (40, 40)) for _ in range(count)]
    weights = np.full((4, count, count), 1 / count)
    padded = np.arange(count) == 1
    figure = plot_batch_attention(sheets, [MarkedPosition(0.5, 0.9, "here", weights, padded)] * 2, "title")
    matrices = [axes for axes in figure.axes if axes.get_images()]
    assert len(matrices) == 2 * (1 + 4)
    for axes in matrices:
        assert len([patch for patch in axes.patches if patch.get_hatch()]) == 2 * count - 1
    assert len(matrices[0].get_images()) == 1 + 2 * count


def test_shares_are_drawn_for_every_image_and_level():
    sheets = [Image.new("RGB", (40, 30))] * 3
    shares = [np.full((3, 6, 8), 0.5), np.full((3, 3, 4), 0.6)]
    padded = [np.zeros((3, 6, 8), bool), np.zeros((3, 3, 4), bool)]
    padded[0][1, 4:] = True
    figure = plot_other_shares(sheets, shares, padded, "title")
    heat = [axes for axes in figure.axes if axes.get_images() and axes.get_images()[0].get_array().ndim == 2]
    assert len(heat) == 3 * 2
    assert sum(any(patch.get_hatch() for patch in axes.patches) for axes in heat) == 1


def test_padding_is_right_and_below_of_a_picture():
    sheet = np.asarray(on_padding(Image.new("RGB", (60, 40), "red"), (20, 30), (25, 40)))
    assert sheet.shape == (25, 40, 3)
    assert (sheet[:20, :30] == (255, 0, 0)).all()
    assert (sheet[20:] > 150).all()
    assert (sheet[:, 30:] > 150).all()


def test_the_lines_of_the_documentation_run(folder, tmp_path, monkeypatch):
    block = re.search(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "batchformer.md").read_text(), re.MULTILINE | re.DOTALL
    )[1]
    (tmp_path / "exps" / "synthetic").mkdir(parents=True)
    (tmp_path / "exps" / "synthetic" / "checkpoint.pth").symlink_to(folder / "batchformer.pth")
    for name in ("street.jpg", "a.jpg", "b.jpg", "c.jpg"):
        Image.open(folder / "a.png").save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    seen = {}
    exec(block, seen)
    assert seen["outputs"]["num_streams"] == 2
    assert seen["seen"].batch[0].shape[1:] == (4, 3, 3)


def test_help_has_defaults_and_an_example_and_needs_no_torch():
    for part in ((), ("attention",), ("batchformer",)):
        script = (
            "import sys; sys.modules['torch'] = None; import runpy; "
            "runpy.run_path('tools/explain.py', run_name='__main__')"
        )
        done = run("python", "-c", script, *part, "--help")
        assert done.returncode == 0, done.stderr
        assert "python tools/explain.py" in done.stdout
    assert "default: 0.3" in done.stdout


def test_files_that_are_not_there_are_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"none\.pth"):
        attention(folder, tmp_path, checkpoint="none")
    with pytest.raises(UserError, match=r"none\.png"):
        attention(folder, tmp_path, image="none.png")
    with pytest.raises(UserError, match="can't be written"):
        attention(folder, folder / "a.png")

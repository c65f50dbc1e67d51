"""Exported detectors: the same detections in every runtime, and a gate that finds what is wrong.

tests/faults/export_published.py exports the published architectures at full size.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import load_detector, load_model
from models.backbone import _resize_mask_by_index, resize_mask
from models.deformable_detr import MEAN
from models.detector import Detector
from models.export import runtime, write
from models.export.detector import ExportedDetector, load_exported
from models.export.graph import DetectorGraph
from models.export.sampling import attend_by_gathers
from models.ops import reference
from tests.detected import write_checkpoint, write_detected
from tests.helpers import BATCHFORMER, ROOT, SMALL_IMAGES, SMALL_MODEL
from tools import explain, export, predict
from tools.benchmarks import export as benchmark_export
from tools.exported.verify import compare, open_images, verify
from util.class_map import Category, ClassMap
from util.config import parse_config, with_classes
from util.errors import UserError

CLASSES = ClassMap(4, (Category(0, 3, "person"), Category(1, 17, "traffic light"), Category(2, 1000, "dog")))
# all that changes the graph: BatchFormerV2 is left out, frozen norms go into convolutions
FLAGS = [
    *SMALL_IMAGES,
    *SMALL_MODEL,
    *("--backbone_norm", "frozen_bn", "--enc_layers", "1", "--with_box_refine", "--two_stage", "--masks"),
    *("--eval_size", "192", "--max_size", "320", *BATCHFORMER),
]
SIZES = [(320, 192), (110, 140), (200, 100), (96, 200)]  # width, height


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint, and a data set whose objects are what it detects: AP is high, and sees a change."""
    folder = tmp_path_factory.mktemp("export")
    write_checkpoint(folder / "checkpoint.pth", FLAGS, CLASSES)
    write_detected(folder, folder / "checkpoint.pth", SIZES)
    return folder


def exported(folder: Path, suffix: str, *flags: str) -> Path:
    """The checkpoint as a file, which has passed the gate."""
    path = folder / f"model{suffix}"
    export.main(
        ["--resume", str(folder / "checkpoint.pth"), "--output", str(path)]
        + ["--verify", str(folder), "--batch_size", "3", *flags]
    )
    return path


def need_onnx() -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)


@pytest.fixture(scope="module")
def pt2(folder) -> Path:
    return exported(folder, ".pt2")


@pytest.fixture(scope="module")
def onnx_file(folder) -> Path:
    need_onnx()
    return exported(folder, ".onnx")


# ---- the graph


@pytest.mark.parametrize("coordinates", [2, 4])
def test_gathers_equal_the_reference_operator(coordinates):
    torch.manual_seed(0)
    shapes = [(9, 8), (7, 7), (6, 1), (1, 1)]
    value = torch.randn(2, sum(height * width for height, width in shapes), 4, 8)
    points = torch.rand(2, 11, 4, coordinates) * 1.4 - 0.2
    offsets, logits = 5 * torch.randn(2, 11, 4, 4, 3, 2), torch.randn(2, 11, 4, 4, 3)
    for query, number in enumerate((torch.nan, torch.inf, -torch.inf, 1e30)):
        offsets[0, query, :, :, 0] = number
    found = attend_by_gathers(value, shapes, points, offsets, logits)
    torch.testing.assert_close(found, reference.fused_forward(value, shapes, points, offsets, logits))
    # values in half precision are summed in float32, as the operator does
    low = attend_by_gathers(value.half(), shapes, points, offsets, logits)
    assert low.dtype == torch.half
    torch.testing.assert_close(low.float(), found, rtol=1e-2, atol=1e-2)


def test_masks_are_resized_to_the_bit():
    for side in range(65, 1400):
        mask = torch.arange(side)[None, None] >= torch.tensor([[[side // 2]], [[side - 7]]])
        smaller = side
        for _ in range(6):
            smaller = -(-smaller // 2)
            found = _resize_mask_by_index(mask, (1, smaller))
            assert torch.equal(found, resize_mask(mask, (1, smaller))), (side, smaller)


# ---- files


def check_file(file: Detector, folder: Path) -> None:
    """Batches of 1 and 3 with several sizes in one; several sizes through one file."""
    checkpoint = load_detector(folder / "checkpoint.pth", device="cpu")
    pictures = [folder / "val2017" / f"{i}.png" for i in (1, 2, 3, 4)]
    for names in ([pictures[0]], [pictures[1]], [pictures[3]], pictures[:3]):
        prepared = [checkpoint.prepare(name) for name in names]
        for ours, theirs in zip(checkpoint.detect(prepared), file.detect(prepared), strict=True):
            assert compare(ours, theirs).unpaired == 0
            assert ours.size == theirs.size
            assert set(ours.queries.tolist()) == set(theirs.queries.tolist())
            torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-4)
            best, same = ours.above(ours.scores[4].item()), theirs.above(ours.scores[4].item() - 1e-5)
            assert best.queries.tolist() == same.queries.tolist()
            assert (best.masks != same.masks).float().mean() < 1e-3
    assert [one.id for one in file.classes.categories] == [3, 17, 1000]
    assert (file.config.data.eval_size, file.config.data.max_size) == (192, 320)
    assert file.config.segmentation.masks


def lines_of_the_docs(first: str) -> str:
    """The Python of docs/export.md that begins with `first`."""
    text = (ROOT / "docs" / "export.md").read_text()
    return re.search(rf"```python\n({first}.*?)```", text, re.DOTALL)[1]


def test_a_torch_export_file_detects_the_same(pt2, folder, tmp_path, monkeypatch, capsys):
    check_file(load_detector(pt2), folder)
    (tmp_path / "model.pt2").symlink_to(pt2)
    monkeypatch.chdir(tmp_path)
    exec(lines_of_the_docs("import json, torch"), {})
    assert capsys.readouterr().out == "torch.Size([1, 48, 4])\n"


def test_an_onnx_file_detects_the_same(onnx_file, folder, tmp_path):
    import onnx

    check_file(load_detector(onnx_file), folder)
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert "GridSample" not in {node.op_type for node in model.graph.node}
    assert not any(".bf." in tensor.name for tensor in model.graph.initializer)
    shapes = {
        i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input
    }
    assert shapes == {"images": ["batch", 3, "height", "width"], "sizes": ["batch", 2]}

    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph.value_info
    assert max(len(value.type.tensor_type.shape.dim) for value in inferred) <= 6, "OpenVINO fails from 7 on"

    predict.main(
        ["--resume", str(onnx_file), str(folder / "val2017"), "--output_dir", str(tmp_path / "file")]
        + ["--score_threshold", "0"]
    )
    found = json.loads((tmp_path / "file" / "predictions.json").read_text())
    assert len(found) == 4 * 48
    assert all("segmentation" in entry for entry in found)


def test_float16_has_the_ap_of_the_checkpoint(tmp_path, capsys):
    """With batch and group norms, whose parameters have other types than their inputs under autocast."""
    need_onnx()
    flags = ["--num_feature_levels", "1", "--enc_layers", "1", "--dec_layers", "1", "--backbone_norm", "bn"]
    write_checkpoint(tmp_path / "checkpoint.pth", [*SMALL_IMAGES, *SMALL_MODEL, *flags], CLASSES)
    write_detected(tmp_path, tmp_path / "checkpoint.pth", SIZES)
    path = exported(tmp_path, ".onnx", "--precision", "float16", "--batch_size", "1")
    assert load_exported(str(path)).model.about["precision"] == "float16"
    assert re.search(r"AP +100\.00 +(100\.00|99\.\d\d) ", capsys.readouterr().out)


def test_openvino_detects_the_same(onnx_file, folder):
    pytest.importorskip("openvino")
    check_file(load_exported(str(onnx_file), runtime="openvino"), folder)


def test_raw_outputs_give_the_same_detections(folder):
    checkpoint = load_detector(folder / "checkpoint.pth", device="cpu")
    graph = DetectorGraph(checkpoint.model, raw=True, amp="off")

    @torch.no_grad()
    def run(images, sizes):
        return dict(zip(graph.outputs, graph(images, sizes), strict=True))

    file = runtime.ExportedFile(run, {})
    check_file(ExportedDetector(file, checkpoint.config, checkpoint.classes), folder)


def test_the_lines_of_the_docs_need_nothing_of_this_project(onnx_file, folder, tmp_path):
    lines = lines_of_the_docs("import json, numpy")
    (tmp_path / "model.onnx").symlink_to(onnx_file)
    (tmp_path / "street.jpg").symlink_to(folder / "val2017" / "1.png")
    blocked = "import sys\nfor name in ('torch', 'torchvision', 'models', 'util'): sys.modules[name] = None\n"
    paths = f"sys.path[:] = {sys.path}\n"
    lines = lines.replace("score >= 0.5", "score >= 0")
    done = subprocess.run(
        [sys.executable, "-c", blocked + paths + lines],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours = load_detector(folder / "checkpoint.pth", device="cpu")(folder / "val2017" / "1.png")
    rows = done.stdout.splitlines()
    assert len(rows) == len(ours)
    best = next(iter(ours))
    assert rows[0].startswith(f"{best.name} {best.score:.2f}".rstrip("0"))
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", rows[0].split("[")[1])]
    assert numbers == pytest.approx(best.box, abs=0.11)


def test_the_benchmark_times_every_runtime(pt2, folder, monkeypatch, capsys):
    """With files that are there already: making them takes most of the time."""

    def copy(detector, path, **options):
        if not (folder / path.name).exists():
            raise UserError("it was not made")
        shutil.copy(folder / path.name, path)

    monkeypatch.setattr(benchmark_export, "write", copy)
    flags = [*FLAGS, "--resume", str(folder / "checkpoint.pth")]
    args = Namespace(size=[96, 128], num_iters=1, warm_iters=0)
    benchmark_export.measure_export(args, with_classes(parse_config(flags), CLASSES))
    text = capsys.readouterr().out
    for batch in (1, 4):
        assert f"batch {batch} of 96 x 128" in text
    assert len(re.findall(r"torch \.pt2 +\d+\.\d ms +\d+\.\d\d times PyTorch", text)) == 2


# ---- the gate


def test_detections_are_paired_by_class_and_box(folder):
    found = load_detector(folder / "checkpoint.pth", device="cpu")(folder / "val2017" / "1.png")
    assert compare(found, found).unpaired == 0
    # another order is no difference
    order = torch.arange(len(found)).flip(0)
    assert (
        compare(
            found,
            replace(found, boxes=found.boxes[order], scores=found.scores[order], labels=found.labels[order]),
        ).unpaired
        == 0
    )
    for changed in (
        {"boxes": found.boxes + torch.tensor([0.6, 0, 0, 0])},
        {"scores": found.scores + 2e-3},
        {"labels": (found.labels + 1) % 4},
        {"boxes": torch.full_like(found.boxes, torch.nan)},
    ):
        assert compare(found, replace(found, **changed)).unpaired > 0
    within = compare(found, replace(found, boxes=found.boxes + 0.4, scores=found.scores + 9e-4))
    assert within.unpaired == 0
    assert (within.pixels, within.score) == pytest.approx((0.4, 9e-4), rel=1e-2)


def test_scores_that_are_equal_make_no_pairs(folder):
    """Which hundred of them are listed is chance."""
    found = load_detector(folder / "checkpoint.pth", device="cpu")(folder / "val2017" / "1.png")
    flat = replace(found, scores=torch.full_like(found.scores, 0.01))
    other = replace(flat, boxes=flat.boxes + 300)
    assert compare(flat, flat).pairs == len(found)
    assert (compare(flat, other).pairs, compare(flat, other).unpaired) == (0, 0)


def test_without_objects_there_is_nothing_to_compare(folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder / "val2017", data / "val2017")
    (data / "annotations").mkdir()
    truth = json.loads((folder / "annotations" / "instances_val2017.json").read_text())
    truth["annotations"] = [one for one in truth["annotations"] if one["image_id"] == 4]
    (data / "annotations" / "instances_val2017.json").write_text(json.dumps(truth))
    checkpoint = load_detector(folder / "checkpoint.pth", device="cpu")
    assert len(open_images(str(data), checkpoint, 4).ids) == 4
    with pytest.raises(UserError, match=r"--verify .*: the 1 images have no objects"):
        open_images(str(data), checkpoint, 1)
    (data / "val2017" / "2.png").unlink()
    with pytest.raises(UserError, match=r"--verify .*: 1 images are missing, such as .*2\.png"):
        open_images(str(data), checkpoint, 4)
    with pytest.raises(UserError, match=r"--verify .*nothing: --coco_path .* does not exist"):
        open_images(str(tmp_path / "nothing"), checkpoint, 4)


@pytest.fixture
def gate(folder):
    """Whether a file passes, with single images: padding changes what these weights detect."""
    checkpoint = load_detector(folder / "checkpoint.pth", device="cpu")
    images = open_images(str(folder), checkpoint, 4)
    return lambda path: verify(checkpoint, path, images)


def round_locations(model) -> None:
    """Pixels of sampling locations to bfloat16 and back, before their floor is taken."""
    import onnx

    for floor in [node for node in model.graph.node if node.op_type == "Floor"]:
        exact = floor.input[0]
        rounded = f"{exact}_rounded"
        for node in model.graph.node:
            node.input[:] = [rounded if name == exact else name for name in node.input]
        types = (
            (onnx.TensorProto.BFLOAT16, exact, "_low"),
            (onnx.TensorProto.FLOAT, f"{exact}_low", "_rounded"),
        )
        at = list(model.graph.node).index(floor)
        for type_, source, end in reversed(types):
            model.graph.node.insert(at, onnx.helper.make_node("Cast", [source], [exact + end], to=type_))


def change(model, wanted, changed) -> None:
    """Change the first constant of whose name and values `wanted` is true."""
    import onnx

    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if wanted(tensor.name, values):
            tensor.CopyFrom(onnx.numpy_helper.from_array(changed(values).copy(), tensor.name))
            return
    raise AssertionError("no such constant")


def transpose_a_weight(model) -> None:
    change(model, lambda _, values: values.shape == (64, 64), np.transpose)


def forget_the_mean(model) -> None:
    change(model, lambda _, values: values.size == 3 and np.allclose(values.ravel(), MEAN), np.zeros_like)


@pytest.mark.parametrize("fault", [round_locations, transpose_a_weight, forget_the_mean])
def test_the_gate_finds_a_fault(onnx_file, gate, tmp_path, fault, capsys):
    import onnx

    model = onnx.load(onnx_file)
    onnx.save(model, tmp_path / "same.onnx")
    fault(model)
    onnx.save(model, tmp_path / "wrong.onnx")
    with pytest.raises(UserError, match="does not detect what --resume detects"):
        gate(tmp_path / "wrong.onnx")
    if fault is round_locations:
        gate(tmp_path / "same.onnx")
        assert re.search(r"AP +9\d\.\d\d +9\d\.\d\d +[+-]0\.0\d", capsys.readouterr().out)


def raise_every_score(model) -> None:
    last = "model.class_embed.1.bias"
    change(model, lambda name, _: name == last, lambda values: values + np.float32(0.01))


def test_a_file_of_lower_precision_is_judged_by_its_ap(onnx_file, gate, tmp_path, capsys):
    import onnx

    for fault in (raise_every_score, forget_the_mean):
        model = onnx.load(onnx_file)
        (precision,) = [entry for entry in model.metadata_props if entry.key == "precision"]
        precision.value = '"float16"'
        fault(model)
        onnx.save(model, tmp_path / f"{fault.__name__}.onnx")
    gate(tmp_path / "raise_every_score.onnx")
    assert "4 images have detections without a partner" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"AP of bbox differs by \d+\.\d\d points \(at most 0\.3\)"):
        gate(tmp_path / "forget_the_mean.onnx")


def test_a_refused_file_does_not_get_its_name(onnx_file, folder, tmp_path, monkeypatch):
    import onnx

    wrong = onnx.load(onnx_file)
    forget_the_mean(wrong)
    monkeypatch.setattr(write, "write", lambda detector, path, **options: onnx.save(wrong, path))
    path = tmp_path / "model.onnx"
    path.write_text("an older one")
    command = ["--resume", str(folder / "checkpoint.pth"), "--output", str(path), "--verify", str(folder)]
    with pytest.raises(UserError, match=r"model\.unverified\.onnx does not detect"):
        export.main(command)
    assert path.read_text() == "an older one"
    assert (tmp_path / "model.unverified.onnx").exists()


# ---- bad input


def test_what_does_not_fit_is_refused(folder, pt2, tmp_path):
    for flags, message in (
        (["--output", "model.trt"], "must end with .onnx or .pt2"),
        (["--output", str(tmp_path / "none" / "model.pt2")], "does not exist"),
        (["--output", str(tmp_path / "model.onnx"), "--opset", "9"], "--opset 9 must be from 18"),
        (["--output", str(tmp_path / "model.pt2"), "--verify", "x", "--runtime", "openvino"], "use torch"),
    ):
        with pytest.raises(UserError, match=message):
            export.main(["--resume", str(folder / "checkpoint.pth"), *flags])
    with pytest.raises(UserError, match="was exported already; give the checkpoint"):
        export.main(["--resume", str(pt2), "--output", str(tmp_path / "again.pt2")])
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(UserError, match="is a folder; name a file"):
        export.main(["--resume", str(folder / "checkpoint.pth"), "--output", str(tmp_path / "folder.pt2")])
    with pytest.raises(UserError, match=r"is an exported file, .*; give the checkpoint"):
        load_model(pt2)
    with pytest.raises(UserError, match="precision and weights can't be chosen"):
        load_detector(pt2, amp="bf16")
    with pytest.raises(UserError, match="--nheads can't be given"):
        load_detector(pt2, nheads=4)
    small = load_exported(str(pt2), flags={"eval_size": 64, "panoptic_score": 0.2})
    assert small.config.data.panoptic_score == 0.2
    with pytest.raises(
        UserError, match=r"torch can't run .* on images of 64 x 64 pixels.* raise --eval_size"
    ):
        small(Image.new("RGB", (64, 64)))
    (tmp_path / "broken.pt2").write_bytes(b"no archive")
    with pytest.raises(UserError, match="broken.pt2"):
        load_detector(tmp_path / "broken.pt2")
    with pytest.raises(UserError, match=r"no\.pt2 is no file"):
        runtime.open_exported(tmp_path / "no.pt2")
    with pytest.raises(UserError, match="use the checkpoint"):
        explain.main(
            ["attention", "--resume", str(pt2), "image.png", "--output_dir", str(tmp_path / "explained")]
        )


def test_missing_packages_are_named_first(folder, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if "onnx" in name else find(name, *rest)
    )
    command = ["--resume", str(tmp_path / "no.pth"), "--output", str(tmp_path / "model.onnx")]
    with pytest.raises(UserError, match="pip install onnx onnxscript"):
        export.main(command)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(UserError, match="pip install onnxruntime"):
        load_detector(tmp_path / "model.onnx")

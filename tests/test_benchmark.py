"""What benchmark.py says: of variants and of memory, of launches, evaluation, costs and another library."""

from __future__ import annotations

import argparse
import re
import sys

import pytest
import torch
from PIL import Image

from datasets import coco_eval
from datasets.coco_eval import coco_results
from models.ops.benchmark import peak_memory
from models.ops.functions import ms_deform_attn
from tests.helpers import BATCHFORMER, SMALL_IMAGES, SMALL_MODEL, run, write_coco
from tests.processes import run_forked
from tools.benchmarks import evaluation, other_library, steps, sweep
from tools.benchmarks.launches import KeptMemory, LaunchCounter
from tools.benchmarks.parts import Parts
from tools.benchmarks.steps import TrainingStep, build, make_batch
from util.config import parse_config
from util.errors import UserError

CPU = torch.device("cpu")


def bench(*flags):
    result = run_forked(
        "benchmark.py",
        *SMALL_MODEL,
        "--num_iters",
        "1",
        "--warm_iters",
        "1",
        "--batch_size",
        "2",
        "--device",
        "cpu",
        *flags,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_flag_is_timed_beside_the_same_without_it():
    """The encoder is made the most of the network, so that forgetting it shows."""
    large = ("--enc_layers", "4", "--dim_feedforward", "512", "--size", "256", "256")
    lines = bench("train", *BATCHFORMER, "--amp", "bf16", "--checkpoint_encoder", *large).splitlines()
    timed = [line.split(":")[0] for line in lines if "images/s" in line]
    names = ("--bf 0", "--bf 1", "--bf 1 --amp bf16", "--bf 1 --amp bf16 --checkpoint_encoder")
    assert timed == [f"training step, {name}" for name in names]
    compared = [
        re.match(r"(--\S+.*) takes [\d.]+ times as long as (.*), and ([\d.]+) times the memory", line)
        for line in lines
    ]
    found = {match[1]: (match[2], float(match[3])) for match in compared if match}
    assert {flag: without for flag, (without, _) in found.items()} == {
        "--bf 1": "--bf 0",
        "--amp bf16": "without",
        "--checkpoint_encoder": "without",
    }
    assert lines[-1].startswith("memory: PyTorch's tensors at the peak")
    assert found["--checkpoint_encoder"][1] < 0.9


def test_inference_in_low_precision_is_timed_beside_float32():
    lines = bench("--amp", "bf16", "--checkpoint_encoder", "--size", "64", "80").splitlines()
    assert [line.split(":")[0] for line in lines if "images/s" in line] == [
        "inference",
        "inference --amp bf16",
    ]
    assert re.fullmatch(r"--amp bf16 takes [\d.]+ times as long as without", lines[-1])


def test_inference_with_masks_and_the_one_beside_it_end_with_results(monkeypatch):
    lines = bench("--masks", "--size", "64", "80").splitlines()
    assert [line.split(":")[0] for line in lines if "images/s" in line] == [
        "inference to results",
        "inference to results --masks",
    ]
    made = []
    monkeypatch.setattr(coco_eval, "coco_results", lambda *call: made.extend(coco_results(*call)))
    (images, _), config = make_batch([64, 80], parse_config([*SMALL_MODEL, "--masks"]), CPU)
    steps.inference(config, CPU, images, to_results=True)()
    assert made[0]["segmentation"]["size"] == [64, 80]


def test_peak_memory_is_what_a_call_takes_for_a_moment():
    kept = []

    def step():
        for _ in range(2):  # one after the other, not together
            torch.ones(8 << 20)
        kept.append(torch.ones(4 << 20))
        return kept

    peak, results = peak_memory(step, CPU)
    assert results is kept
    assert peak == 32 << 20


def test_the_scaler_of_float16_leaves_out_what_overflows():
    """The first scales of GradScaler are too large for some gradients: the weights must stay
    numbers.
    """
    flags = ["--batch_size", "2", "--amp", "fp16", "--lr", "0.001", "--lr_backbone", "0"]
    config = parse_config([*SMALL_MODEL, *flags])
    torch.manual_seed(0)
    (images, targets), config = make_batch((64, 80), config, CPU)
    step = TrainingStep(config, CPU, images, targets)
    before = [p.clone() for p in step.model.parameters()]
    for _ in range(3):
        step()
    after = list(step.model.parameters())
    assert all(p.isfinite().all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ---- launches

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.mark.parametrize("device", DEVICES)
def test_launches_and_waits_of_a_step_known_by_hand(device):
    x = torch.ones(3, 4, device=device, requires_grad=True)
    values, gradient = torch.ones(12, device=device), torch.ones((), device=device)
    index, mask = torch.tensor([0, 1], device=device), torch.arange(12, device=device) > 5
    parts = Parts()
    counter = LaunchCounter(torch.device(device), parts)
    with counter:
        with parts.part("forward"):
            y = (x.view(4, 3).t() * 2).sum()
        with parts.part("backward"):
            y.backward(gradient)
        with parts.part("nothing"):
            torch.ops.aten._unsafe_view(values, [3, 4])
            torch.empty_like(values).resize_(4)
            values.detach().view(3, 4).t().expand(2, 4, 3)
        with parts.part("writes"):
            values.add_(1)
            torch._foreach_mul_([values, gradient], 1)
            values[index]
        with parts.part("waits"):
            values[0].item()
            values[mask]
            values.nonzero()
    counts = {part: counter.launches[part].total() for part in ("forward", "nothing", "writes", "waits")}
    assert counts == {"forward": 2, "nothing": 0, "writes": 3, "waits": 2}
    assert counter.launches["backward"]["aten::mul"] == 1
    assert dict(+counter.waits) == {"waits": 3}


def test_the_host_waits_for_copies_that_block():
    """From a CPU to the device that holds nothing, which stands in for a GPU."""
    host, device = torch.ones(3), torch.empty(3, device="meta")
    with (counter := LaunchCounter(torch.device("meta"), parts := Parts())), parts.part("copies"):
        device.copy_(host)
        device.copy_(host, non_blocking=True)
        host.to("meta")
        host.to("meta", non_blocking=True)
        host.clone()
    assert counter.launches["copies"].total() == 4
    assert counter.waits["copies"] == 2


def test_a_call_of_the_operator_launches_once():
    parts = Parts()
    tensors = torch.ones(1, 4, 1, 8), torch.ones(1, 3, 1, 1, 2, 2), torch.ones(1, 3, 1, 1, 2)
    with (counter := LaunchCounter(CPU, parts)), parts.part("forward"):
        ms_deform_attn(tensors[0], [(2, 2)], *tensors[1:])
    assert counter.launches["forward"] == {"deformable::ms_deform_attn": 1}


def test_kept_memory_counts_each_block_once():
    own = torch.ones(1000, requires_grad=True)
    with (kept := KeptMemory()):
        # exp keeps its result, the product that result twice, the power the parameter
        a = own.exp()
        (a.view(10, 100) * a.view(10, 100)).sum() + own.pow(2).sum()
    assert kept.without([own]) == a.nbytes


def rows(text):
    """The table of the launches: part -> launches, waits."""
    found = re.findall(r"^(\w[\w ]*?) +(\d+) +(\d+)$", text, re.MULTILINE)
    return {part: (int(launches), int(waits)) for part, launches, waits in found}


def test_launches_by_part_of_the_step():
    plain, both = (
        rows(bench("launches", "--size", "64", "80", *flags))
        for flags in ((), ("--with_box_refine", *BATCHFORMER))
    )
    # a linear layer for the classes, three with two ReLU for the boxes: of both layers at once, or of each
    assert plain["heads"] == (6, 0)
    assert both["heads"] == (12, 0)
    assert plain["backbone"] == both["backbone"]
    assert plain["encoder"] < both["encoder"]
    for table in (plain, both):
        total, without = table.pop("sum"), table.pop("sum without the update")
        assert total[0] == sum(launches for launches, _ in table.values())
        assert without[0] == total[0] - table["update"][0]
        assert min(launches for launches, _ in table.values()) > 0


# a machine that is lent for a check has torch and little else
FEW_PACKAGES = """
import sys
for package in ("matplotlib", "pycocotools", "safetensors", "transformers"):
    sys.modules[package] = None  # an import of it fails
sys.argv[0] = "benchmark.py"
import benchmark
benchmark.main()
"""


@pytest.mark.parametrize("what", ["train", "launches"])
def test_speed_needs_few_packages(what):
    flags = ("--size", "64", "64", "--num_iters", "1", "--warm_iters", "0", "--device", "cpu")
    result = run(sys.executable, "-c", FEW_PACKAGES, what, *SMALL_MODEL, *flags)
    assert result.returncode == 0, result.stderr


# ---- evaluation


def test_nested_parts_count_for_themselves(monkeypatch):
    times = iter((10, 11, 13, 16, 20, 25))
    monkeypatch.setattr(evaluation, "timer", lambda: next(times))
    clock, module = evaluation.Clock(), torch.nn.Identity()
    clock.follow(module, "inner")
    with clock.part("outer"):
        module(1)
        module(1)
    assert clock.seconds == {"outer": 1 + 3 + 5, "inner": 2 + 4}


@pytest.mark.parametrize(("iterations", "images"), [("2", 4), ("9", 5)])
def test_evaluation_counts_images(tmp_path, iterations, images):
    write_coco(tmp_path, num_train=1, num_val=5)
    few = ("--num_iters", iterations, "--warm_iters", "0", "--batch_size", "2", "--num_workers", "0")
    result = run_forked(
        "benchmark.py", "evaluation", *SMALL_MODEL, *SMALL_IMAGES, *few, "--coco_path", str(tmp_path)
    )
    assert result.returncode == 0, result.stderr
    assert f"\n{images} images\n" in result.stdout
    shares = dict(re.findall(r"^(\w[\w ]*?) +[\d.]+ +[\d.]+ +(\d+)%$", result.stdout, re.MULTILINE))
    assert tuple(shares) == evaluation.PARTS
    assert 95 <= sum(map(int, shares.values())) <= 105


def test_evaluation_compares_with_the_objects_of_its_images(tmp_path):
    write_coco(tmp_path, num_train=1, num_val=5)
    flags = (*SMALL_MODEL, *SMALL_IMAGES, "--batch_size", "2", "--num_workers", "0")
    config = parse_config([*flags, "--coco_path", str(tmp_path)])
    dataset = evaluation.build_dataset("val", config)
    batches, few = evaluation.first_batches(dataset, config, CPU, 2)
    found = [int(target["image_id"]) for _, targets in batches for target in targets]
    assert found == [image["id"] for image in few.coco.dataset["images"]] == few.image_ids[:4]
    assert {entry["image_id"] for entry in few.coco.dataset["annotations"]} == set(found)
    assert len(dataset.coco.dataset["images"]) == 5


# ---- costs


def test_sweep_varies_each_axis_alone_and_draws(tmp_path):
    picture = tmp_path / "costs.png"
    text = bench("sweep", "--size", "32", "48", "--warm_iters", "0", "--out", str(picture))
    values = re.findall(r"^(\d+(?: x \d+)?) +[\d.]+ ms +[\d.]+ ms +[\d.]+ MiB$", text, re.MULTILINE)
    sizes = ["16 x 24", "24 x 36", "32 x 48", "40 x 60"]
    assert values == [*sizes, "4", "12", "24", "36", "2", "4", "8"]
    assert "not varied" in text.splitlines()[-3], "one thread"
    with Image.open(picture) as image:
        assert min(image.size) > 500


def test_processes_divide_the_threads(monkeypatch, capsys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(sweep, "rates_of", lambda processes, threads, *_: [processes, threads])
    chart = sweep._measure_processes(argparse.Namespace(), parse_config([]))
    assert chart.lines == {"inference": ([1, 2, 4], (1, 2, 4)), "training": ([1, 2, 4], (6, 3, 1))}
    printed = capsys.readouterr().out.splitlines()[2:]
    assert [line.split("  ")[0] for line in printed] == ["1 x 6", "2 x 3", "4 x 1"]


@pytest.mark.slow
def test_processes_work_at_once_and_their_images_are_summed():
    args = argparse.Namespace(num_iters=1, warm_iters=0, size=(32, 32))
    config = parse_config([*SMALL_MODEL, "--batch_size", "2"])
    assert min(sweep.rates_of(2, 1, args, config)) > 0


# ---- another library

THEIRS = ("--backbone_norm", "frozen_bn", "--against", "transformers")


@pytest.mark.parametrize("what", ["inference", "train"])
def test_another_library_is_timed_beside_ours_without_batchformer(what):
    transformers = pytest.importorskip("transformers", minversion="5")
    lines = bench(what, "--size", "64", "80", *BATCHFORMER, *THEIRS).splitlines()
    name = {"inference": "inference", "train": "training step, --bf 0"}[what]
    timed = [line.split(":")[0] for line in lines if "images/s" in line]
    assert timed[0] == name
    assert timed[-1] == f"{name} with transformers {transformers.__version__}"
    assert re.search(
        rf"^transformers takes [\d.]+ times as long as ours \({name}\)", "\n".join(lines), re.MULTILINE
    )


def test_the_other_detector_trains_as_many_parameters():
    library = pytest.importorskip("transformers", minversion="5")
    for flags in ((), ("--with_box_refine", "--two_stage"), ("--num_feature_levels", "1")):
        config = parse_config([*SMALL_MODEL, "--backbone_norm", "frozen_bn", *flags])
        ours, theirs = build(config, CPU)[0], other_library._build(library, config)
        assert trained(theirs) == trained(ours)


def trained(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    "flags",
    [
        ("--backbone_norm", "gn"),
        ("--backbone", "resnet152"),
        ("--drop_path", "0.1"),
        ("--masks",),
        ("--eval_bf", *BATCHFORMER),
    ],
)
def test_what_the_other_library_has_not_is_refused(flags, monkeypatch):
    monkeypatch.setattr(other_library, "_library", lambda: None)
    config = parse_config([*SMALL_MODEL, "--backbone_norm", "frozen_bn", *flags])
    with pytest.raises(UserError, match=rf"--against transformers.*{flags[0]}"):
        other_library.detector(config, CPU, None, [], False)


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        other_library.detector(parse_config([]), CPU, None, [], False)


# ---- flags


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("sweep",), "--size"),
        (("sweep", "--size", "32", "32", "--out", "costs.txt"), "must end in one of"),
        (("evaluation", "--size", "32", "32"), "leave out --size"),
        (("launches", "--against", "transformers"), "inference and train alone"),
        (("train", "--out", "a.png"), "sweep alone"),
    ],
)
def test_flags_of_another_mode_are_refused(flags, told):
    result = run_forked("benchmark.py", *flags)
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert told in last

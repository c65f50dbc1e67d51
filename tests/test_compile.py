"""--compile: what is compiled, how often, and that the numbers stay.

Most tests stop before Inductor, which takes minutes for a whole detector: the graphs, their guards and
their gradients are the same. One test compiles two regions to the end.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor import lowering

import engine
import main
from engine import data_parallel, training_loss
from models import build_model, regions
from models.regions import check_compiler, compile_regions, eager
from tests.faults.compare import differences
from tests.golden import recipe
from tests.helpers import BATCHFORMER, SMALL_MODEL, write_coco
from tests.processes import run_main_forked
from util.checkpoint import read_checkpoint
from util.config import parse_config
from util.errors import UserError
from util.nested_tensor import NestedTensor
from util.step.precision import autocast

CPU = torch.device("cpu")
SIZES = [(128, 128), (128, 192), (208, 136)]
TWO_STAGE = ("--with_box_refine", "--two_stage")


@pytest.fixture(autouse=True)
def settings_of_the_process(monkeypatch):
    """What compile_regions sets is taken back, and compiled code forgotten."""
    backward = torch.ops.aten.convolution_backward.default
    monkeypatch.setitem(lowering.lowerings, backward, lowering.lowerings.get(backward))
    torch._dynamo.reset()
    counters.clear()
    with (
        torch.fx.experimental._config.patch(use_duck_shape=True),
        torch._dynamo.config.patch(recompile_limit=8, optimize_ddp=True, specialize_float=False),
        inductor.patch(layout_optimization=True),
    ):
        yield
    torch._dynamo.reset()


def build(*flags):
    torch.manual_seed(0)
    config = parse_config([*SMALL_MODEL, *flags])
    model, criterion, _ = build_model(config)
    recipe.fill(model)
    return model.train(), criterion, config


def batch(size, count=2):
    """Images that are padded to `size`, and their targets."""
    sizes = [(size[0], size[1] - 16), *[size] * (count - 1)]
    targets = recipe.targets(sizes, [3, 5, 2][:count], num_classes=4)
    return NestedTensor.from_images(recipe.images(sizes)), targets


def step(model, criterion, config, size=SIZES[0], count=2):
    """The loss and the gradients of a training step."""
    images, targets = batch(size, count)
    model.zero_grad()
    torch.manual_seed(1)
    with autocast(config.run.amp, CPU):
        outputs = model(images)
    loss = criterion.total(criterion(outputs, targets))
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


class Counting:
    """A backend that counts the graphs of each region: its kind, and the shapes of its weights."""

    def __init__(self):
        self.graphs = Counter()

    def __call__(self, graph, inputs, **options):
        targets = {str(node.target) for node in graph.graph.nodes}
        kind = "head"
        if any("conv2d" in target for target in targets):
            kind = "block"
        elif any("ms_deform_attn" in target for target in targets):
            attends = any("multi_head" in target or "scaled_dot" in target for target in targets)
            kind = "decoder layer" if attends else "encoder layer"
        shapes = [x.shape for x in inputs if isinstance(x, nn.Parameter)]
        self.graphs[kind, tuple(map(tuple, shapes))] += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@pytest.mark.parametrize(
    "flags",
    [(*BATCHFORMER, "--checkpoint_encoder", "--backbone_norm", "frozen_bn"), (*TWO_STAGE, "--amp", "bf16")],
    ids=" ".join,
)
def test_two_codes_at_most_serve_all_sizes_and_give_the_numbers_of_a_plain_model(flags):
    """With dropout: before Inductor, its random numbers are the same too."""
    plain, *_ = build(*flags)
    model, *rest = build(*flags)
    counting = Counting()
    compile_regions(model, counting)
    exact = {"rtol": 0.02, "atol": 0.02} if "bf16" in flags else {}
    # bfloat16 is slow on many CPUs
    for size in SIZES[::2] if exact else SIZES:
        (loss, gradients), (wanted_loss, wanted) = (step(m, *rest, size) for m in (model, plain))
        torch.testing.assert_close(loss, wanted_loss, **exact)
        assert len(gradients) == len(wanted)
        for gradient, other in zip(gradients, wanted, strict=True):
            assert (gradient - other).norm() <= (0.1 if exact else 1e-3) * other.norm() + 1e-5
    kinds = Counter(kind for kind, _ in counting.graphs)
    assert set(kinds) == {"block", "encoder layer", "decoder layer", "head"}
    assert max(counting.graphs.values()) <= 2, counting.graphs
    assert kinds["block"] == 7, "the two blocks of the first stage are alike"
    assert not counters["graph_break"]


def test_names_and_copies_stay_as_they_are():
    model, *_ = build(*BATCHFORMER)
    names = list(model.state_dict())
    compile_regions(model, "aot_eager")
    assert list(model.state_dict()) == names
    compiled = [m for m in model.modules() if m._compiled_call_impl is not None]
    assert len(compiled) == 8 + 2 + 2 + 2
    averaged = copy.deepcopy(model)
    assert all(m._compiled_call_impl is None for m in averaged.modules())


def test_inductor_gives_the_numbers_and_needs_no_code_for_another_size(monkeypatch):
    """A block of the backbone with its convolutions, and an encoder layer."""
    flags = ("--backbone_norm", "frozen_bn", "--dropout", "0")

    def two(model):
        return {"modules": [model.backbone[0].body.layer3[1], model.transformer.encoder.layers[1]]}

    monkeypatch.setattr(regions, "regions", two)
    plain, *rest = build(*flags)
    model, *_ = build(*flags)
    compile_regions(model)
    # more than 4096 tokens in a batch, as images of the published sizes have
    for size in ((448, 448), (512, 480)):
        (loss, gradients), (wanted_loss, wanted) = (step(m, *rest, size) for m in (model, plain))
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-4, atol=1e-4)
        for gradient, other in zip(gradients, wanted, strict=True):
            assert (gradient - other).norm() <= 1e-3 * other.norm() + 1e-5
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("flags", [(), (*BATCHFORMER, "--eval_bf")], ids=" ".join)
def test_evaluation_gives_the_bits_of_a_model_that_is_not_compiled(flags):
    plain, *_ = build(*flags)
    model, *_ = build(*flags)
    compile_regions(model, "aot_eager")
    images, _ = batch(SIZES[0])
    with torch.no_grad(), eager(model):
        outputs = model.eval()(images)
    with torch.no_grad():
        wanted = plain.eval()(images)
    assert torch.equal(outputs["pred_logits"], wanted["pred_logits"])
    assert torch.equal(outputs["pred_boxes"], wanted["pred_boxes"])
    assert not counters["stats"]["unique_graphs"]


def test_the_search_for_a_wrong_number_sees_into_the_regions():
    model, criterion, _ = build()
    compile_regions(model, "aot_eager")
    seen = []
    model.transformer.encoder.layers[0].norm1.register_forward_hook(lambda *_: seen.append(1))
    training_loss(model, criterion, "off")(*batch(SIZES[0]))
    assert seen == [1]


def test_within_ddp_the_log_names_the_regions_and_every_compilation(tmp_path, caplog):
    wanted_loss, wanted = step(*build())
    caplog.set_level(logging.INFO, "models.regions")
    model, criterion, config = build()
    compile_regions(model, "eager")
    assert "8 blocks of the backbone, 2 encoder layers, 2 decoder layers, 2 heads are compiled" in caplog.text

    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, world_size=1, rank=0)
    try:
        wrapped = data_parallel(model, config, CPU)
        told = []
        # the third step has a batch of one image, which needs code of its own
        for count in (2, 2, 1, 2):
            loss, gradients = step(wrapped, criterion, config, count=count)
            told.append(caplog.text.count("graphs compiled in"))
    finally:
        torch.distributed.destroy_process_group()
    assert told == [0, 1, 1, 2]
    torch.testing.assert_close(loss, wanted_loss)
    for gradient, other in zip(gradients, wanted, strict=True):
        assert (gradient - other).norm() <= 1e-3 * other.norm() + 1e-5


def test_a_limit_is_not_passed_in_silence(caplog, monkeypatch):
    monkeypatch.setattr(regions, "regions", lambda model: {"layers": [*model.transformer.decoder.layers]})
    model, *rest = build()
    compile_regions(model, "eager")
    dynamo = logging.getLogger("torch._dynamo")
    dynamo.addHandler(caplog.handler)
    try:
        # the contents of the first layer are the same for all images, and need code of their own
        with torch._dynamo.config.patch(recompile_limit=1):
            step(model, *rest)
    finally:
        dynamo.removeHandler(caplog.handler)
    assert "recompile_limit" in caplog.text


# ---- runs


def test_runs_with_and_without_it_resume_each_other(tmp_path, monkeypatch, caplog):
    """A compiled run that is resumed is the run that never stopped."""
    monkeypatch.setattr(engine, "compile_regions", partial(compile_regions, backend="eager"))
    monkeypatch.setattr(main, "start_logging", lambda device: None)  # it would take the log from this test
    caplog.set_level(logging.INFO)
    write_coco(tmp_path / "data", num_train=4, num_val=2)
    one_size = ("--train_sizes", "128", "--eval_size", "128", "--max_size", "192", "--augmentation", "flip")
    data = ("--coco_path", str(tmp_path / "data"), "--num_workers", "0")
    common = (*SMALL_MODEL, *BATCHFORMER, *one_size, *data)

    def train(name, epochs, *flags):
        caplog.clear()
        folder = ("--output_dir", str(tmp_path / name), "--resume", "auto")
        main.main(parse_config([*common, *folder, "--epochs", str(epochs), "--ema_decay", "0.5", *flags]))
        assert ("are compiled" in caplog.text) == ("--compile" in flags)
        assert "--compile was" not in caplog.text, "free to change"
        return tmp_path / name

    whole = train("whole", 2, "--compile")
    assert counters["stats"]["unique_graphs"] > 0
    first = train("parts", 1, "--compile")
    shutil.copytree(first, tmp_path / "out")
    assert differences(whole, train("parts", 2, "--compile")) == []
    train("out", 2)
    train("into", 1)
    into = train("into", 2, "--compile")
    assert read_checkpoint(into / "checkpoint.pth")["epoch"] == 1


# ---- what is refused


def test_without_a_compiler_nothing_starts(tmp_path):
    missing = ("--coco_path", str(tmp_path / "no data"))
    done = run_main_forked(*SMALL_MODEL, *missing, "--compile", env={"CXX": "no-such-compiler"})
    assert done.returncode == 2
    wanted = "--compile can't be used on cpu: no compiler is found (no-such-compiler); install GCC, or leave"
    assert wanted in done.stderr


def test_what_a_gpu_needs(monkeypatch):
    monkeypatch.setattr(regions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--compile can't be used on cuda: Triton is not installed"):
        check_compiler(torch.device("cuda"))


def test_deterministic_is_another_promise():
    with pytest.raises(UserError, match="--compile can't be used with --deterministic"):
        parse_config(["--compile", "--deterministic"])

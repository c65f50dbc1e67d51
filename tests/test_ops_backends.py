"""The choice among the operator's implementations, what is said of it, and the modes of PyTorch
that they must serve.
"""

from __future__ import annotations

import logging
import shutil

import pytest
import torch

from models.ops import backends, compiled, reference
from models.ops.functions import ms_deform_attn, ms_deform_attn_fused
from models.ops.modules import MSDeformAttn
from tests.helpers import run

SHAPES = [(6, 4), (3, 2)]
FLAT = [6, 4, 3, 2]
needs_build = pytest.mark.skipif(compiled.missing("cpu") is not None, reason=str(compiled.missing("cpu")))


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    """Every test chooses anew, and leaves the choice as it would be."""
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    for cached in (backends._choose, backends._verify):
        cached.cache_clear()
    yield
    for cached in (backends._choose, backends._verify):
        cached.cache_clear()


def ready(device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(2, 30, 3, 8, generator=generator).to(device, dtype)
    locations = torch.rand(2, 5, 3, 2, 4, 2, generator=generator).to(device)
    weights = torch.rand(2, 5, 3, 2, 4, generator=generator).to(device)
    return value, SHAPES, locations, weights


def raw(device="cpu", dtype=torch.float32):
    value, shapes, locations, weights = ready(device, dtype)
    return value, shapes, locations[:, :, 0, :, 0].contiguous(), 4 * locations - 2, weights


@needs_build
def test_the_best_is_chosen_and_said_once(caplog):
    caplog.set_level(logging.INFO)
    for _ in range(3):
        ms_deform_attn(*ready())
    assert [r.message for r in caplog.records] == ["multi-scale deformable attention on cpu: compiled"]


def test_a_missing_build_is_said_with_its_remedy(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(compiled, "missing", lambda device: "the kernels are not built (how to build)")
    ms_deform_attn(*ready())
    (record,) = caplog.records
    said = (
        "multi-scale deformable attention on cpu: reference; not compiled: the kernels are not "
        "built (how to build)"
    )
    assert record.message == said
    with pytest.raises(RuntimeError, match=r"can't use compiled: the kernels are not built \(how to build\)"):
        ms_deform_attn(*ready(), backend="compiled")


def test_libraries_that_are_not_there_or_stale_are_not_loaded(tmp_path, monkeypatch):
    missing = compiled.missing.__wrapped__
    monkeypatch.setattr(compiled, "FOLDER", tmp_path)
    assert "not built (cd " in missing("cpu")
    assert "no kernels are written for mps" in missing("mps")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "kernel.cpp").write_text("new")
    (tmp_path / "_cpu.so").write_bytes(b"not a library")
    (tmp_path / "_cpu.json").write_text('{"sources": "old"}')
    assert "built from other sources" in missing("cpu")
    (tmp_path / "_cpu.json").write_text(f'{{"sources": "{compiled.hash_of_sources("cpu")}"}}')
    assert "can't be loaded" in missing("cpu")


@needs_build
def test_argument_beats_variable_beats_choice(monkeypatch):
    used = []
    for name, module in (("reference", reference), ("compiled", compiled)):
        monkeypatch.setattr(
            module, "forward", lambda *args, name=name, run=module.forward: used.append(name) or run(*args)
        )
    ms_deform_attn(*ready(), backend="compiled")  # compares itself with the reference first
    used.clear()
    ms_deform_attn(*ready())
    monkeypatch.setenv(backends.VARIABLE, "reference")
    ms_deform_attn(*ready())
    ms_deform_attn(*ready(), backend="compiled")
    assert used == ["compiled", "reference", "compiled"]


@pytest.mark.parametrize("by_variable", [True, False])
def test_unknown_and_unusable_backends_are_refused(by_variable, monkeypatch):
    def ask(name):
        if by_variable:
            monkeypatch.setenv(backends.VARIABLE, name)
        return ms_deform_attn(*ready(), **({} if by_variable else {"backend": name}))

    with pytest.raises(ValueError, match="'cuda': take one of compiled, triton, reference"):
        ask("cuda")
    with pytest.raises(RuntimeError, match="on cpu can't use triton: no kernels for cpu"):
        ask("triton")


@needs_build
@pytest.mark.parametrize("name", ["forward", "backward", "fused_forward", "fused_backward"])
@pytest.mark.parametrize("how", ["does nothing", "fails"])
def test_a_broken_kernel_is_not_used(name, how, monkeypatch):
    """Today's users train for days on kernels that silently did nothing: here the first call ends
    the run, every time.
    """
    run = getattr(compiled, name)

    def broken(*args, **flags):
        if how == "fails":
            raise RuntimeError("no kernel image is available")
        results = run(*args, **flags)
        return (
            torch.zeros_like(results)
            if isinstance(results, torch.Tensor)
            else tuple(map(torch.zeros_like, results))
        )

    monkeypatch.setattr(compiled, name, broken)
    wanted = (
        "computes wrong numbers there"
        if how == "does nothing"
        else "fails there: no kernel image is available"
    )
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=f"on cpu: compiled {wanted}; it was built for .*{backends.VARIABLE}=reference"
        ):
            ms_deform_attn(*ready())
    ms_deform_attn(*ready(), backend="reference")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_registration(backend, needs_grad):
    for operator, inputs in (
        (torch.ops.deformable.ms_deform_attn, ready()),
        (torch.ops.deformable.ms_deform_attn_fused, raw()),
    ):
        tensors = [x.requires_grad_(needs_grad) for x in inputs if isinstance(x, torch.Tensor)]
        torch.library.opcheck(operator, (tensors[0], FLAT, *tensors[1:], backend))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda v, s, r, o, g: (v[0], s, r, o, g), "value must be"),
        (lambda v, s, r, o, g: (v.int(), s, r, o, g), "value must be"),
        (lambda v, s, r, o, g: (v, [(6, 4), (-3, -2)], r, o, g), "spatial_shapes .* negative"),
        (lambda v, s, r, o, g: (v, [(6, 4), (3, 3)], r, o, g), "spatial_shapes .* 33 tokens, value has 30"),
        (lambda v, s, r, o, g: (v, s, r[..., :1], o, g), "reference_points must be .*2 or 4"),
        (lambda v, s, r, o, g: (v, s, r[:, :3], o, g), "reference_points must be .*Q=5"),
        (
            lambda v, s, r, o, g: (v, s, r.long(), o, g),
            "reference_points must be .*floating point; got .*int64",
        ),
        (lambda v, s, r, o, g: (v, s, r, o[:, :, :1], g), "offsets must be .*M=3"),
        (lambda v, s, r, o, g: (v, s, r, o, g[..., :1]), "logits must be"),
        (lambda v, s, r, o, g: (v, s, r, o, g.to("meta")), "logits must be on cpu"),
    ],
)
def test_what_does_not_fit_the_fused_form_is_named(change, named):
    with pytest.raises(ValueError, match=named):
        ms_deform_attn_fused(*change(*raw()))


@needs_build
def test_the_compiled_operators_check_for_themselves():
    """C++ callers see no Python."""
    value, _, locations, weights = ready()
    forward = torch.ops.deformable.compiled_forward
    for args, named in [
        ((value, [6, 4], locations, weights), "shapes hold 24 tokens"),
        ((value, FLAT, locations.transpose(0, 1), weights), "locations must"),
        ((value, FLAT, locations.double(), weights.double()), "locations must be float32"),
        ((value, FLAT, locations, weights.double()), "weights must have the type of locations"),
        ((value.int(), FLAT, locations, weights), "value must be float32"),
    ]:
        with pytest.raises(RuntimeError, match=named):
            forward(*args)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_values_and_spares_locations(dtype, backend):
    value, shapes, locations, weights = (
        x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in ready()
    )
    with torch.autocast("cpu", dtype=dtype):
        out = ms_deform_attn(value, shapes, locations, weights, backend=backend)
    assert out.dtype == dtype
    assert torch.equal(out, ms_deform_attn(value.to(dtype), shapes, locations, weights, backend=backend))
    grads = torch.autograd.grad(out.float().sum(), (value, locations, weights))
    assert all(grad.dtype == torch.float32 for grad in grads)
    with torch.autocast("cpu", dtype=dtype):
        assert (
            ms_deform_attn(value.double(), shapes, locations, weights, backend=backend).dtype == torch.float64
        )


def test_the_layer_in_mixed_precision_keeps_its_reference_points():
    """bfloat16 reference points would be off by 0.65 pixels on a level 167 wide."""
    torch.manual_seed(0)
    layer = MSDeformAttn(32, n_levels=1, n_heads=4, n_points=2)
    shapes, tokens = [(2, 167)], torch.randn(1, 334, 32)
    points = torch.rand(1, 50, 1, 2) * 0.1 + 0.85
    wanted = layer(torch.zeros(1, 50, 32), points, tokens, shapes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = layer(torch.zeros(1, 50, 32), points, tokens, shapes)
        spoiled = layer(torch.zeros(1, 50, 32), points.bfloat16(), tokens, shapes)
    error, error_spoiled = ((x.float() - wanted).abs().mean().item() for x in (seen, spoiled))
    assert error < 0.01
    assert error_spoiled > 5 * error


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_the_layer_compiles_without_a_break(compiler):
    """Forward and backward, for new sizes too, with the numbers of the layer as it is."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = MSDeformAttn(32, n_levels=2, n_heads=4, n_points=2)
    fast = torch.compile(layer, fullgraph=True, backend=compiler)
    for shapes, coordinates in (([(6, 4), (3, 2)], 2), ([(5, 5), (2, 2)], 2), ([(6, 4), (3, 2)], 4)):
        tokens = sum(h * w for h, w in shapes)
        memory = torch.randn(1, tokens, 32, requires_grad=True)
        inputs = (torch.randn(1, 7, 32), torch.rand(1, 7, 2, coordinates), memory, shapes)
        outs = [run(*inputs) for run in (layer, fast)]
        grads = [torch.autograd.grad(out.square().sum(), [memory, *layer.parameters()]) for out in outs]
        torch.testing.assert_close(outs[0], outs[1])
        for one, two in zip(*grads, strict=True):
            torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_a_fork_needs_torch_alone(tmp_path):
    """The folder works under another name and place, with no other package of the project."""
    shutil.copytree(
        compiled.FOLDER, tmp_path / "theirs" / "ops", ignore=shutil.ignore_patterns("build", "csrc")
    )
    code = """if True:
        import sys, torch
        from theirs.ops.modules import MSDeformAttn
        from theirs.ops.functions import MSDeformAttnFunction, ms_deform_attn_core_pytorch
        layer = MSDeformAttn(32, 2, 4, 2)
        shapes, starts = torch.tensor([[6, 4], [3, 2]]), torch.tensor([0, 24])
        query, value = torch.randn(1, 5, 32), torch.randn(1, 30, 32)
        print(layer(query, torch.rand(1, 5, 2, 2), value, shapes, starts).shape)
        foreign = {"torchvision", "pycocotools", "scipy", "PIL", "matplotlib"} & set(sys.modules)
        assert not foreign, foreign
    """
    done = run("python", "-c", code, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 5, 32])" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["compiled", "triton", "reference"])
def test_gpu_serves_its_modes(backend):
    """Deterministic gradients, CUDA graphs, another stream, and no wait for the device."""
    if reason := backends.missing(backend, "cuda"):
        pytest.skip(reason)
    inputs = raw("cuda")

    def step():
        # leaves of their own: autograd keeps the stream on which a leaf was first used
        own = [x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
        out = ms_deform_attn_fused(*own, backend=backend)
        return out.detach(), *torch.autograd.grad(out, [own[0], *own[2:]], torch.ones_like(out))

    torch.use_deterministic_algorithms(True)
    try:
        first, second = step(), step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))

    value, kept = inputs[0], inputs[0].clone()
    value.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(
        torch.cuda.Stream()
    ):  # on another one the values would be read before they are there
        torch.cuda._sleep(100_000_000)
        value.copy_(kept)
        late = step()
    torch.cuda.synchronize()
    torch.testing.assert_close(late[0], first[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    graph.replay()
    torch.cuda.synchronize()
    for one, two in zip(first, recorded, strict=True):
        torch.testing.assert_close(one, two)
    if backend != "reference":
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

"""What the attention of a detector looks at, taken from outside while it runs.

    with recording(detector.model) as seen:
        found = detector("street.jpg")
    seen.decoder[-1].weights[0, found.queries[0]]  # of the best detection, [M, L, P]

The network knows nothing of this: forward hooks compute once more, from a layer's own inputs and
weights, what its kernel does not give out. Shape letters: B images of all streams, N images of a
batch, Q queries, S tokens, M heads, L levels, P points.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.deformable_detr import DeformableDETR
from models.ops.modules import MSDeformAttn
from models.ops.reference import Shapes, locate
from models.token_batch import TokenBatch, valid_ratios


@dataclass(frozen=True)
class SampledAttention:
    """Where the queries of a layer of deformable attention sampled, and the weight of each sample.

    All on the CPU.

    locations: [B, Q, M, L, P, 2] x, y in [0, 1] of every padded level (those outside count as
    zero); weights: [B, Q, M, L, P], which sum to 1 over levels and points; reference_points: [B, Q,
    L, 2] points or [B, Q, L, 4] boxes (centre and size), in [0, 1] of every padded level;
    spatial_shapes: (height, width) of the levels; padding_mask: [B, S] bool, True on padding.
    """

    locations: Tensor
    weights: Tensor
    reference_points: Tensor
    spatial_shapes: Shapes
    padding_mask: Tensor

    @property
    def valid_ratios(self) -> Tensor:
        """[B, L, 2]: width and height of an image's own part of a level over the padded one."""
        return valid_ratios(self.padding_mask, self.spatial_shapes)

    def locations_in_image(self) -> Tensor:
        """The locations in [0, 1] of the image without its padding, [B, Q, M, L, P, 2]."""
        return self.locations / self.valid_ratios[:, None, None, :, None]

    def references_in_image(self) -> Tensor:
        """The reference points in [0, 1] of the image without its padding, [B, Q, L, 2 or 4]."""
        # a box has a size too
        repeats = self.reference_points.shape[-1] // 2
        return self.reference_points / self.valid_ratios.repeat(1, 1, repeats)[:, None]


@dataclass
class Record:
    """What was recorded of one run of the network, on the CPU.

    spatial_shapes: (height, width) of the levels; padding_mask: [N, S] bool, True on padding.
    encoder, decoder: deformable attention of every layer, in order. batch: per layer of
    BatchFormerV2, in the order in which they ran, [S, M, N, N]: how much image i (third axis)
    attends to image j (fourth axis) at every token position; the sum over j is 1.
    """

    spatial_shapes: Shapes = ()
    padding_mask: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.bool))
    encoder: list[SampledAttention] = field(default_factory=list)
    decoder: list[SampledAttention] = field(default_factory=list)
    batch: list[Tensor] = field(default_factory=list)


@contextlib.contextmanager
def recording(model: DeformableDETR, *, deformable: bool = True) -> Iterator[Record]:
    """Record one run of `model` in this block. Its outputs are the same to the bit.

    `deformable`: record deformable attention, too, which of an image of 800 x 1333 is 34 MB in
    every encoder layer.
    """
    record, transformer = Record(), model.transformer

    # the hooks see what goes into a module; the kernel of attention does not give its weights out
    def note_tokens(_: nn.Module, args: tuple[TokenBatch]) -> None:
        record.spatial_shapes, record.padding_mask = args[0].spatial_shapes, args[0].padding_mask.cpu()

    def sampled_into(calls: list[SampledAttention]) -> Callable:
        return lambda module, args, kwargs, _: calls.append(_sampled(module, *args, **kwargs))

    def note_batch(module: nn.MultiheadAttention, args: tuple, kwargs: dict[str, Any], _: Any) -> None:
        record.batch.append(_across_batch(module, *args, **kwargs))

    hooks = [transformer.encoder.register_forward_pre_hook(note_tokens)]

    def watch(root: nn.Module, kind: type[nn.Module], hook: Callable) -> None:
        for module in root.modules():
            if isinstance(module, kind):
                hooks.append(module.register_forward_hook(hook, with_kwargs=True))

    # layers run in the order of their registration, and so do BatchFormerV2's
    if deformable:
        watch(transformer.encoder, MSDeformAttn, sampled_into(record.encoder))
        watch(transformer.decoder, MSDeformAttn, sampled_into(record.decoder))
    if transformer.bf is not None:
        watch(transformer.bf, nn.MultiheadAttention, note_batch)
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def as_in_training(model: DeformableDETR) -> Iterator[None]:
    """A block in which BatchFormerV2 acts as in training, and all else, dropout too, as in evaluation.

    With --bf 1 the outputs are of the plain and the mixed stream, with --bf 7 of the mixed one.
    `model` must be in evaluation mode and have BatchFormerV2's modules (load_detector(...,
    batchformer=True)).
    """
    assert not model.training and model.transformer.bf is not None
    container = model.transformer.bf
    # the flag of this module alone: the modules in it, which have the dropout, stay in evaluation
    container.training = True
    try:
        yield
    finally:
        container.training = False


@torch.no_grad()
def _sampled(
    module: MSDeformAttn,
    query: Tensor,
    reference_points: Tensor,
    input_flatten: Tensor,
    input_spatial_shapes: Shapes,
    input_level_start_index: None = None,
    input_padding_mask: Tensor | None = None,
) -> SampledAttention:
    """As MSDeformAttn.forward and models.ops.reference.fused_forward go about it."""
    kind = reference_points.dtype
    shape = (module.n_heads, module.n_levels, module.n_points, 2)
    offsets = module.sampling_offsets(query).unflatten(-1, shape)
    # the softmax is over all levels and points of a head
    logits = module.attention_weights(query).unflatten(-1, (module.n_heads, -1))
    weights = logits.softmax(-1, dtype=kind).unflatten(-1, (module.n_levels, module.n_points))
    # without a mask nothing is padding
    if input_padding_mask is None:
        input_padding_mask = torch.zeros(input_flatten.shape[:2], dtype=torch.bool)
    return SampledAttention(
        locate(input_spatial_shapes, reference_points, offsets.to(kind)).cpu(),
        weights.cpu(),
        reference_points.cpu(),
        input_spatial_shapes,
        input_padding_mask.cpu(),
    )


@torch.no_grad()
def _across_batch(module: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> Tensor:
    kwargs |= {"need_weights": True, "average_attn_weights": False}
    # forward itself: calling the module would call the hook again
    _, weights = module.forward(*args, **kwargs)
    assert weights is not None
    return weights.float().cpu()

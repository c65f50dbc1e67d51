"""BatchFormerV2 (Hou et al., arXiv 2204.01254): attention across the images of a batch, at every
token position.

All that it does to a batch happens here; nothing else of the detector knows of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.token_batch import TokenBatch

OFF, TWO_STREAMS, ONE_STREAM = 0, 1, 7  # the published values of --bf
_HEADS, _DROPOUT = 4, 0.5
# Token positions that go through a module at a time. They are the batch of its attention, for which
# CUDA takes no larger one; an image of 1330 x 2300 pixels has more.
_MOST_POSITIONS = 65_535


class BatchFormerV2:
    """What happens to the tokens after an encoder layer.

    The modules with the weights are passed in, not owned: the detector registers them under their
    published names.

    Args:
        modules: what `build_modules` made.
        mode: TWO_STREAMS (section 3.3): in training the batch becomes [plain, mixed] at the first
            insertion, and only the mixed half goes through the later ones. ONE_STREAM: in training
            the tokens are replaced.
        insert_idx: encoder layers after which to act.
        in_evaluation: act in evaluation too, on the single stream.
    """

    def __init__(self, modules: nn.Module, mode: int, insert_idx: Sequence[int], in_evaluation: bool) -> None:
        self._modules = modules
        self._mode = mode
        self._insert_idx = frozenset(insert_idx)
        self._in_evaluation = in_evaluation

    def __call__(self, layer: int, batch: TokenBatch) -> TokenBatch:
        """`batch` as it goes on after encoder layer `layer`."""
        training = self._modules.training
        if layer not in self._insert_idx or not (training or self._in_evaluation):
            return batch
        if self._mode == ONE_STREAM or not training:
            return batch.with_tokens(self._mix(layer, batch.tokens))
        if batch.num_streams == 1:
            return batch.doubled(self._mix(layer, batch.tokens))
        plain, mixed = batch.streams()
        return batch.with_streams(plain, self._mix(layer, mixed))

    def _mix(self, layer: int, tokens_BSC: Tensor) -> Tensor:
        """The batch is the sequence and the token positions are the batch: no position term, no
        padding mask.
        """
        module = self._modules[layer] if isinstance(self._modules, nn.ModuleList) else self._modules
        parts = [module(part_BSC) for part_BSC in tokens_BSC.split(_MOST_POSITIONS, dim=1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def build_modules(
    hidden_dim: int, enc_layers: int, insert_idx: Sequence[int], *, shared: bool, num_layers: int
) -> nn.Module:
    """One module for all insertions, or a list with one for each (and nothing at the other layers)."""
    if shared:
        return _build_module(hidden_dim, num_layers)
    return nn.ModuleList(
        _build_module(hidden_dim, num_layers) if i in insert_idx else nn.Identity() for i in range(enc_layers)
    )


def _build_module(hidden_dim: int, num_layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(hidden_dim, _HEADS, dim_feedforward=hidden_dim, dropout=_DROPOUT)
    return layer if num_layers == 1 else nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)

"""BatchFormerV2 (Hou et al., arXiv 2204.01254): attention across the images of a batch.

Each token position is a sequence of its own, whose elements are the images. The module
and the rule when it acts are here. token_batch.py doubles a batch, matcher.py repeats the targets for
both streams, inspection.py computes the attention again for pictures.

Shape letters: B images of all streams, S tokens of all levels, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.dropout import Dropout
from models.token_batch import TokenBatch

OFF, TWO_STREAMS, ONE_STREAM = 0, 1, 7  # the published values of --bf
# as in the published code; there are no flags for them
NUM_HEADS = 4
DROPOUT = 0.5
# Most token positions of one call: they are the batch of its attention, and CUDA takes no larger one.
# An image of 1400 x 2400 pixels has more (about 70,000 on four levels).
MOST_POSITIONS = 65_535


class BatchFormerV2:
    """What happens to the tokens after an encoder layer.

    It does not own the modules with the weights: the detector registers them under their published
    names.

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
        """The batch for the encoder layer after `layer`."""
        training = self._modules.training
        if layer not in self._insert_idx or not (training or self._in_evaluation):
            return batch

        # one stream: the tokens are replaced
        if self._mode == ONE_STREAM or not training:
            return batch.with_tokens(self._mix(layer, batch.tokens))

        # two streams: the first insertion makes them, later ones change the mixed half
        if batch.num_streams == 1:
            return batch.doubled(self._mix(layer, batch.tokens))
        plain, mixed = batch.streams()
        return batch.with_streams(plain, self._mix(layer, mixed))

    def _mix(self, layer: int, tokens_BSC: Tensor) -> Tensor:
        """[B, S, C] -> [B, S, C]: the B images are the sequence, the S positions its batch."""
        module = self._modules
        if isinstance(module, nn.ModuleList):
            module = module[layer]
        # without a position term and a padding mask, as published
        mixed = [module(some_BSC) for some_BSC in tokens_BSC.split(MOST_POSITIONS, dim=1)]
        # torch.cat would copy a single tensor.
        if len(mixed) == 1:
            return mixed[0]
        return torch.cat(mixed, 1)


def build_modules(
    hidden_dim: int, enc_layers: int, insert_idx: Sequence[int], *, shared: bool, num_layers: int
) -> nn.Module:
    """One module for all insertions, or a list with one for each of them."""
    if shared:
        return _build_module(hidden_dim, num_layers)
    modules = nn.ModuleList()
    for i in range(enc_layers):
        if i in insert_idx:
            modules.append(_build_module(hidden_dim, num_layers))
        else:  # the published names count the encoder's layers
            modules.append(nn.Identity())
    return modules


def _build_module(hidden_dim: int, num_layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(hidden_dim, NUM_HEADS, dim_feedforward=hidden_dim, dropout=DROPOUT)
    for name in ("dropout", "dropout1", "dropout2"):
        setattr(layer, name, Dropout(DROPOUT))
    # Published checkpoints of one layer have no `layers.0.` in their names.
    if num_layers == 1:
        return layer
    return nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)

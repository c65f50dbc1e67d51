"""BatchFormerV2 (Hou et al., arXiv 2204.01254): attention across the images of a batch.

Each token position is a sequence of its own, whose elements are the images. The module, its controls
and the rule when it acts are here. token_batch.py doubles a batch, matcher.py repeats the targets for
both streams, inspection.py computes the attention again for pictures.

Shape letters: B images of all streams, N images of all processes, S tokens of all levels, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.dropout import Dropout
from models.token_batch import TokenBatch
from util.distributed.exchange import exchanges, images_of_positions, positions_of_images

OFF, TWO_STREAMS, ONE_STREAM = 0, 1, 7  # the published values of --bf
NO_CONTROL, IDENTITY, COPIES = "none", "identity", "copies"
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
        control: COPIES replaces the other images by copies of the image itself. The module then has
            its weights and its dropout, but nothing to learn from other images. NO_CONTROL and
            IDENTITY change nothing here.
        mask_padding: padding neither attends nor is attended to, and is not changed. A position
            where no other image has content is not changed either. Not published.
        across_processes: in training relate the images of all processes. Every process must have
            as many images as the others, of one padded size. Not published.
    """

    def __init__(
        self,
        modules: nn.Module,
        mode: int,
        insert_idx: Sequence[int],
        in_evaluation: bool,
        *,
        control: str = NO_CONTROL,
        mask_padding: bool = False,
        across_processes: bool = False,
    ) -> None:
        self._modules = modules
        self._mode = mode
        self._insert_idx = frozenset(insert_idx)
        self._in_evaluation = in_evaluation
        self._control = control
        self._mask_padding = mask_padding
        self.across_processes = across_processes

    def __call__(self, layer: int, batch: TokenBatch) -> TokenBatch:
        """The batch for the encoder layer after `layer`."""
        training = self._modules.training
        if layer not in self._insert_idx or not (training or self._in_evaluation):
            return batch
        padding_BS = batch.padding_mask if self._mask_padding else None

        # one stream: the tokens are replaced
        if self._mode == ONE_STREAM or not training:
            return batch.with_tokens(self._mix(layer, batch.tokens, padding_BS))

        # two streams: the first insertion makes them, later ones change the mixed half
        if batch.num_streams == 1:
            return batch.doubled(self._mix(layer, batch.tokens, padding_BS))
        plain, mixed = batch.streams()
        if padding_BS is not None:
            padding_BS = padding_BS[len(plain) :]
        return batch.with_streams(plain, self._mix(layer, mixed, padding_BS))

    def _mix(self, layer: int, tokens_BSC: Tensor, padding_BS: Tensor | None) -> Tensor:
        """[B, S, C] -> [B, S, C]."""
        module = self._modules
        if isinstance(module, nn.ModuleList):
            module = module[layer]
        # each image among copies of itself
        if self._control == COPIES:
            own = [image.expand_as(tokens_BSC) for image in tokens_BSC.split(1)]
            return torch.cat([_relate(module, copies, None)[:1] for copies in own])
        # the images of all processes: each process takes a share of the positions
        if self.across_processes and module.training and exchanges():
            padding_NS = None if padding_BS is None else positions_of_images(padding_BS)
            related_NSC = _relate(module, positions_of_images(tokens_BSC), padding_NS)
            return images_of_positions(related_NSC, tokens_BSC.shape[1])
        return _relate(module, tokens_BSC, padding_BS)


def _relate(module: nn.Module, tokens_BSC: Tensor, padding_BS: Tensor | None) -> Tensor:
    """[B, S, C] -> [B, S, C]: the B images are the sequence, the S positions its batch.

    Without a position term and, as published, without a padding mask if `padding_BS` is None.
    """
    if padding_BS is None:
        mixed = [module(some_BSC) for some_BSC in tokens_BSC.split(MOST_POSITIONS, dim=1)]
    else:
        # where there is nothing to relate the result is not used, and a mask of everything gives NaN
        alone_S = (~padding_BS).sum(0) < 2
        mask_SB = (padding_BS & ~alone_S).t()
        pairs = zip(tokens_BSC.split(MOST_POSITIONS, 1), mask_SB.split(MOST_POSITIONS), strict=True)
        mixed = [module(some_BSC, src_key_padding_mask=mask) for some_BSC, mask in pairs]
    # torch.cat would copy a single tensor.
    related_BSC = mixed[0] if len(mixed) == 1 else torch.cat(mixed, 1)
    if padding_BS is None:
        return related_BSC
    return torch.where((padding_BS | alone_S)[..., None], tokens_BSC, related_BSC)


def build_modules(
    hidden_dim: int,
    enc_layers: int,
    insert_idx: Sequence[int],
    *,
    shared: bool,
    num_layers: int,
    num_heads: int,
    dropout: float,
    control: str,
) -> nn.Module:
    """One module for all insertions, or a list with one for each of them.

    The global random generator stays as it is: all other weights begin as without BatchFormerV2.
    """
    if control == IDENTITY:
        return nn.Identity()
    with torch.random.fork_rng(devices=[]):
        if shared:
            return _build_module(hidden_dim, num_layers, num_heads, dropout)
        modules = nn.ModuleList()
        for i in range(enc_layers):
            if i in insert_idx:
                modules.append(_build_module(hidden_dim, num_layers, num_heads, dropout))
            else:  # the published names count the encoder's layers
                modules.append(nn.Identity())
        return modules


def _build_module(hidden_dim: int, num_layers: int, num_heads: int, dropout: float) -> nn.Module:
    layer = nn.TransformerEncoderLayer(hidden_dim, num_heads, dim_feedforward=hidden_dim, dropout=dropout)
    for name in ("dropout", "dropout1", "dropout2"):
        setattr(layer, name, Dropout(dropout))
    # Published checkpoints of one layer have no `layers.0.` in their names.
    module: nn.Module = layer
    if num_layers > 1:
        module = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    return module

"""The deformable encoder ("Deformable DETR", section 4.2).

Shape letters: B images, S tokens of all levels, L levels, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from models.dropout import Dropout, ReLUDropout
from models.ops.linear import TokenLinear
from models.ops.modules import MSDeformAttn
from models.token_batch import TokenBatch


class DeformableTransformerEncoderLayer(nn.Module):
    """Deformable self-attention and feed-forward, each followed by its norm."""

    def __init__(
        self,
        d_model: int,
        d_ffn: int,
        dropout: float,
        drop_path: float,
        n_levels: int,
        n_heads: int,
        n_points: int,
    ) -> None:
        super().__init__()
        # TokenLinear: there are many more tokens than queries
        self.self_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        self.dropout1 = Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.linear1 = TokenLinear(d_model, d_ffn)
        self.dropout2 = ReLUDropout(dropout)
        self.linear2 = TokenLinear(d_ffn, d_model)
        self.dropout3 = Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, batch: TokenBatch) -> TokenBatch:
        """The batch with the tokens [B, S, C] of the next layer."""
        x = batch.tokens
        # the position is added to queries, not to values
        attended = self.self_attn(
            x + batch.position,
            batch.reference_points,
            x,
            batch.spatial_shapes,
            input_padding_mask=batch.padding_mask,
        )
        x = self.norm1(x + self.drop_path(self.dropout1(attended)))
        hidden = self.linear2(self.dropout2(self.linear1(x)))
        x = self.norm2(x + self.drop_path(self.dropout3(hidden)))
        return batch.with_tokens(x)


class DeformableTransformerEncoder(nn.Module):
    """Layers over one batch of tokens, with a function between them.

    Args:
        layers: the encoder layers.
        after_layer: called as `batch = after_layer(i, batch)` after layer i: BatchFormerV2.
        recompute: in training keep only the tokens between the layers. The backward computes the
            other activations again, to the same bits ("Training deep nets with sublinear memory
            cost", arXiv 1604.06174).
    """

    def __init__(
        self,
        layers: list[DeformableTransformerEncoderLayer],
        after_layer: Callable[[int, TokenBatch], TokenBatch],
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.after_layer = after_layer
        self.recompute = recompute

    def forward(self, batch: TokenBatch) -> TokenBatch:
        run = self._run
        if self.recompute and self.training and torch.is_grad_enabled():
            run = self._run_and_forget
        for i in range(len(self.layers)):
            batch = run(i, batch)
        return batch

    def _run(self, i: int, batch: TokenBatch) -> TokenBatch:
        return self.after_layer(i, self.layers[i](batch))

    def _run_and_forget(self, i: int, batch: TokenBatch) -> TokenBatch:
        def run(tokens: Tensor) -> TokenBatch:
            return self._run(i, batch.with_tokens(tokens))

        # PyTorch restores the random state of the devices of its tensor arguments, and sees none in
        # a `batch`
        return checkpoint(run, batch.tokens, use_reentrant=False)


def drop_path_rates(drop_path: float, num_layers: int) -> list[float]:
    """Rates that grow linearly from 0 ("Deep networks with stochastic depth", eq. 4)."""
    return [drop_path * i / max(num_layers - 1, 1) for i in range(num_layers)]

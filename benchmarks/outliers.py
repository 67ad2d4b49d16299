"""Outliers of known size in a PixArt transformer, without changing what it computes.

A channel is scaled up where it is produced and down where it is consumed:

    modulation   (1 + scale) * LN(x) + shift  ->  columns of attn1.to_q/k/v and ff.net.0
    values       rows of to_v                 ->  columns of to_out, in both attentions
    caption      rows of caption_projection   ->  columns of attn2.to_k/v

Factors are powers of two, so that weights stay exact in bf16 and only the modulation tables round
anew.  Two inputs cannot carry any: attn2.to_q reads the residual stream, which norms read too, and
no scale passes the GELU in front of ff.net.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OutlierVariant:
    """factors: power of two -> share of the channels of each input that get it."""

    name: str
    factors: tuple[tuple[float, float], ...]


VARIANTS = {
    variant.name: variant
    for variant in (
        # LRQ-DiT: mild outliers reach about 5, salient ones up to 245, in few fixed channels.
        OutlierVariant("mild", ((4.0, 0.04), (8.0, 0.01))),
        OutlierVariant("salient", ((4.0, 0.04), (64.0, 0.004), (256.0, 0.004))),
    )
}


def channel_factors(variant: OutlierVariant, channels: int, generator: torch.Generator) -> Tensor:
    """fp32 [channels], 1 but for a few; every factor is given to one channel at least."""
    factors = torch.ones(channels)
    order = torch.randperm(channels, generator=generator)
    used = 0
    for factor, share in variant.factors:
        count = max(1, round(share * channels))
        factors[order[used : used + count]] = factor
        used += count
    return factors


@torch.no_grad()
def inject_outliers(transformer: nn.Module, variant: OutlierVariant, seed: int = 0) -> None:
    """Change a PixArtTransformer2DModel in place; the same channels in all blocks."""
    generator = torch.Generator().manual_seed(seed)
    blocks = transformer.transformer_blocks
    width = blocks[0].attn1.to_q.in_features
    device = blocks[0].attn1.to_q.weight.device

    def draw(channels: int) -> Tensor:
        return channel_factors(variant, channels, generator).to(device)

    # Rows of the shared modulation: shift, scale, gate of attention, then of the feed-forward.
    attention, feed_forward = draw(width), draw(width)
    one = torch.ones_like(attention)
    rows = torch.cat([attention, attention, one, feed_forward, feed_forward, one])
    _scale_rows(transformer.adaln_single.linear, rows)
    for block in blocks:
        table = block.scale_shift_table  # [6, width], the scale rows stand for 1 + scale
        offset = torch.zeros_like(rows).view(6, -1)
        offset[1], offset[4] = 1.0, 1.0
        scaled = (table.float() + offset) * rows.view(6, -1) - offset
        table.copy_(scaled.to(table.dtype))
        for linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
            _scale_columns(linear, 1 / attention)
        _scale_columns(block.ff.net[0].proj, 1 / feed_forward)
    for name in ("attn1", "attn2"):
        values = draw(getattr(blocks[0], name).to_v.out_features)
        for block in blocks:
            _scale_rows(getattr(block, name).to_v, values)
            _scale_columns(getattr(block, name).to_out[0], 1 / values)
    caption = draw(transformer.caption_projection.linear_2.out_features)
    _scale_rows(transformer.caption_projection.linear_2, caption)
    for block in blocks:
        for linear in (block.attn2.to_k, block.attn2.to_v):
            _scale_columns(linear, 1 / caption)


def _scale_rows(linear: nn.Linear, factors: Tensor) -> None:
    linear.weight.mul_(factors[:, None].to(linear.weight.dtype))
    if linear.bias is not None:
        linear.bias.mul_(factors.to(linear.bias.dtype))


def _scale_columns(linear: nn.Linear, factors: Tensor) -> None:
    linear.weight.mul_(factors.to(linear.weight.dtype))

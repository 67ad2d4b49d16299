"""Weight quantizers.  Bits count codes, scales (16 bits), zero points and codebooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.baselines.method import FLOAT_BITS, QuantizedWeight, WeightContext
from lrq_quant.error_feedback import codebook_nearest
from lrq_quant.twin_log import fit_twin_log, lost_gain

_TINY = 1e-12


@dataclass(frozen=True)
class Grid:
    """Affine grid of every group: value = (q - zero) * step, low <= q <= high.

    step, zero fp32 [N, G]; a group is `size` neighbouring columns.
    """

    step: Tensor
    zero: Tensor
    low: int
    high: int
    size: int

    def round(self, values: Tensor, group: int) -> Tensor:
        """Nearest value of fp32 [N, J], all in one group."""
        step, zero = self.step[:, group, None], self.zero[:, group, None]
        return ((values / step + zero).round().clamp(self.low, self.high) - zero) * step

    def round_all(self, weight: Tensor) -> Tensor:
        parts = weight.unflatten(1, (-1, self.size))
        step, zero = self.step[..., None], self.zero[..., None]
        codes = (parts / step + zero).round().clamp(self.low, self.high)
        return ((codes - zero) * step).flatten(1)

    def nearest(self, values: Tensor, column: int) -> Tensor:
        return self.round(values[:, None], column // self.size)[:, 0]


@dataclass(frozen=True)
class Uniform:
    """Uniform codes per row or per group of columns.

    clip: a fixed share of the range; "mse" for the share of least squared error among 100 % ...
    30 %; "weighted" for that of the error weighted by E[x_k^2].  feedback rounds by GPTQ
    (act-order, damping 0.01) on the grid of the original weights.
    """

    symmetric: bool = False
    clip: float | str = 1.0
    group: int | None = None
    feedback: bool = False

    def __call__(self, weight: Tensor, bits: int, context: WeightContext) -> QuantizedWeight:
        size = group_size(weight, self.group)
        importance = context.importance if self.clip == "weighted" else torch.ones(1)
        importance = importance.to(weight).expand(weight.shape[1]).view(-1, size)
        grid = self._grid(weight.unflatten(1, (-1, size)), bits, importance)
        if self.feedback:
            values = context.feedback.round(weight, grid.nearest)
        else:
            values = grid.round_all(weight)
        overhead = grid.step.numel() * (FLOAT_BITS + (0 if self.symmetric else bits))
        return QuantizedWeight(values, weight.numel() * bits + overhead)

    def _grid(self, parts: Tensor, bits: int, importance: Tensor) -> Grid:
        """parts [N, G, size], importance [G, size]."""
        size = parts.shape[-1]
        if not isinstance(self.clip, str):
            return self._clipped(parts, bits, size, parts.new_full(parts.shape[:2], self.clip))
        best_clip = parts.new_ones(parts.shape[:2])
        best = parts.new_full(parts.shape[:2], torch.inf)
        for share in torch.linspace(1.0, 0.3, 36).tolist():
            clip = torch.full_like(best_clip, share)
            rounded = self._clipped(parts, bits, size, clip).round_all(parts.flatten(1))
            error = ((rounded.view_as(parts) - parts).square() * importance).sum(-1)
            best_clip = torch.where(error < best, clip, best_clip)
            best = torch.minimum(best, error)
        return self._clipped(parts, bits, size, best_clip)

    def _clipped(self, parts: Tensor, bits: int, size: int, clip: Tensor) -> Grid:
        if self.symmetric:
            high = 2 ** (bits - 1) - 1
            step = (parts.abs().amax(-1) * clip / high).clamp_min(_TINY)
            return Grid(step, torch.zeros_like(step), -high - 1, high, size)
        low = parts.amin(-1).clamp_max(0) * clip
        top = parts.amax(-1).clamp_min(0) * clip
        step = ((top - low) / (2**bits - 1)).clamp_min(_TINY)
        return Grid(step, (-low / step).round(), 0, 2**bits - 1, size)


@dataclass(frozen=True)
class NormalFloat:
    """NF4 of QLoRA (arXiv 2305.14314) and its like at other widths: quantiles of the normal
    distribution with an exact zero and one more level above it than below, times the absmax of the
    group."""

    group: int = 64

    def __call__(self, weight: Tensor, bits: int, context: WeightContext) -> QuantizedWeight:
        size = group_size(weight, self.group)
        parts = weight.unflatten(1, (-1, size))
        scale = parts.abs().amax(-1, keepdim=True).clamp_min(_TINY)
        levels = normal_float_levels(bits).to(weight)
        boundaries = (levels[1:] + levels[:-1]) / 2
        values = levels[torch.searchsorted(boundaries, (parts / scale).contiguous())] * scale
        bits_stored = weight.numel() * bits + scale.numel() * FLOAT_BITS
        return QuantizedWeight(values.flatten(1), bits_stored)


def normal_float_levels(bits: int) -> Tensor:
    """Ascending fp32 [2^b]; the values of bitsandbytes' NF4 at 4 bits."""
    half = 2 ** (bits - 1)
    normal = torch.distributions.Normal(0.0, 1.0)
    # The outermost quantile is half-way between those of 2^b and of 2^b - 1 equal masses.
    edge = 1 - 0.5 * (1 / (2 * half) + 1 / (2 * half - 1)) / 2
    positive = normal.icdf(torch.linspace(edge, 0.5, half + 1)[:-1])
    negative = -normal.icdf(torch.linspace(edge, 0.5, half)[:-1])
    levels = torch.cat([negative, torch.zeros(1), positive.flip(0)])
    return levels / levels.max()


@dataclass(frozen=True)
class TwinLog:
    """This package's codebook, for ablations: 2^b int8 levels and one fp32 scale a row.

    importance weighs the fit.  target: rounded with error feedback over the quantized input is the
    weight that this package rounds ("own"), or one so far on the way to that which makes the best
    of the input; None rounds each weight to its nearest level.  full_gain: rows then get the scale
    with which their products lose nothing.
    """

    importance: bool = True
    target: Literal["own"] | float | None = None
    full_gain: bool = True

    def __call__(self, weight: Tensor, bits: int, context: WeightContext) -> QuantizedWeight:
        if bits > 4:
            raise ValueError(f"TwinLog: bits must be 2, 3 or 4, got {bits}")
        stored = weight.numel() * bits + weight.shape[0] * (8 * 2**bits + 32)
        if self.target is None:
            importance = context.importance if self.importance else None
            codebook = fit_twin_log(weight, bits, importance=importance)
            values = codebook.decode(codebook.encode(weight))
            if self.full_gain:
                values = values * lost_gain(weight, values, importance)[:, None]
            return QuantizedWeight(values, stored)
        known = context.quantized_input
        if self.target == "own":
            target = known.target(weight, context.source.setting.act_bits)
        else:
            target = torch.lerp(weight.float(), known.least_squares(weight), self.target)
        codebook = fit_twin_log(target, bits, importance=known.importance)
        values = known.round(target, codebook_nearest(codebook))
        if self.full_gain:
            values = values * known.lost_gain(weight, values)[:, None]
        return QuantizedWeight(values, stored)


@dataclass(frozen=True)
class PureLog:
    """LRQ-DiT as its equations 1-7 say (no eta): log2 of the magnitudes, each sign of a row on its
    own uniform grid of 2^(b-1) steps, upper ends shrunk by alpha and beta of least squared error
    over the whole tensor.  Zero takes the smallest magnitude, as b bits have no room for it."""

    shrinks: Sequence[float] = tuple(1.0 - 0.05 * i for i in range(13))

    def __call__(self, weight: Tensor, bits: int, context: WeightContext) -> QuantizedWeight:
        values = torch.zeros_like(weight)
        for sign in (1.0, -1.0):
            inside = (weight * sign > 0) | ((weight == 0) & (sign > 0))
            candidates = [self._half(weight.abs(), inside, bits, share) for share in self.shrinks]
            errors = [((c - weight.abs()) * inside).square().sum() for c in candidates]
            best = min(range(len(errors)), key=lambda i: float(errors[i]))
            values = torch.where(inside, sign * candidates[best], values)
        stored = weight.numel() * bits + weight.shape[0] * 4 * FLOAT_BITS
        return QuantizedWeight(values, stored)

    def _half(self, magnitude: Tensor, inside: Tensor, bits: int, share: float) -> Tensor:
        """Magnitudes on the grid of the entries inside, its upper end at `share` of the largest."""
        logs = magnitude.clamp_min(_TINY).log2()
        seen = inside & (magnitude > 0)
        low = torch.where(seen, logs, torch.inf).amin(1, keepdim=True)
        high = torch.where(seen, logs, -torch.inf).amax(1, keepdim=True)
        empty = ~torch.isfinite(low)
        low, high = low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)
        high = torch.maximum(high + torch.log2(torch.tensor(share)), low)
        step = ((high - low) / (2 ** (bits - 1) - 1)).clamp_min(1e-6)
        zero = (low / step).round()
        code = ((logs / step).round() - zero).clamp(0, 2 ** (bits - 1) - 1)
        return torch.exp2((code + zero) * step)


def group_size(weight: Tensor, group: int | None) -> int:
    """Columns in a group: all, or `group`, which must divide K."""
    columns = weight.shape[1]
    if group is None:
        return columns
    if columns % group:
        raise ValueError(f"group of {group} must divide K = {columns}")
    return group

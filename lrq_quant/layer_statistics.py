"""Statistics of one layer that its report keeps, of a fixed size whatever the layer's: they are
taken while it is quantized, since neither the weight nor its input is there afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrq_kernels.checkpoint import LinearState
from lrq_kernels.codebook import levels_of_rows

from .calibration import ActivationStats

BINS = 64
# Levels are int8; what a row holds beyond them is clipped and counted in the outermost bins.
RANGE = 192.0
_SAMPLED_WEIGHTS = 1 << 20
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class WeightHistogram:
    """Smoothed and rotated weights over the scale of their row, so in units of the int8 levels.

    counts [64]: weights in equal bins over [low, high), the outermost ones also holding what lies
    beyond; levels, levels_low, levels_high [2^b]: ascending levels of the rows, their median, first
    and third quartile over all rows, each the level of some row.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    levels: tuple[int, ...]
    levels_low: tuple[int, ...]
    levels_high: tuple[int, ...]

    @property
    def weights(self) -> int:
        """Weights that were counted."""
        return sum(self.counts)

    @staticmethod
    def of(rotated: Tensor, state: LinearState) -> WeightHistogram:
        """rotated: fp32 [N, K], what `state` stores codes of.  Of a large weight rows spread over
        all of it are counted, about a million weights."""
        rows = max(1, min(rotated.shape[0], _SAMPLED_WEIGHTS // max(1, rotated.shape[1])))
        index = torch.arange(rows, device=rotated.device) * rotated.shape[0] // rows
        scale = state.weight_scale.to(rotated.device)[index, None]
        # A row of zeros has scale zero.
        units = rotated[index] / torch.where(scale > 0, scale, 1.0)
        bins = ((units + RANGE) * (BINS / (2 * RANGE))).floor_().clamp_(0, BINS - 1)
        counts = torch.bincount(bins.flatten().to(torch.int64), minlength=BINS)
        levels = levels_of_rows(state.levels, state.table_of_row)
        ascending = levels.sort(dim=1).values.sort(dim=0).values
        last = ascending.shape[0] - 1
        low, middle, high = (
            tuple(ascending[place].tolist()) for place in (last // 4, last // 2, last - last // 4)
        )
        return WeightHistogram(-RANGE, RANGE, tuple(counts.tolist()), middle, low, high)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> WeightHistogram:
        """Inverse of dataclasses.asdict, lists for tuples."""
        return WeightHistogram(**{key: _tuple(value) for key, value in values.items()})


@dataclass(frozen=True)
class ChannelSpread:
    """How the K channels of a raw input differ: least, first quartile, median, third quartile and
    greatest over the channels of max |x| and of RMS, each over all tokens of calibration."""

    absmax: tuple[float, ...]
    rms: tuple[float, ...]

    @staticmethod
    def of(stats: ActivationStats) -> ChannelSpread:
        return ChannelSpread(_spread(stats.absmax), _spread(stats.rms))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ChannelSpread:
        return ChannelSpread(**{key: _tuple(value) for key, value in values.items()})


def _spread(channels: Tensor) -> tuple[float, ...]:
    # On the CPU, so that a report does not depend on the device that interpolates.
    wide = channels.detach().double().cpu()
    return tuple(wide.quantile(torch.tensor(_QUANTILES, dtype=torch.float64)).tolist())


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) else value

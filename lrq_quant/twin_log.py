"""Twin-log codebooks: 2^b int8 levels and one fp32 scale per output row.

The family is ``level_m = 2^(lo + m*delta) - eta`` for the magnitudes m = 0 .. L-1 of each sign
half, L = 2^(b-1), with eta relative to the row's RMS (LRQ-DiT eqs 1-7, and the eta of its code).
It is searched in the equivalent form

    level_m = first + (last - first) * (r^m - 1) / (r^(L-1) - 1),     r = 2^delta >= 1,

whose three numbers are well scaled for every eta: r -> 1 is the uniform grid (eta -> infinity) and
first = 2^lo - eta.  The two halves of a row are always fitted on their own entries.

Everything rests on one device: rows are sorted once and prefix sums taken, so the squared error of
any codebook costs one binary search per level boundary, independent of the row's length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lrq_kernels.codebook import TwinLogCodebook
from lrq_kernels.scheme import check_weight_bits

# Starting points (first, last, r) by the number of magnitudes, first and last in RMS units of
# the half: near the optimum of Gaussian, Laplace, uniform, heavier-tailed and narrow halves.
_STARTS = {
    2: ((0.5, 1.6, 1.2), (0.4, 2.2, 1.2), (0.8, 1.2, 1.2), (0.1, 6.0, 1.2)),
    4: ((0.24, 2.13, 1.28), (0.2, 2.8, 1.7), (0.3, 1.7, 1.05), (0.15, 4.5, 2.4), (0.6, 1.4, 1.05)),
    8: ((0.14, 2.73, 1.16), (0.1, 4.2, 1.35), (0.1, 1.8, 1.02), (0.08, 7.0, 1.7), (0.6, 1.4, 1.02)),
}
# Last level at the largest entry: starts for rows with a few huge outliers.
_OUTLIER_RATIOS = {2: (20.0, 200.0), 4: (2.5, 8.0), 8: (1.6, 2.5)}
_FIRST_STEP, _STEP_DECAY = 0.2, 0.62
_UNIFORM_RHO = 1e-3  # rho of a grid that is uniform to 0.4 %; zero would divide by zero
_TINY = 1e-30
_LEAST_IMPORTANCE = 1e-3
# Levels are rounded to int8 with the largest one at 127 (128) divided by one of these.
_INT8_STRETCH = tuple(1.0 + 0.0125 * i for i in range(9))
# Weights handled at once: bounds the fp64 working set (about 80 bytes a weight).
_CHUNK_WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 24}

PAPER_ETAS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
PAPER_QUANTILES = (0.98, 0.99, 0.999, 0.9999, 0.99999)


def fit_twin_log(
    weight: Tensor,
    bits: int,
    *,
    importance: Tensor | None = None,
    rounds: int = 7,
) -> TwinLogCodebook:
    """Fit a twin-log codebook to every row of ``weight`` (method.md 1.4, decision 1).

    weight [N, K] floating, finite; bits in {2, 3, 4}; importance [K] >= 0 weighs the squared error
    of each column (E[x_k^2] of the layer's input), [N, K] that of each row's own; rounds of the
    coordinate search, 0 for a quick fit from the starting points alone.  Returns int8 levels
    [N, 2^bits] in canonical code order and fp32 scales [N], on the weight's device.  Raises
    ValueError or TypeError on anything else.
    """
    check_weight("fit_twin_log", weight, bits, importance)
    levels, scales = [], []
    size = chunk_rows(weight)
    for start in range(0, weight.shape[0], size):
        rows = slice(start, start + size)
        known = importance
        if known is not None and known.dim() == 2:
            known = known[rows]
        problem = SortedRows.of(weight[rows], relative_importance(known, weight.device))
        magnitudes = _search_magnitudes(problem, bits, rounds)
        stretches = _INT8_STRETCH if rounds else _INT8_STRETCH[:1]
        chunk_levels, chunk_scale = _round_levels(problem, magnitudes, stretches)
        levels.append(chunk_levels)
        scales.append(chunk_scale)
    return _codebook(levels, scales)


def fit_twin_log_paper(weight: Tensor, bits: int) -> TwinLogCodebook:
    """The published grid search with its faults T1-T4 fixed (method.md 1.2-1.3).

    One absolute eta and one pair of clipping quantiles for the whole tensor, chosen among
    13 x 5 x 5 by plain squared error; per row and sign, delta = (hi - lo) / (L - 1) over the sign's
    own log2(|w| + eta) (T1, T2), z = round(lo / delta), L magnitudes for both signs (T3), zero
    coded as the smallest magnitude (T4).  Codes are the nearest level, as the format stores them,
    and levels are rounded to int8 like those of fit_twin_log.  Arguments and result as there.
    """
    check_weight("fit_twin_log_paper", weight, bits)
    chunks = weight.split(chunk_rows(weight))
    errors = torch.zeros(len(PAPER_ETAS), len(PAPER_QUANTILES), 2, dtype=torch.float64)
    for rows in chunks:
        problem = SortedRows.of(rows, None, normalize=False)
        for i, eta in enumerate(PAPER_ETAS):
            for j, quantile in enumerate(PAPER_QUANTILES):
                magnitudes = _paper_magnitudes(problem, bits, eta, quantile, quantile)
                errors[i, j] += problem.half_errors(magnitudes).sum(0).cpu()
    # The halves are independent given eta, so 13 x (5 + 5) errors decide among 13 x 5 x 5 choices.
    best_per_eta, best_quantile = errors.min(dim=1)
    eta_index = int(best_per_eta.sum(-1).argmin())
    negative, positive = (PAPER_QUANTILES[int(q)] for q in best_quantile[eta_index])
    levels, scales = [], []
    for rows in chunks:
        problem = SortedRows.of(rows, None, normalize=False)
        magnitudes = _paper_magnitudes(problem, bits, PAPER_ETAS[eta_index], negative, positive)
        chunk_levels, chunk_scale = _round_levels(problem, magnitudes)
        levels.append(chunk_levels)
        scales.append(chunk_scale)
    return _codebook(levels, scales)


def lost_gain(weight: Tensor, decoded: Tensor, importance: Tensor | None = None) -> Tensor:
    """Factor fp32 [N] on each row of `decoded` [N, K] with which its product with an input holds
    that of `weight` in full, for channels that are independent with second moments `importance`
    [K]: sum(i w^2) / sum(i w w^); 1 where that is not a positive number.

    Levels of least squared error are means of what they stand for, and products of means are too
    small: by the share of the error, 1 % at 4 bits, 3.5 % at 3, 12 % at 2, in every layer alike.
    """
    factors = []
    size = chunk_rows(weight)
    for rows, approximate in zip(weight.split(size), decoded.split(size), strict=True):
        exact = rows.double() if importance is None else rows.double() * importance.double()
        factors.append((exact * rows).sum(1) / (exact * approximate).sum(1))
    return sensible_gain(torch.cat(factors))


def sensible_gain(factor: Tensor) -> Tensor:
    """factor, of any shape, as fp32; 1 where it is not a positive number."""
    sensible = torch.isfinite(factor) & (factor > 0)
    return torch.where(sensible, factor, torch.ones_like(factor)).float()


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """10 log10(sum reference^2 / sum (reference - approximation)^2); inf when they are equal."""
    signal = reference.double().square().sum()
    noise = (reference.double() - approximation.double()).square().sum()
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(signal / noise))


@dataclass(frozen=True)
class SortedRows:
    """Rows sorted ascending with prefix sums; halves are indexed 0 = negative, 1 = the other.

    values fp32 [R, K]; count, total fp64 [R, K + 1] prefix sums of the importance and of importance
    times value; zero int64 [R, 1] number of negative entries; norm fp64 [R], what the rows were
    divided by; half_rms, half_max fp64 [R, 2] of the magnitudes.
    """

    values: Tensor
    count: Tensor
    total: Tensor
    zero: Tensor
    norm: Tensor
    half_rms: Tensor
    half_max: Tensor

    @staticmethod
    def of(rows: Tensor, importance: Tensor | None, *, normalize: bool = True) -> SortedRows:
        rows = rows.float()
        norm = rows.new_ones(rows.shape[0], dtype=torch.float64)
        if normalize:
            norm = rows.double().square().mean(1).sqrt()
            norm = torch.where(norm > 0, norm, torch.ones_like(norm))
        values, order = (rows.double() / norm[:, None]).float().sort(dim=1)
        if importance is None:
            column = torch.ones_like(values)
        else:
            column = importance.expand_as(order).gather(1, order)
        count = _prefix_sum(column.double())
        total = _prefix_sum(column.double() * values.double())
        square = _prefix_sum(column.double() * values.double().square())
        zero = (values < 0).sum(1, keepdim=True)

        def halves(prefix: Tensor) -> Tensor:
            below = prefix.gather(1, zero)
            return torch.cat([below, prefix[:, -1:] - below], dim=1)

        half_rms = (halves(square) / halves(count).clamp_min(1e-300)).clamp_min(0).sqrt()
        half_max = torch.stack([-values[:, 0], values[:, -1]], dim=1).clamp_min(0).double()
        return SortedRows(values, count, total, zero, norm, half_rms, half_max)

    def half_cells(self, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
        """Importance and importance-weighted sum of |w| per cell [R, 2, L], split by sign.

        magnitudes fp64 [R, 2, L], non-decreasing; a cell holds the entries nearest to it.
        """
        middle = ((magnitudes[..., 1:] + magnitudes[..., :-1]) / 2).float()
        negative = torch.searchsorted(self.values, -middle[:, 0].contiguous(), right=True)
        positive = torch.searchsorted(self.values, middle[:, 1].contiguous())
        first, last = torch.zeros_like(self.zero), torch.full_like(self.zero, self.values.shape[1])
        # Magnitudes grow to the left of zero and to the right of it.
        negative = torch.cat([self.zero, torch.minimum(negative, self.zero), first], dim=1)
        positive = torch.cat([self.zero, torch.maximum(positive, self.zero), last], dim=1)
        edges = torch.cat([negative, positive], dim=1)
        shape = (*magnitudes.shape[:2], magnitudes.shape[2] + 1)
        counts = self.count.gather(1, edges).view(shape).diff(dim=-1).abs()
        totals = self.total.gather(1, edges).view(shape).diff(dim=-1).abs()
        return counts, totals

    def half_errors(self, magnitudes: Tensor) -> Tensor:
        """Squared error [R, 2] of the halves coded by magnitudes, less a constant of the data."""
        counts, totals = self.half_cells(magnitudes)
        return (magnitudes * (magnitudes * counts - 2 * totals)).sum(-1)

    def level_cells(self, ascending: Tensor) -> tuple[Tensor, Tensor]:
        """Importance and sum of w per cell [R, ..., 2^b] of ascending signed levels, nearest."""
        middle = ((ascending[..., 1:] + ascending[..., :-1]) / 2).float()
        inner = torch.searchsorted(self.values, middle.flatten(1)).view(middle.shape)
        edges = torch.nn.functional.pad(inner, (1, 1))
        edges[..., -1] = self.values.shape[1]
        at = edges.flatten(1)
        counts, totals = (p.gather(1, at).view(edges.shape) for p in (self.count, self.total))
        return counts.diff(dim=-1), totals.diff(dim=-1)


def _grid(shape: Tensor, half_levels: int) -> Tensor:
    """Magnitudes [R, 2, L] of shape fp64 [3, R, 2] = (first, last, rho), rho = delta ln 2."""
    first, last, rho = shape[..., None]
    steps = torch.arange(half_levels, dtype=first.dtype, device=first.device)
    growth = torch.expm1(rho * steps) / torch.expm1(rho * (half_levels - 1))
    return first + (last - first) * growth


def _search_magnitudes(problem: SortedRows, bits: int, rounds: int) -> Tensor:
    """Magnitudes fp64 [R, 2, L] of the best twin-log grid found for each half.

    The best start, then a coordinate search: each number up and down by a step that shrinks every
    round, and the least-squares optimum of the present cells.
    """
    half_levels = 1 << (bits - 1)
    starts = _starts(problem, half_levels)
    best, best_error = starts[0], problem.half_errors(_grid(starts[0], half_levels))

    def consider(candidate: Tensor) -> None:
        nonlocal best, best_error
        error = problem.half_errors(_grid(candidate, half_levels))
        better = error < best_error
        best = torch.where(better, candidate, best)
        best_error = torch.where(better, error, best_error)

    for start in starts[1:]:
        consider(start)
    for i in range(rounds):
        step = _FIRST_STEP * _STEP_DECAY**i
        for number in range(3 if half_levels > 2 else 2):  # rho has no effect on two levels
            for signed_step in (step, -step):
                consider(_moved(best, number, signed_step, half_levels))
        consider(_least_squares(problem, best, half_levels))
    return _grid(best, half_levels)


def _starts(problem: SortedRows, half_levels: int) -> list[Tensor]:
    rms = problem.half_rms.clamp_min(_TINY)
    starts = [
        torch.stack([first * rms, last * rms, torch.full_like(rms, math.log(ratio))])
        for first, last, ratio in _STARTS[half_levels]
    ]
    last = problem.half_max.clamp_min(_TINY)
    for ratio in _OUTLIER_RATIOS[half_levels]:
        rho = torch.full_like(rms, math.log(ratio))
        starts.append(torch.stack([last * ratio ** -(half_levels - 1), last, rho]))
    return starts


def _moved(shape: Tensor, number: int, step: float, half_levels: int) -> Tensor:
    first, last, rho = shape
    if number == 0:
        last = torch.maximum(last * (1 + step), first)
    elif number == 1:
        first = (first + 2 * step * (last - first) / half_levels).clamp_min(0)
    else:
        rho = (rho * (1 + 2 * step) + step / (4 * half_levels)).clamp_min(_UNIFORM_RHO)
    return torch.stack([first, last, rho])


def _least_squares(problem: SortedRows, shape: Tensor, half_levels: int) -> Tensor:
    """Best (first, last) for the present rho and cells: levels are linear in them."""
    first, last, rho = shape
    unit = torch.stack([torch.zeros_like(rho), torch.ones_like(rho), rho])
    growth = _grid(unit, half_levels)
    counts, totals = problem.half_cells(_grid(shape, half_levels))
    n, ng, ngg = counts.sum(-1), (counts * growth).sum(-1), (counts * growth.square()).sum(-1)
    t, tg = totals.sum(-1), (totals * growth).sum(-1)
    determinant = n * ngg - ng.square()
    solvable = determinant > 1e-9 * n * ngg
    determinant = torch.where(solvable, determinant, torch.ones_like(determinant))
    new_first = ((t * ngg - tg * ng) / determinant).clamp_min(0)
    new_last = torch.maximum((tg - new_first * (ng - ngg)) / ngg.clamp_min(_TINY), new_first)
    new_shape = torch.stack([new_first, new_last, rho])
    return torch.where(solvable, new_shape, shape)


def _round_levels(
    problem: SortedRows, magnitudes: Tensor, stretches: tuple[float, ...] = _INT8_STRETCH
) -> tuple[Tensor, Tensor]:
    """int8 levels [R, 2^b] in canonical order and fp32 scales [R] near magnitudes [R, 2, L].

    Tries a few scales that put the largest level at the end of the int8 range or a little below,
    keeps the one of least error, and refits the scale by least squares after rounding.
    """
    limits = magnitudes.new_tensor([128.0, 127.0])
    full = (magnitudes[..., -1] / limits).amax(1).clamp_min(_TINY)
    best_levels = magnitudes.new_zeros(magnitudes.shape[0], 2 * magnitudes.shape[2])
    best_scale, best_error = full, torch.full_like(full, torch.inf)
    for stretch in stretches:
        scale = full * stretch
        levels = (magnitudes / scale[:, None, None]).round()
        negative, positive = -levels[:, 0].clamp(1, 128), levels[:, 1].clamp(0, 127)
        ascending = torch.cat([negative.flip(1), positive], dim=1)
        for _ in range(2):
            scale, error = refit_scale(problem, ascending, scale)
        better = error < best_error
        best_levels = torch.where(better[:, None], ascending, best_levels)
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    half = magnitudes.shape[2]
    canonical = torch.cat([best_levels[:, half:], best_levels[:, :half].flip(1)], dim=1)
    return canonical.to(torch.int8), (best_scale * problem.norm).float()


def refit_scale(problem: SortedRows, ascending: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares scale [R, ...] for the cells of ascending [R, ..., 2^b] * scale, and its error
    of that shape."""
    counts, totals = problem.level_cells(ascending * scale[..., None])
    moment = (ascending * totals).sum(-1)
    power = (ascending.square() * counts).sum(-1)
    new_scale = torch.where((power > 0) & (moment > 0), moment / power.clamp_min(_TINY), scale)
    return new_scale, new_scale * (new_scale * power - 2 * moment)


def _paper_magnitudes(
    problem: SortedRows, bits: int, eta: float, negative: float, positive: float
) -> Tensor:
    """Magnitudes fp64 [R, 2, L] of the published grid (method.md 1.2) with T1-T3 fixed."""
    half_levels = 1 << (bits - 1)
    columns = problem.values.shape[1]
    below, above = problem.zero, columns - problem.zero
    nearest = torch.cat(
        [
            below - 1 - (negative * (below - 1)).round().long().clamp_min(0),
            below + (positive * (above - 1)).round().long().clamp_min(0),
        ],
        dim=1,
    ).clamp(0, columns - 1)
    smallest = torch.cat([below - 1, below], dim=1).clamp(0, columns - 1)
    values = problem.values.abs().double()
    low = torch.log2(values.gather(1, smallest) + max(eta, _TINY))
    high = torch.log2(values.gather(1, nearest) + max(eta, _TINY))
    delta = ((high - low) / (half_levels - 1)).clamp_min(1e-6)  # T9
    zero_point = (low / delta).round()
    steps = torch.arange(half_levels, dtype=low.dtype, device=low.device)
    exponent = (steps + zero_point[..., None]) * delta[..., None]
    return (torch.exp2(exponent) - eta).clamp_min(0)


def _prefix_sum(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.cumsum(1), (1, 0))


def chunk_rows(weight: Tensor) -> int:
    limit = _CHUNK_WEIGHTS.get(weight.device.type, 1 << 20)
    return max(1, limit // max(1, weight.shape[1]))


def _codebook(levels: list[Tensor], scales: list[Tensor]) -> TwinLogCodebook:
    return TwinLogCodebook(torch.cat(levels).contiguous(), torch.cat(scales).contiguous())


def check_weight(where: str, weight: Tensor, bits: int, importance: Tensor | None = None) -> None:
    """Raise what fit_twin_log raises of its arguments' types, shapes and values, but the values of
    importance, in the name of `where`."""
    check_weight_bits(bits, where)
    if not weight.is_floating_point():
        raise TypeError(f"{where}: weight must be floating point, got {weight.dtype}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(
            f"{where}: weight must be [N, K] with N, K > 0, got shape {tuple(weight.shape)}"
        )
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{where}: weight must be finite, got NaN or inf")
    if importance is not None and importance.shape not in (weight.shape, weight.shape[1:]):
        raise ValueError(
            f"{where}: importance must be [K] = [{weight.shape[1]}] or [N, K], "
            f"got shape {tuple(importance.shape)}"
        )


def relative_importance(importance: Tensor | None, device: torch.device) -> Tensor | None:
    """fp64 importance [K] or [R, K] of mean 1 over the columns; None when it says nothing.  Raises
    ValueError for NaN, inf and negative numbers."""
    if importance is None:
        return None
    importance = importance.to(device, torch.float64)
    if not bool(torch.isfinite(importance).all()) or bool((importance < 0).any()):
        raise ValueError("fit_twin_log: importance must be finite and not negative")
    mean = importance.mean(-1, keepdim=True)
    if not bool(mean.any()):
        return None
    importance = torch.where(mean > 0, importance / mean, torch.ones_like(importance))
    # A channel that was silent in calibration still counts a little: it may speak later.
    return importance.clamp_min(_LEAST_IMPORTANCE)

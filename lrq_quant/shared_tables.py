"""Twin-log codebooks whose rows share a few tables of levels: a row pays a scale and one byte.

A table of 2^b int8 levels costs a row of K weights 8 * 2^b / K bits of each: at b = 4 0.04 bits
where K = 3072, 0.25 where K = 512. Rotated rows are much alike, so 16 tables do nearly as well:
chosen as k-means does, with fit_twin_log for the mean of a cluster and the squared error of a row,
at its best scale, for the distance.

    rows' own tables -> cluster their shapes -> fit a table to each cluster's rows
                             ^                                  |
                             '---- each row takes the table ----'
                                   and scale of least error
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrq_kernels.codebook import MAX_SHARED_TABLES, TwinLogCodebook

from .twin_log import (
    SortedRows,
    check_weight,
    chunk_rows,
    fit_twin_log,
    refit_scale,
    relative_importance,
)

# Tables are designed on rows spread over the weight, of about so many weights.
_DESIGN_WEIGHTS = 1 << 21
_SHAPE_ROUNDS, _DESIGN_ROUNDS = 10, 3
# Scales that a row's search starts from, and steps of least squares from each.
_SCALE_STARTS = (0.85, 0.92, 1.0, 1.08, 1.17)
_SCALE_STEPS = 3
_TINY = 1e-30
# 32 MB of each intermediate.
_LEVELS_AT_ONCE = 1 << 22
# A table for so many rows at least: its 16 bytes cost each no more than the byte that names it.
_ROWS_A_TABLE = 16


def tables_of_rows(rows: int, tables: int) -> int:
    """How many of at most `tables` so many rows share: fewer where they are few, at least one."""
    return min(tables, max(1, rows // _ROWS_A_TABLE))


def fit_shared_tables(
    weight: Tensor, bits: int, tables: int, *, importance: Tensor | None = None
) -> TwinLogCodebook:
    """fit_twin_log with at most `tables` tables of levels that the rows share.

    weight [N, K], bits and importance as there; tables from 1 to 256. Every table is a twin-log
    grid, and some row has it. Returns levels int8 [T, 2^b], T <= tables, scale fp32 [N] and
    table_of_row uint8 [N], the same for the same weight. Raises ValueError or TypeError on anything
    else.
    """
    check_weight("fit_shared_tables", weight, bits, importance)
    if not 1 <= tables <= MAX_SHARED_TABLES:
        raise ValueError(
            f"fit_shared_tables: tables must be from 1 to {MAX_SHARED_TABLES}, got {tables}"
        )
    design = _Design.of(weight, bits, min(tables, weight.shape[0]), importance)
    for _ in range(_DESIGN_ROUNDS):
        design.refine()
    place, scale = _assigned(weight, importance, design.tables)
    used, table_of_row = place.unique(return_inverse=True)
    levels = design.tables.levels[used].contiguous()
    return TwinLogCodebook(levels, scale.float(), table_of_row.to(torch.uint8))


@dataclass
class _Design:
    """Tables as they are being chosen. rows [R, K] and importance of a sample of the weight; unit
    fp64 [R]: what each row is divided by to look like the tables; place int64 [R]: its table."""

    rows: Tensor
    importance: Tensor | None
    bits: int
    unit: Tensor
    place: Tensor
    tables: TwinLogCodebook

    @staticmethod
    def of(weight: Tensor, bits: int, tables: int, importance: Tensor | None) -> _Design:
        """From the shapes of the rows' own tables."""
        count = min(weight.shape[0], max(tables, _DESIGN_WEIGHTS // weight.shape[1]))
        index = torch.arange(count, device=weight.device) * weight.shape[0] // count
        rows, known = weight[index].float(), _of_rows(importance, index)
        own = fit_twin_log(rows, bits, importance=known)
        unit = _rms(rows)
        shapes = own.levels.double() * (own.scale.double() / unit)[:, None]
        place = _clusters(shapes, tables)
        fitted = _fit_clusters(rows / unit[:, None].float(), known, place, bits, tables)
        return _Design(rows, known, bits, unit, place, fitted)

    def refine(self) -> None:
        """Rows choose among the tables, then tables fit their rows."""
        self.place, scale = _assigned(self.rows, self.importance, self.tables, self.unit)
        own = self.tables.scale.double()[self.place]
        self.unit = torch.where(scale > 0, scale / own.clamp_min(_TINY), self.unit)
        alike = self.rows / self.unit[:, None].float()
        count = self.tables.levels.shape[0]
        self.tables = _fit_clusters(alike, self.importance, self.place, self.bits, count)


def _of_rows(importance: Tensor | None, rows: slice | Tensor) -> Tensor | None:
    """[K], which holds for all rows, or [N, K] of some of them."""
    return importance if importance is None or importance.dim() == 1 else importance[rows]


def _rms(rows: Tensor) -> Tensor:
    """fp64 [R], 1 for a row of zeros."""
    rms = rows.double().square().mean(1).sqrt()
    return torch.where(rms > 0, rms, torch.ones_like(rms))


def _clusters(shapes: Tensor, count: int) -> Tensor:
    """Place int64 [R] of each of the shapes [R, 2^b] in `count` clusters: k-means from shapes that
    are spread along the direction in which they differ most."""
    centred = shapes - shapes.mean(0)
    main = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    order = (centred @ main).argsort(stable=True)
    steps = 2 * torch.arange(count, device=shapes.device) + 1
    centres = shapes[order[steps * shapes.shape[0] // (2 * count)]]
    place = torch.cdist(shapes, centres).argmin(1)
    for _ in range(_SHAPE_ROUNDS):
        members = torch.nn.functional.one_hot(place, count).to(shapes.dtype)
        total = members.sum(0)
        means = members.T @ shapes / total.clamp_min(1)[:, None]
        centres = torch.where(total[:, None] > 0, means, centres)
        place = torch.cdist(shapes, centres).argmin(1)
    return place


def _fit_clusters(
    alike: Tensor, importance: Tensor | None, place: Tensor, bits: int, count: int
) -> TwinLogCodebook:
    """A table for each cluster of the rows `alike` [R, K]. All are fitted at once, to as many rows:
    of a larger cluster to rows spread over it, of a smaller one to its own again and again; that of
    an empty one to rows of all."""
    share = -(-alike.shape[0] // count)
    order = place.argsort(stable=True)
    sizes = torch.bincount(place, minlength=count)
    starts = sizes.cumsum(0) - sizes
    empty = sizes == 0
    sizes = torch.where(empty, alike.shape[0], sizes)
    starts = torch.where(empty, 0, starts)
    step = torch.arange(share, device=alike.device)
    within = torch.where(
        sizes[:, None] > share, step * sizes[:, None] // share, step % sizes[:, None]
    )
    chosen = order[starts[:, None] + within]
    known = None
    if importance is not None:
        known = importance.expand_as(alike)[chosen].flatten(1)
    return fit_twin_log(alike[chosen].flatten(1), bits, importance=known)


def _assigned(
    rows: Tensor,
    importance: Tensor | None,
    tables: TwinLogCodebook,
    unit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Table int64 [R] and scale fp64 [R] of least error for each of `rows`; unit fp64 [R]: what a
    row is divided by to look like the tables, by default its RMS."""
    places, scales = [], []
    size = chunk_rows(rows)
    for start in range(0, rows.shape[0], size):
        part = slice(start, start + size)
        known = relative_importance(_of_rows(importance, part), rows.device)
        problem = SortedRows.of(rows[part], known)
        # Rows of a problem are divided by their RMS.
        ones = torch.ones_like(problem.norm)
        units = ones if unit is None else unit[part] / problem.norm
        place, scale = _best_table(problem, tables, units)
        places.append(place)
        scales.append(scale * problem.norm)
    return torch.cat(places), torch.cat(scales)


def _best_table(
    problem: SortedRows, tables: TwinLogCodebook, units: Tensor
) -> tuple[Tensor, Tensor]:
    """As _assigned, for the rows of a problem, with units fp64 [R] of those rows."""
    ascending = tables.ascending().double()
    tried = tables.scale.double()[:, None] * ascending.new_tensor(_SCALE_STARTS)
    best_error = torch.full_like(units, torch.inf)
    best_scale, place = torch.zeros_like(units), torch.zeros_like(units).long()
    at_once = max(1, _LEVELS_AT_ONCE // (len(units) * tried.shape[1] * ascending.shape[1]))
    for first in range(0, len(ascending), at_once):
        some = slice(first, first + at_once)
        scale = units[:, None, None] * tried[some]
        for _ in range(_SCALE_STEPS):
            scale, error = refit_scale(problem, ascending[some, None], scale)
        least, at = _first_least(error.flatten(1))
        scale = scale.flatten(1).gather(1, at[:, None])[:, 0]
        better = least < best_error
        best_error = torch.where(better, least, best_error)
        best_scale = torch.where(better, scale, best_scale)
        place = torch.where(better, first + at // tried.shape[1], place)
    return place, best_scale


def _first_least(x: Tensor) -> tuple[Tensor, Tensor]:
    """Least value of each row of x [R, C] and its first place."""
    least = x.amin(1)
    places = torch.arange(x.shape[1], device=x.device)
    return least, torch.where(x == least[:, None], places, x.shape[1] - 1).amin(1)

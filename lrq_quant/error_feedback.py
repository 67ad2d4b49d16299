"""Error feedback: rounding column by column, each error made good by the columns to come.

GPTQ (arXiv 2210.17323) onto any fixed codebook.  Minimizes ||(W - W^) X||^2 for tokens X with the
Gram matrix H = X X^T: after column k is rounded with error e, the columns not yet rounded move by

    w_j -= e / U_kk * U_kj,    j > k,    U upper triangular, H^-1 = U^T U.

U is the inverse of R in H = R R^T with R upper triangular (the Cholesky factor of the reversed
matrix, reversed), so H^-1 itself is never formed.  Column k adds (e / U_kk)^2 to the error whatever
the others do, so 1 / U_kk^2 is what a codebook should weigh it with.

Refinement then goes over the columns again, each to the level nearest to its best value given all
others, w^_k - ((W^ - W) H)_k / H_kk: the error can only fall.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrq_kernels.codebook import TwinLogCodebook

# values fp32 [N] of one column, and which column -> the nearest representable values, fp32 [N].
NearestValue = Callable[[Tensor, int], Tensor]
# Columns whose errors reach the rest in one product.
BLOCK_SIZE = 128
# Damping to try when the given one leaves a matrix that is not positive definite.
_LEAST_DAMPING, _DAMPING_GROWTH = 1e-3, (10.0, 100.0, 1000.0)


class ErrorFeedback:
    """What all linears of one input share: the order of the columns and the factor U.

    gram [K, K] = sum x x^T of the input in the channels of the weight (smoothed and rotated), at
    any scale; damping: share of the mean of its diagonal that is added to the diagonal; act_order:
    columns of large gram first.  The factorization is fp64 and takes about 5 K^2 numbers at its
    peak.  Raises ValueError on another shape, on NaN or inf, and where no damping helps.

    added: what the damping came to; None where gram is zero, which feeds nothing back.
    importance: fp32 [K], the weight of a squared error in each column.
    """

    def __init__(self, gram: Tensor, *, damping: float = 0.01, act_order: bool = True) -> None:
        columns = gram.shape[0]
        if gram.shape != (columns, columns):
            raise ValueError(f"ErrorFeedback: gram must be [K, K], got shape {list(gram.shape)}")
        if damping < 0:
            raise ValueError(f"ErrorFeedback: damping must not be negative, got {damping}")
        if not bool(torch.isfinite(gram).all()):
            raise ValueError("ErrorFeedback: gram must be finite, got NaN or inf")
        self.order = torch.arange(columns, device=gram.device)
        if act_order:
            self.order = gram.diagonal().argsort(descending=True, stable=True)
        self.factor, self.added = _factor(gram[self.order][:, self.order].double(), damping)
        self.importance = torch.empty(columns, device=gram.device)
        self.importance[self.order] = self.factor.diagonal().square().reciprocal().float()
        self._gram = gram.float().clone()
        if self.added is not None:
            self._gram.diagonal().add_(self.added)

    def solve(self, rows: Tensor) -> Tensor:
        """rows [N, K] times the inverse of the damped gram, fp64."""
        solved = torch.empty_like(rows, dtype=torch.float64)
        factor = self.factor.double()
        solved[:, self.order] = rows.double()[:, self.order] @ factor.T @ factor
        return solved

    def round(self, weight: Tensor, nearest: NearestValue, passes: int = 0) -> Tensor:
        """W^ of weight [N, K], fp32: every entry a result of `nearest` on its row and column;
        refined in so many passes.  Raises ValueError on another K and on NaN or inf."""
        columns = self.order.numel()
        if weight.dim() != 2 or weight.shape[1] != columns:
            raise ValueError(
                f"ErrorFeedback.round: weight must be [N, {columns}], got {list(weight.shape)}"
            )
        if not bool(torch.isfinite(weight).all()):
            raise ValueError("ErrorFeedback.round: weight must be finite, got NaN or inf")
        factor = self.factor.float()
        rest = weight.float()[:, self.order].contiguous()
        rounded = torch.empty_like(rest)
        round_block = _block_rounding(nearest, rest)
        for start in range(0, columns, BLOCK_SIZE):
            stop = min(start + BLOCK_SIZE, columns)
            block = slice(start, stop)
            part = factor[block, block]
            errors = round_block(rest[:, block], None, part, rounded[:, block], self.order[block])
            rest[:, stop:].addmm_(errors, factor[block, stop:], alpha=-1)
        natural = torch.empty_like(rounded)
        natural[:, self.order] = rounded
        for _ in range(passes if self.added is not None else 0):
            self._refine(weight.float(), natural, nearest)
        return natural

    def _refine(self, weight: Tensor, rounded: Tensor, nearest: NearestValue) -> None:
        """One pass over all columns in natural order, in place."""
        gram = self._gram
        error = rounded - weight
        natural = torch.arange(weight.shape[1])
        round_block = _block_rounding(nearest, rounded)
        for start in range(0, weight.shape[1], BLOCK_SIZE):
            block = slice(start, min(start + BLOCK_SIZE, weight.shape[1]))
            old = rounded[:, block]
            gradient = error @ gram[:, block]
            error[:, block] += round_block(gradient, old, gram[block, block], old, natural[block])


@dataclass(frozen=True)
class NearestLevel:
    """The nearest of each row's own levels, for every column: a NearestValue.

    ascending fp32 [N, 2^b]; boundaries [N, 2^b - 1] halfway between them.
    """

    ascending: Tensor
    boundaries: Tensor

    def __call__(self, values: Tensor, column: int) -> Tensor:
        index = torch.searchsorted(self.boundaries, values[:, None].contiguous())
        return self.ascending.gather(1, index)[:, 0]


def codebook_nearest(codebook: TwinLogCodebook) -> NearestLevel:
    """Nearest level of every row, ties as TwinLogCodebook.encode breaks them."""
    ascending = (codebook.ascending().float() * codebook.scale[:, None]).contiguous()
    boundaries = ((ascending[:, 1:] + ascending[:, :-1]) / 2).contiguous()
    return NearestLevel(ascending, boundaries)


# values [N, J], old levels or None, part of the matrix [J, J], rounded [N, J] to be filled, which
# columns of the weight these are -> what to feed back [N, J]; see round_columns.
_BlockRounding = Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor], Tensor]


def _block_rounding(nearest: NearestValue, like: Tensor) -> _BlockRounding:
    """How the columns of a block are rounded: levels of rows on a GPU in one launch."""
    if like.is_cuda and isinstance(nearest, NearestLevel):
        from .rounding_kernels import round_block

        ascending = nearest.ascending

        def in_one_launch(
            values: Tensor, old: Tensor | None, matrix: Tensor, rounded: Tensor, names: Tensor
        ) -> Tensor:
            return round_block(values, old, ascending, matrix, matrix.diagonal(), rounded)

        return in_one_launch
    return lambda *block: round_columns(nearest, *block)


def round_columns(
    nearest: NearestValue,
    values: Tensor,
    old: Tensor | None,
    matrix: Tensor,
    rounded: Tensor,
    names: Tensor,
) -> Tensor:
    """rounding_kernels.round_block column by column, by torch's own ops and for any codebook;
    names [J] are the columns' own. Overwrites values."""
    diagonal = matrix.diagonal().tolist()
    change = torch.empty_like(values)
    for k, name in enumerate(names.tolist()):
        value = values[:, k]
        if old is None:
            chosen = nearest(value, name)
            step = (value - chosen) / diagonal[k]
            values[:, k + 1 :].addr_(step, matrix[k, k + 1 :], alpha=-1)
        else:
            chosen = nearest(old[:, k] - value / diagonal[k], name)
            step = chosen - old[:, k]
            values[:, k + 1 :].addr_(step, matrix[k, k + 1 :])
        rounded[:, k] = chosen
        change[:, k] = step
    return change


def rotated_gram(
    gram: Tensor, smooth_scale: Tensor | None, rotate: Callable[[Tensor], Tensor]
) -> Tensor:
    """Gram matrix fp32 [K, K] of rotate(x * smooth_scale), from that of x; rotate is linear and
    acts on the last dimension (Rotation.apply)."""
    if smooth_scale is not None:
        gram = gram * smooth_scale * smooth_scale[:, None]
    full = rotate(rotate(gram.float()).T.contiguous())
    return (full + full.T) / 2


def _factor(gram: Tensor, damping: float) -> tuple[Tensor, float | None]:
    """U fp64 [K, K], upper triangular, with U^T U = (gram + added)^-1, and what was added to the
    diagonal; the identity and None for a gram of zeros.  Overwrites gram, fp64."""
    diagonal = gram.diagonal()
    mean = diagonal.mean().clone()
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    if mean <= 0:  # nothing was ever seen of this input: nearest rounding
        return identity, None
    added = 0.0
    for total in (damping, *(max(damping, _LEAST_DAMPING) * more for more in _DAMPING_GROWTH)):
        diagonal += (total - added) * mean
        added = total
        lower, failed = torch.linalg.cholesky_ex(gram.flip(0, 1))
        if not bool(failed):
            factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            return factor, added * float(mean)
    raise ValueError(f"ErrorFeedback: gram is not positive definite, even with damping {added:.3g}")

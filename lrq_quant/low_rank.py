"""The low-rank branch of the linears of one input: what 16 bits carry of their weights.

The weights of all linears that read x, one above the other, are one matrix W [sum N, K], so that x
is projected once for all of them (SVDQuant, arXiv 2411.05007, gives each a branch of its own):

    W x = (W - B) x + up (down x),    B = up down,    up [sum N, R],    down [R, K].

B is the matrix of rank R nearest to W where an error E costs tr(E M E^T), M being the second moment
of x: with M = L L^T that is the SVD of W L, cut after R singular values, times L^-1 (Eckart and
Young). Without M it is the SVD of W. Both factors are rounded to bfloat16, and what is quantized is
W less the product of the rounded ones, so that the rounding costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrq_kernels.linear_state import BRANCH_DTYPE

from .calibration import ActivationStats

# Of the search for the leading singular vectors: directions beyond R, passes over the matrix. What
# is lost of the share of the best B falls as (s_(R+17) / s_R)^32.
_MORE_DIRECTIONS, _PASSES = 16, 8


@dataclass(frozen=True)
class LowRankBranch:
    """down bf16 [R, K], ups bf16 [N, R] of the linears in order."""

    down: Tensor
    ups: tuple[Tensor, ...]

    def rest(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """What is left of the weights [N, K] to quantize, fp32."""
        down = self.down.float()
        return [
            torch.addmm(weight.float(), up.float(), down, alpha=-1)
            for weight, up in zip(weights, self.ups, strict=True)
        ]


def low_rank_branch(
    weights: Sequence[Tensor],
    rank: int,
    moments: Tensor | None = None,
    *,
    damping: float = 0.01,
    seed: int = 0,
) -> LowRankBranch:
    """The branch of linears that share an input, weights [N, K] of any floating dtype, on their
    device; rank from 1 to what the stacked weights can have.

    moments: E[x x^T] [K, K] of the input, or its diagonal [K], at any scale; damping: share of the
    mean of its diagonal that is added to the diagonal, more where the matrix is not positive
    definite. None, and moments of zeros: all channels count alike. Deterministic: the search for
    the singular vectors starts from directions drawn by `seed`. Work is in fp64.

    Raises ValueError for another rank and for NaN or inf.
    """
    rows, columns = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(
            f"low_rank_branch: rank must be from 1 to {min(rows, columns)}, got {rank}"
        )
    stacked = torch.cat([weight.detach().double() for weight in weights])
    if not bool(torch.isfinite(stacked).all()):
        raise ValueError("low_rank_branch: weights must be finite, got NaN or inf")
    root = None if moments is None else _root(moments.to(stacked.device).double(), damping)
    if root is None:
        up, down = _leading(stacked, rank, seed)
    elif root.dim() == 1:
        up, down = _leading(stacked * root, rank, seed)
        down = down / root
    else:
        up, down = _leading(stacked @ root, rank, seed)
        down = torch.linalg.solve_triangular(root, down, upper=False, left=False)
    # Both factors of one size in each direction: neither overflows in fp16.
    sizes = up.norm(dim=0), down.norm(dim=1)
    balance = torch.where(sizes[0] > 0, (sizes[1] / sizes[0]).sqrt(), 1.0)
    up, down = up * balance, down / balance[:, None]
    ups = up.to(BRANCH_DTYPE).split([weight.shape[0] for weight in weights])
    # Each its own memory: they end up in different linears.
    return LowRankBranch(down.to(BRANCH_DTYPE).contiguous(), tuple(part.clone() for part in ups))


def input_moments(stats: ActivationStats) -> Tensor:
    """What low_rank_branch takes: [K, K] where the statistics hold it, else its diagonal."""
    return stats.rms.square() if stats.gram is None else stats.gram / max(stats.count, 1)


def _root(moments: Tensor, damping: float) -> Tensor | None:
    """L of the damped moments, lower triangular or, of a diagonal, a vector; None for zeros."""
    if not bool(torch.isfinite(moments).all()):
        raise ValueError("low_rank_branch: moments must be finite, got NaN or inf")
    diagonal = moments if moments.dim() == 1 else moments.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0:
        return None
    if moments.dim() == 1:
        return (moments + damping * mean).sqrt()
    added = damping * mean
    identity = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    while True:
        root, failed = torch.linalg.cholesky_ex(moments + added * identity)
        if not bool(failed):
            return root
        added = max(10 * added, 1e-6 * mean)  # ends: a dominant diagonal is positive definite


def _leading(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """(up [N, R], down [R, K]): the best product of rank R, by subspace iteration from random
    directions, which passes over the matrix a few times where an SVD of all of it would take
    minutes; exact where there are no more directions than these."""
    width = min(rank + _MORE_DIRECTIONS, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype)
    basis = basis.to(matrix.device)
    for _ in range(_PASSES):
        basis = torch.linalg.qr(matrix.T @ (matrix @ basis)).Q
    left, values, right = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return left[:, :rank] * values[:rank], right[:rank] @ basis.T

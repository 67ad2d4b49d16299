"""The low-rank branch of the linears of one input: what 16 bits carry of their weights.

The weights of all linears that read x, one above the other, are one matrix W [sum N, K], so that x
is projected once for all of them (SVDQuant, arXiv 2411.05007, gives each a branch of its own):

    W x = (W - B) x + up (down x),    B = up down,    up [sum N, R],    down [R, K].

B takes from W what makes noise. A rotation spreads the noise of codes, those of x and those of the
rest, evenly over the channels, so that with smoothing s it grows with the norms

    ||(W - B) / s||_F ||x s||,    least for B = 0 at s_k^2 = ||w_k|| / rms(x_k)

w_k being the columns of W. B is therefore the matrix of rank R for which ||(W - B) / s||_F is least
with that s: the SVD of W / s, cut after R singular values, times s (Eckart and Young); without
statistics of x, the SVD of W. The metric of E[x x^T], in which a product without the rest would be
nearest, lets through more noise: by 0.3 dB of the output of the demo's model at rank 4 and W4A4.

Both factors are rounded to bfloat16, and what is quantized is W less the product of the rounded
ones, so that the rounding costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrq_kernels.linear_state import BRANCH_DTYPE

# Of the search for the leading singular vectors: directions beyond R, passes over the matrix. What
# is lost of the share of the best B falls as (s_(R+17) / s_R)^32.
_MORE_DIRECTIONS, _PASSES = 16, 8
# Of the largest 1 / s^2, what a channel that is silent counts with.
_LEAST_SHARE = 1e-6


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
    weights: Sequence[Tensor], rank: int, act_rms: Tensor | None = None, *, seed: int = 0
) -> LowRankBranch:
    """The branch of linears that share an input, weights [N, K] of any floating dtype, on their
    device; rank from 1 to what the stacked weights can have.

    act_rms: RMS of each input channel [K]; None, and where all are 0: channels count alike.
    Deterministic: the search for the singular vectors starts from directions drawn by `seed`. Work
    is in fp64. Raises ValueError for another rank and for NaN or inf.
    """
    rows, columns = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(
            f"low_rank_branch: rank must be from 1 to {min(rows, columns)}, got {rank}"
        )
    stacked = torch.cat([weight.detach().double() for weight in weights])
    for name, given in (("weights", stacked), ("act_rms", act_rms)):
        if given is not None and not bool(torch.isfinite(given).all()):
            raise ValueError(f"low_rank_branch: {name} must be finite, got NaN or inf")
    root = None if act_rms is None else _root(stacked, act_rms.to(stacked))
    up, down = _leading(stacked if root is None else stacked * root, rank, seed)
    down = down if root is None else down / root
    # Both factors of one size in each direction: neither overflows in fp16.
    sizes = up.norm(dim=0), down.norm(dim=1)
    balance = torch.where(sizes[0] > 0, (sizes[1] / sizes[0]).sqrt(), 1.0)
    up, down = up * balance, down / balance[:, None]
    ups = up.to(BRANCH_DTYPE).split([weight.shape[0] for weight in weights])
    # Each its own memory: they end up in different linears.
    return LowRankBranch(down.to(BRANCH_DTYPE).contiguous(), tuple(part.clone() for part in ups))


def _root(stacked: Tensor, act_rms: Tensor) -> Tensor | None:
    """1 / s, fp64 [K], within a bounded range; None where nothing was seen of the input."""
    norms = stacked.norm(dim=0)
    squares = torch.where(norms > 0, act_rms / norms, 0.0)
    most = squares.max()
    return squares.clamp_min(_LEAST_SHARE * most).sqrt() if most > 0 else None


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

"""Error feedback: rounding column by column, each error made good by the columns to come.

GPTQ (arXiv 2210.17323) onto any fixed codebook.  Minimizes ||(W - W^) X||^2 for tokens X with the
Gram matrix H = X X^T: after column k is rounded with error e, the columns not yet rounded move by

    w_j -= e / U_kk * U_kj,    j > k,    U upper triangular, H^-1 = U^T U.

U is the inverse of R in H = R R^T with R upper triangular (the Cholesky factor of the reversed
matrix, reversed), so H^-1 itself is never formed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lrq_kernels.codebook import TwinLogCodebook

# values fp32 [N] of one column, and which column -> the nearest representable values, fp32 [N].
NearestValue = Callable[[Tensor, int], Tensor]


def round_with_feedback(
    weight: Tensor,
    gram: Tensor,
    nearest: NearestValue,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    act_order: bool = True,
) -> Tensor:
    """W^ of weight [N, K], fp32, every entry a result of `nearest` on its own row and column.

    gram [K, K] = sum x x^T of the linear's input in the weight's own (smoothed, rotated) channels;
    damping: share of the mean of its diagonal added to the diagonal; block_size: columns whose
    errors are applied to the rest in one product; act_order: columns of large gram first.  The
    factorization is fp64 and needs about 3 K^2 numbers.  Raises ValueError on shapes that do not
    fit, on NaN or inf, and on a gram that no damping makes positive definite.
    """
    columns = weight.shape[1]
    if weight.dim() != 2 or gram.shape != (columns, columns):
        raise ValueError(
            "round_with_feedback: weight must be [N, K] and gram [K, K], "
            f"got {list(weight.shape)} and {list(gram.shape)}"
        )
    if damping < 0 or block_size < 1:
        raise ValueError(
            "round_with_feedback: damping must not be negative and block_size positive, "
            f"got {damping} and {block_size}"
        )
    if not bool(torch.isfinite(weight).all()) or not bool(torch.isfinite(gram).all()):
        raise ValueError("round_with_feedback: weight and gram must be finite, got NaN or inf")
    diagonal = gram.diagonal()
    order = torch.arange(columns, device=weight.device)
    if act_order:
        order = diagonal.to(weight.device).argsort(descending=True, stable=True)
    factor = _feedback_factor(gram.to(weight.device)[order][:, order].double(), damping)
    rest = weight.float()[:, order].contiguous()
    rounded = torch.empty_like(rest)
    names = order.tolist()
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        errors = rest.new_empty(rest.shape[0], stop - start)
        for k in range(start, stop):
            value = nearest(rest[:, k], names[k])
            rounded[:, k] = value
            errors[:, k - start] = (rest[:, k] - value) / factor[k, k]
            rest[:, k + 1 : stop].addr_(errors[:, k - start], factor[k, k + 1 : stop], alpha=-1)
        rest[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    natural = torch.empty_like(rounded)
    natural[:, order] = rounded
    return natural


def codebook_nearest(codebook: TwinLogCodebook) -> NearestValue:
    """Nearest level of every row, ties as TwinLogCodebook.encode breaks them."""
    ascending = codebook.ascending().float() * codebook.scale[:, None]
    boundaries = ((ascending[:, 1:] + ascending[:, :-1]) / 2).contiguous()

    def nearest(values: Tensor, column: int) -> Tensor:
        index = torch.searchsorted(boundaries, values[:, None].contiguous())
        return ascending.gather(1, index)[:, 0]

    return nearest


def rotated_gram(gram: Tensor, smooth_scale: Tensor | None, apply: Callable) -> Tensor:
    """Gram matrix fp32 [K, K] of apply(x * smooth_scale), from that of x; apply is linear and acts
    on the last dimension (Rotation.apply)."""
    if smooth_scale is not None:
        gram = gram * smooth_scale * smooth_scale[:, None]
    half = apply(gram.float())
    full = apply(half.T.contiguous())
    return (full + full.T) / 2


def _feedback_factor(gram: Tensor, damping: float) -> Tensor:
    """U fp32 [K, K], upper triangular, with U^T U = (gram + damping)^-1.  Overwrites gram."""
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    if mean <= 0:  # nothing was ever seen of this input: plain rounding
        return torch.eye(gram.shape[0], device=gram.device)
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    added = 0.0
    for total in (damping, *(max(damping, 1e-3) * 10.0**i for i in range(1, 4))):
        diagonal += (total - added) * mean
        added = total
        lower, failed = torch.linalg.cholesky_ex(gram.flip(0, 1))
        if not bool(failed):
            return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True).float()
    raise ValueError(
        f"round_with_feedback: gram is not positive definite, even with damping {added:.3g}"
    )

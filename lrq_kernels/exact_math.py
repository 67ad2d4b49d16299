"""What torch has no op for: an exact product of int8 matrices, and fma."""

from __future__ import annotations

import torch
from torch import Tensor

from .rotation import plain_matmul

# |x| <= 128, |level| <= 128: 1024 products stay within 2^24, so a float32 dot product is exact.
_EXACT_K = 1024


def integer_matmul(x_q: Tensor, w_q: Tensor) -> Tensor:
    """x_q int8 [M, K] times w_q int8 [N, K] transposed: int32 [M, N], exact.

    Runs on float32 matrix products short enough to be exact, which every BLAS has.
    """
    total = torch.zeros(x_q.shape[0], w_q.shape[0], dtype=torch.int32, device=x_q.device)
    for start in range(0, x_q.shape[1], _EXACT_K):
        stop = start + _EXACT_K
        product = plain_matmul(x_q[:, start:stop].float(), w_q[:, start:stop].float().T)
        total += product.to(torch.int32)
    return total


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """fma(a, b, c) of float32 tensors, rounded once.

    The product is exact in float64. Rounding its sum with c to float64 and then to float32 can go
    wrong only where the float64 sum sits on a midpoint of two float32 values (or near zero, where
    float32 is denser): there the sum is rounded to odd first (Boldo and Melquiond 2008).
    """
    product = a.double() * b.double()
    addend = c.double()
    total = product + addend
    midpoint = (total.view(torch.int64) & 0x1FFFFFFF) == 0x10000000
    suspect = midpoint | (total.abs() < 2.0**-125)
    if bool(suspect.any()):
        p, q = torch.broadcast_tensors(product, addend)
        p, q, s = p[suspect], q[suspect], total[suspect]
        # Two-sum: error is p + q - s exactly.
        virtual = s - p
        error = (p - (s - virtual)) + (q - virtual)
        even = (s.view(torch.int64) & 1) == 0
        toward = torch.where(error > 0, torch.inf, -torch.inf).to(s)
        odd = torch.nextafter(s, toward)
        total[suspect] = torch.where((error != 0) & even, odd, s)
    return total.float()


def fits_bf16(values: Tensor) -> bool:
    """Whether bf16 holds all of them, and fp16 too: 2^-14 to 2^15 in size."""
    size = values.abs()
    in_range = (size >= 2.0**-14) & (size <= 2.0**15)
    return bool((in_range & (values.bfloat16() == values)).all())

"""Which kernel runs the activation path on CUDA: the one place where Triton and CUDA C++ meet.

A form (FORMS) is what comes before the rotation.
`implementation` names the kernel; the functions below, one for each op, call what it names. They
trust their arguments: ops.py has checked them. Triton is imported on the first call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TRITON, CUDA = "triton", "cuda"
FORMS = ("plain", "concat", "activation", "norm_modulate")
# Those that lrq::_rotate_rows (csrc/rotate) runs.
CUDA_FORMS = frozenset({"plain", "concat", "norm_modulate"})
_CUDA_DTYPES = (torch.bfloat16, torch.float16)


def implementation(
    form: str,
    dtype: torch.dtype,
    in_features: int,
    rotation: str,
    block_size: int,
    permuted: bool,
    scale_mode: str,
) -> str:
    """TRITON, which takes everything, or CUDA for a problem of a form with 16-bit tokens, a
    Hadamard rotation and no permutation. Both scale modes and every K are alike as yet. CUDA
    multiplies by a channel scale in 16 bits, so _kernel_takes wants one of bf16."""
    takes = rotation == "hadamard" and block_size >= 128 and not permuted and dtype in _CUDA_DTYPES
    return CUDA if takes and form in CUDA_FORMS else TRITON


def _kernel_takes(
    x: Tensor, second: Tensor | None, channel_scale: Tensor | None, block_size: int
) -> bool:
    """Whether lrq::_rotate_rows takes the channel scale, and rows of these widths, strides and
    addresses."""
    if channel_scale is not None and channel_scale.dtype != torch.bfloat16:
        return False
    from . import _planner

    sources = [x] if second is None else [x, second]
    addresses = 0 if channel_scale is None else channel_scale.data_ptr()
    for source in sources:
        addresses |= source.data_ptr()
        for stride in source.stride()[:-1]:
            addresses |= stride * source.element_size()
    row_stride = max(map(_row_stride, sources))
    widths = (x.shape[-1], 0 if second is None else second.shape[-1])
    return _planner.supports_rotate_rows(*widths, block_size, row_stride, addresses)


def _keeps_modulation(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, channel_scale: Tensor | None
) -> bool:
    """Whether the CUDA kernel rounds as reference.py does: from vectors that do not lie on 16 bytes
    it reads 1 + scale and shift for each token and lets no channel scale join them."""
    vectors = [v for v in (scale, shift) if v is not None]
    if channel_scale is None or len(vectors) < 2 or any(v.dtype != x.dtype for v in vectors):
        return True
    strides = [2 * v.stride(0) if v.shape[0] > 1 else 0 for v in vectors]
    return all((v.data_ptr() | s) % 16 == 0 for v, s in zip(vectors, strides, strict=True))


def _row_stride(x: Tensor) -> int:
    """From token to token of [M, K] or [B, T, K]; with T = 1 the tokens are the samples."""
    one_each = x.dim() == 3 and x.shape[1] == 1 and x.shape[0] > 1
    return x.stride(0 if one_each else -2)


def _rotate_rows(
    x: Tensor,
    second: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    eps: float,
    channel_scale: Tensor | None,
    block_size: int,
    act_bits: int,
    scale_mode: str,
    scale_factor: float,
) -> tuple[Tensor, Tensor]:
    """The CUDA kernel, registered by csrc/ops.cpp."""
    return torch.ops.lrq._rotate_rows.default(
        x,
        second,
        scale,
        shift,
        norm,
        eps,
        channel_scale,
        block_size,
        act_bits,
        scale_mode,
        scale_factor,
    )


def rotate_quantize(
    x: Tensor,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
    *step: Any,
) -> tuple[Tensor, Tensor]:
    """step: act_bits, scale_mode, scale_factor, here and below."""
    permuted = permutation is not None
    problem = (x.dtype, x.shape[-1], rotation, block_size, permuted, step[1])
    chosen = x.dim() in (2, 3) and implementation("plain", *problem) == CUDA
    if chosen and _kernel_takes(x, None, channel_scale, block_size):
        return _rotate_rows(x, None, None, None, "none", 0.0, channel_scale, block_size, *step)
    from . import rotate_quantize as kernels

    return kernels.rotate_quantize(
        x, channel_scale, permutation, matrices, rotation, block_size, *step
    )


def rotate(x: Tensor, *arguments: Any) -> Tensor:
    """Unquantized; in Triton alone."""
    from . import rotate_quantize as kernels

    return kernels.rotate(x, *arguments)


def concat_rotate_quantize(
    first: Tensor,
    second: Tensor,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
    *step: Any,
) -> tuple[Tensor, Tensor]:
    in_features, permuted = first.shape[-1] + second.shape[-1], permutation is not None
    problem = (first.dtype, in_features, rotation, block_size, permuted, step[1])
    chosen = first.dim() in (2, 3) and implementation("concat", *problem) == CUDA
    if chosen and _kernel_takes(first, second, channel_scale, block_size):
        return _rotate_rows(
            first, second, None, None, "none", 0.0, channel_scale, block_size, *step
        )
    from . import rotate_quantize as kernels

    return kernels.concat_rotate_quantize(
        first, second, channel_scale, permutation, matrices, rotation, block_size, *step
    )


def activation_rotate_quantize(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """In Triton alone: on the hot path of FLUX and PixArt the GEMM before applies it."""
    from . import rotate_quantize as kernels

    return kernels.activation_rotate_quantize(x, *arguments)


def norm_modulate_rotate_quantize(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    eps: float,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
    *step_and_keep: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *step, keep = step_and_keep
    # The CUDA kernel has neither affine norms nor a third output.
    simple = norm_weight is None and norm_bias is None and not keep
    problem = (x.dtype, x.shape[-1], rotation, block_size, permutation is not None, step[1])
    chosen = simple and implementation("norm_modulate", *problem) == CUDA
    chosen = chosen and _keeps_modulation(x, scale, shift, channel_scale)
    if chosen and _kernel_takes(x, None, channel_scale, block_size):
        vectors = (scale, shift, norm, eps, channel_scale)
        return (*_rotate_rows(x, None, *vectors, block_size, *step), x.new_empty(0))
    from . import rotate_quantize as kernels

    vectors_of_norm = (norm_weight, norm_bias, scale, shift, norm, eps)
    rotation_arguments = (channel_scale, permutation, matrices, rotation, block_size)
    return kernels.norm_modulate_rotate_quantize(
        x, *vectors_of_norm, *rotation_arguments, *step_and_keep
    )

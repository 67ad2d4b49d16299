"""The arithmetic of rotate_quantize and of what fuses in front of it, in plain PyTorch: a part of
reference.py, which says what these functions are for and by which name they are called.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .rotation import block_dense, block_hadamard
from .scheme import activation_qmax

# ---- rotate, quantize ---------------------------------------------------------------------------


def _rotate_wide(
    x: Tensor,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
) -> Tensor:
    """Scaled and rotated x [..., K] in fp32, or fp64 when x is fp64."""
    v = x.to(torch.promote_types(x.dtype, torch.float32))
    index = None if permutation is None else permutation.long()
    if rotation == "dual":
        if channel_scale is not None:
            v = v * channel_scale
        v = block_dense(v, _required(matrices)[0])
        if index is not None:
            v = v[..., index]
        return block_dense(v, _required(matrices)[1])
    if index is not None:
        v = v[..., index]
    v = _scaled(v, channel_scale, x.dtype)
    return block_hadamard(v, block_size) if rotation == "hadamard" else v


def _scaled(v: Tensor, channel_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """v times channel_scale: by one of bf16 in the dtype of the tokens, that is rounded to it."""
    if channel_scale is None:
        return v
    if channel_scale.dtype == torch.bfloat16:
        return (v.to(dtype) * channel_scale.to(dtype)).to(v.dtype)
    return v * channel_scale


def _required(matrices: Tensor | None) -> Tensor:
    if matrices is None:
        raise ValueError("rotation 'dual' needs matrices, got None")
    return matrices


def rotate(
    x: Tensor,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
) -> Tensor:
    """Scale and rotate x [..., K]; the result has x's dtype.

    channel_scale [K] holds smoothing and signs in one vector: it is applied after the permutation,
    v[j] = x[permutation[j]] * channel_scale[j], except for "dual", where the permutation sits
    between the two dense factors and channel_scale comes first. It is fp32, or bf16
    but for "dual": then the product is rounded to x's dtype, so that kernels may multiply in it.
    """
    v = _rotate_wide(x, channel_scale, permutation, matrices, rotation, block_size)
    return v.to(x.dtype).contiguous()


def rotate_quantize(
    x: Tensor,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
    act_bits: int,
    scale_mode: str,
    scale_factor: float,
) -> tuple[Tensor, Tensor]:
    """Rotate x [..., K] and quantize each token: (x_q int8 [..., K], x_scale fp32 [...]).

    x_scale = max|v| * fl32(scale_factor / qmax)   (scale_mode "absmax")
            = sqrt(mean v^2) * fl32(scale_factor)  (scale_mode "rms")
    x_q     = clamp(rint(v * (1 / x_scale)), -qmax, qmax), half to even, 1/x_scale rounded to fp32

    A zero row has x_scale 0 and codes 0. NaN or inf in a row makes its x_scale NaN or inf and its
    codes 0. So are the codes of a row whose 1/x_scale overflows (x_scale below 2^-128). For fp64
    input x_scale is fp64 too.
    """
    # Elementwise results would keep the strides of an x whose leading dimensions are permuted.
    v = _rotate_wide(x, channel_scale, permutation, matrices, rotation, block_size).contiguous()
    x_scale = token_scale(v, act_bits, scale_mode, scale_factor)
    return quantize_by_scale(v, x_scale, act_bits), x_scale


def rotated_rows(
    x: Tensor,
    second: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    eps: float,
    channel_scale: Tensor | None,
    block_size: int,
) -> Tensor:
    """Hadamard of norm_modulate(concat(x, second)) * channel_scale, in fp32 or fp64.

    x [M, K1] or [B, T, K1], second (optional) the same with K2, K = K1 + K2. norm over K, without
    affine: "layer" (x - mean) / sqrt(var + eps), "rms" x / sqrt(mean x^2 + eps), or "none".
    scale, shift [S, K] (optional, with a norm): row m belongs to sample m // (M / S).
    """
    v = x if second is None else torch.cat([x, second], dim=-1)
    if norm != "none":
        samples = max([1, *(len(vectors) for vectors in (scale, shift) if vectors is not None)])
        by_sample = v.reshape(samples, v.shape[:-1].numel() // samples, v.shape[-1])
        joined = channel_scale if joins_modulation(x, scale, shift, channel_scale) else None
        v = norm_modulate(by_sample, None, None, scale, shift, norm, eps, joined).view(v.shape)
        channel_scale = None if joined is not None else channel_scale
    return _rotate_wide(v, channel_scale, None, None, "hadamard", block_size)


def rotate_rows(
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
    """rotated_rows, quantized as rotate_quantize does it: (x_q int8 [..., K], x_scale [...])."""
    v = rotated_rows(x, second, scale, shift, norm, eps, channel_scale, block_size).contiguous()
    x_scale = token_scale(v, act_bits, scale_mode, scale_factor)
    return quantize_by_scale(v, x_scale, act_bits), x_scale


def token_scale(v: Tensor, act_bits: int, scale_mode: str, scale_factor: float) -> Tensor:
    """Quantization step of each token (last dimension of v), in v's dtype."""
    qmax = activation_qmax(act_bits)
    if scale_mode == "rms":
        size, factor = v.square().mean(dim=-1).sqrt(), scale_factor
    elif v.shape[-1]:
        size, factor = v.abs().amax(dim=-1), scale_factor / qmax
    else:
        size, factor = v.new_zeros(v.shape[:-1]), scale_factor / qmax
    return size * torch.tensor(factor, dtype=torch.float32).to(v)


def quantize_by_scale(v: Tensor, x_scale: Tensor, act_bits: int) -> Tensor:
    """int8 codes of v [..., K] for a given step x_scale [...]."""
    qmax = activation_qmax(act_bits)
    inverse = 1 / x_scale
    # No meaningful codes where x_scale is 0, tiny, inf or NaN; x_scale carries the news.
    inverse = torch.where(torch.isfinite(inverse), inverse, torch.zeros_like(inverse))
    codes = (v * inverse[..., None]).round().clamp(-qmax, qmax)
    return codes.nan_to_num(nan=0.0).to(torch.int8)


# ---- what fuses in front of rotate_quantize -----------------------------------------------------
#
# A norm with modulation is rounded to x's dtype as eager torch rounds it, step by step, so that
# what reads it gets the codes of the unfused model, and kernels multiply by exact 16-bit values. An
# activation stays in fp32 (fp64 for fp64 input) up to the rotation; the tensor kept for another
# consumer is the same y, rounded once to x's dtype.


def _wide(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(like.dtype, torch.float32))


def norm_modulate(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    eps: float,
    channel_scale: Tensor | None = None,
) -> Tensor:
    """(norm(x) * norm_weight + norm_bias) * (1 + scale) + shift in x's dtype, x [B, T, K] or
    [M, K].

    norm "layer": (x - mean x) / sqrt(mean (x - mean x)^2 + eps); "rms": x / sqrt(mean x^2 + eps).
    norm_weight, norm_bias [K]; scale, shift [B, K], B = 1 for x [M, K].
    The norm, with its weight and bias, is computed in fp32 (fp64 for fp64 input). It is rounded to
    x's dtype, and so are 1 + scale, the product and the sum, where scale and shift have that dtype,
    as torch does; where one has another dtype the sum alone is rounded. channel_scale [K]
    multiplies 1 + scale and shift, rounded alike.
    """
    v = _wide(x, x)
    if norm == "layer":
        v = v - v.mean(dim=-1, keepdim=True)
    y = v * (v.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    if norm_weight is not None:
        y = y * _wide(norm_weight, x)
    if norm_bias is not None:
        y = y + _wide(norm_bias, x)
    return modulate(y, x, scale, shift, channel_scale)


def modulate(
    y: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    channel_scale: Tensor | None = None,
) -> Tensor:
    """y * (1 + scale) + shift, rounded as norm_modulate says; y fp32 or fp64, of the shape of x."""
    narrow = all(v.dtype == x.dtype for v in (scale, shift) if v is not None)
    step = x.dtype if narrow else y.dtype
    y = y.to(step)
    # A vector of a sample serves all its tokens: [B, 1, K], or [1, K] for x [M, K].
    factor = None if scale is None else 1 + (scale if x.dim() == 2 else scale[:, None]).to(step)
    summand = None if shift is None else (shift if x.dim() == 2 else shift[:, None]).to(step)
    if channel_scale is not None and factor is not None and summand is not None:
        factor, summand = factor * channel_scale.to(step), summand * channel_scale.to(step)
    if factor is not None:
        y = y * factor
    if summand is not None:
        y = y + summand
    return y.to(x.dtype)


def activate(x: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """act(x), or act(gate) * x, in fp32; activation "gelu_tanh", "gelu_erf" or "silu"."""
    v = _wide(x if gate is None else gate, x)
    if activation == "silu":
        y = F.silu(v)
    else:
        y = F.gelu(v, approximate="tanh" if activation == "gelu_tanh" else "none")
    return y if gate is None else y * _wide(x, x)


def joins_modulation(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, channel_scale: Tensor | None
) -> bool:
    """Whether channel_scale is one of bf16 that joins 1 + scale and shift."""
    given = scale is not None and shift is not None and scale.dtype == shift.dtype == x.dtype
    return given and channel_scale is not None and channel_scale.dtype == torch.bfloat16


def _unpermuted(channel_scale: Tensor | None, permutation: Tensor | None) -> Tensor | None:
    """In the order of the channels before the permutation."""
    if permutation is None or channel_scale is None:
        return channel_scale
    return torch.empty_like(channel_scale).index_copy_(0, permutation.long(), channel_scale)


def _kept(y: Tensor, x: Tensor, keep: bool) -> Tensor:
    """A fresh tensor either way: in fp32 y is quantized and kept."""
    return (
        y.to(x.dtype, copy=True, memory_format=torch.contiguous_format) if keep else x.new_empty(0)
    )


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
    act_bits: int,
    scale_mode: str,
    scale_factor: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """rotate_quantize of y = norm_modulate(x, ...), and y in x's dtype if `keep`, else [0].

    A channel_scale in bf16 joins 1 + scale and shift, rounded to x's dtype, before they meet the
    norm, where both are given in that dtype and y is not kept.
    """
    if not keep and joins_modulation(x, scale, shift, channel_scale):
        natural = _unpermuted(channel_scale, permutation)
        y = norm_modulate(x, norm_weight, norm_bias, scale, shift, norm, eps, natural)
        rest = (None, permutation, matrices, rotation, block_size)
        return *rotate_quantize(y, *rest, act_bits, scale_mode, scale_factor), x.new_empty(0)
    y = norm_modulate(x, norm_weight, norm_bias, scale, shift, norm, eps)
    rotate_arguments = (channel_scale, permutation, matrices, rotation, block_size)
    step = (act_bits, scale_mode, scale_factor)
    return *rotate_quantize(y, *rotate_arguments, *step), _kept(y, x, keep)


def activation_rotate_quantize(
    x: Tensor,
    gate: Tensor | None,
    activation: str,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
    act_bits: int,
    scale_mode: str,
    scale_factor: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """rotate_quantize of y = activate(x, gate), and y in x's dtype if `keep`, else [0]."""
    y = activate(x, gate, activation)
    rotate_arguments = (channel_scale, permutation, matrices, rotation, block_size)
    step = (act_bits, scale_mode, scale_factor)
    return *rotate_quantize(y, *rotate_arguments, *step), _kept(y, x, keep)


def concat_rotate_quantize(
    first: Tensor,
    second: Tensor,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
    act_bits: int,
    scale_mode: str,
    scale_factor: float,
) -> tuple[Tensor, Tensor]:
    """rotate_quantize of [first | second], tensors [..., K1] and [..., K2] of one dtype."""
    x = torch.cat([first, second], dim=-1)
    rotate_arguments = (channel_scale, permutation, matrices, rotation, block_size)
    return rotate_quantize(x, *rotate_arguments, act_bits, scale_mode, scale_factor)

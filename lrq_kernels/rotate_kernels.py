"""Triton kernels of lrq::rotate_quantize, its fused forms and lrq::rotate: one token a program.
token_tiles.py says how a token lies in registers; rotate_quantize.py launches. dual_kernels.py has
those of "dual".

A permutation is gathered where x is loaded, and where each vector along K is.
"""

# A tuple that grows in a kernel has no one type for Python.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from .token_tiles import (
    load_pieces,
    load_two_rows,
    multiply,
    num_values,
    padded_row,
    piece_mask,
    rotate_and_store,
    store_pieces,
    to_float,
    token_square_sum,
    token_sum,
)

# The kernels of a token share their last arguments:
#
#   channel_scale_ptr   [K] fp32, bf16 or None
#   permutation_ptr     [K] int32 or None
#   out_ptr             [M, padded_row(K)] int8 codes, or floating point when x_scale_ptr is None
#   x_scale_ptr         [M] fp32, or None: store the rotated token, unquantized
#   step_factor         fp32
#   K, N, VALUES        N * VALUES >= K: see token_tiles.py
#   BLOCK, QMAX, RMS, CLAMP   see rotate_and_store


@triton.jit
def _finish(
    y,
    token,
    channel_scale_ptr,
    out_ptr,
    x_scale_ptr,
    step_factor,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    QMAX: tl.constexpr,
    RMS: tl.constexpr,
    CLAMP: tl.constexpr,
    TOKEN: tl.constexpr,
):
    """Smooth, rotate and store the pieces y of a token, permuted already. TOKEN: what products with
    a scale of bf16 are rounded to."""
    if channel_scale_ptr is not None:
        y = multiply(y, load_pieces(channel_scale_ptr, None, K, N, num_values(y)))
        if channel_scale_ptr.dtype.element_ty == tl.bfloat16:
            y = _rounded(y, TOKEN)
    if x_scale_ptr is not None:
        x_scale_ptr += token
    out_row = out_ptr + token * padded_row(K)
    rotate_and_store(y, out_row, x_scale_ptr, step_factor, K, N, BLOCK, QMAX, RMS, CLAMP)


@triton.jit
def row_kernel(
    x_ptr,  # [M, SPLIT] bf16, fp16 or fp32
    x_row_stride,
    second_ptr,  # [M, K - SPLIT] of the same type, or None: SPLIT = K
    second_row_stride,
    channel_scale_ptr,
    permutation_ptr,
    out_ptr,
    x_scale_ptr,
    step_factor,
    SPLIT: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
    QMAX: tl.constexpr,
    RMS: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """y = [x | second]"""
    token = tl.program_id(0).to(tl.int64)
    row = x_ptr + token * x_row_stride
    indices = None
    if permutation_ptr is not None:
        indices = load_pieces(permutation_ptr, None, K, N, VALUES)
    if second_ptr is None:
        pieces = load_pieces(row, indices, K, N, VALUES)
    else:
        second = second_ptr + token * second_row_stride
        pieces = load_two_rows(row, second, indices, SPLIT, K, N, VALUES)
    _finish(
        to_float(pieces),
        token,
        channel_scale_ptr,
        out_ptr,
        x_scale_ptr,
        step_factor,
        K,
        N,
        BLOCK,
        QMAX,
        RMS,
        CLAMP,
        x_ptr.dtype.element_ty,
    )


@triton.jit
def _sigmoid_of_log2(t):
    """1 / (1 + 2^-t) by ex2.approx and rsqrt.approx, whose square is as good as rcp.approx."""
    root = tl.rsqrt(1.0 + tl.exp2(-t))
    return root * root


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2u); the factors are 2 sqrt(2 / pi) log2(e) and 0.044715 of it
        return x * _sigmoid_of_log2(x * tl.fma(x * x, 0.10294324, 2.3022082))
    elif ACTIVATION == "gelu_erf":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        return x * _sigmoid_of_log2(x * 1.4426950408889634)


@triton.jit
def activation_kernel(
    x_ptr,  # [M, K] bf16, fp16 or fp32
    x_row_stride,
    gate_ptr,  # [M, K] of the same type, or None
    gate_row_stride,
    kept_ptr,  # [M, padded_row(K)] of the same type: y, rounded; None, or no permutation
    channel_scale_ptr,
    permutation_ptr,
    out_ptr,
    x_scale_ptr,
    step_factor,
    ACTIVATION: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
    QMAX: tl.constexpr,
    RMS: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """y = act(x), or act(gate) * x"""
    token = tl.program_id(0).to(tl.int64)
    indices = None
    if permutation_ptr is not None:
        indices = load_pieces(permutation_ptr, None, K, N, VALUES)
    pieces = load_pieces(x_ptr + token * x_row_stride, indices, K, N, VALUES)
    if gate_ptr is not None:
        gates = load_pieces(gate_ptr + token * gate_row_stride, indices, K, N, VALUES)
    v = ()
    for piece in tl.static_range(len(pieces)):
        if gate_ptr is not None:
            y = _activate(gates[piece].to(tl.float32), ACTIVATION) * pieces[piece].to(tl.float32)
        else:
            y = _activate(pieces[piece].to(tl.float32), ACTIVATION)
        v = v + (y,)
    if kept_ptr is not None:
        store_pieces(kept_ptr + token * padded_row(K), v, K, N)
    _finish(
        v,
        token,
        channel_scale_ptr,
        out_ptr,
        x_scale_ptr,
        step_factor,
        K,
        N,
        BLOCK,
        QMAX,
        RMS,
        CLAMP,
        tl.float32,
    )


@triton.jit
def norm_kernel(
    x_ptr,  # [B, T, K] bf16, fp16 or fp32
    x_sample_stride,
    x_row_stride,
    tokens_per_sample,  # T
    norm_weight_ptr,  # [K] of x's type or fp32, or None; so norm_bias
    norm_bias_ptr,
    scale_ptr,  # [B, K] of x's type or fp32, or None; so shift
    scale_row_stride,
    shift_ptr,
    shift_row_stride,
    eps,  # fp32
    kept_ptr,  # [B, T, padded_row(K)] of x's type: y, rounded; None, or no permutation
    channel_scale_ptr,
    permutation_ptr,
    out_ptr,
    x_scale_ptr,
    step_factor,
    LAYER_NORM: tl.constexpr,  # else RMSNorm
    K: tl.constexpr,
    N: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
    QMAX: tl.constexpr,
    RMS: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """y = (norm(x) * norm_weight + norm_bias) * (1 + scale) + shift, rounded to the type of x as
    reference.norm_modulate says"""
    token = tl.program_id(0)
    sample = (token // tokens_per_sample).to(tl.int64)
    row = x_ptr + sample * x_sample_stride
    row += (token - sample * tokens_per_sample) * x_row_stride
    token = token.to(tl.int64)
    indices = None
    if permutation_ptr is not None:
        indices = load_pieces(permutation_ptr, None, K, N, VALUES)
    v = to_float(load_pieces(row, indices, K, N, VALUES))
    if LAYER_NORM:
        v = _subtract(v, token_sum(v) / K, K, N)
    y = _multiply_by_scalar(v, tl.rsqrt(token_square_sum(v) / K + eps))
    if norm_weight_ptr is not None:
        y = multiply(y, load_pieces(norm_weight_ptr, indices, K, N, VALUES))
    if norm_bias_ptr is not None:
        y = _add(y, load_pieces(norm_bias_ptr, indices, K, N, VALUES))
    TOKEN: tl.constexpr = x_ptr.dtype.element_ty
    STEP: tl.constexpr = _step_type(x_ptr, scale_ptr, shift_ptr)
    # As reference.joins_modulation says, but for y that is kept.
    JOINS: tl.constexpr = _joins(channel_scale_ptr, scale_ptr, shift_ptr, TOKEN, kept_ptr)
    y = _rounded(y, STEP)
    if JOINS:
        channel_scale = load_pieces(channel_scale_ptr, None, K, N, VALUES)
    if scale_ptr is not None:
        scale_row = scale_ptr + sample * scale_row_stride
        factor = _one_plus(load_pieces(scale_row, indices, K, N, VALUES), STEP)
        if JOINS:
            factor = _rounded(multiply(factor, channel_scale), STEP)
        y = _rounded(multiply(y, factor), STEP)
    if shift_ptr is not None:
        shift_row = shift_ptr + sample * shift_row_stride
        summand = to_float(load_pieces(shift_row, indices, K, N, VALUES))
        if JOINS:
            summand = _rounded(multiply(summand, channel_scale), STEP)
        y = _add(y, summand)
    y = _rounded(y, TOKEN)
    if JOINS:
        channel_scale_ptr = None
    if kept_ptr is not None:
        store_pieces(kept_ptr + token * padded_row(K), y, K, N)
    _finish(
        y,
        token,
        channel_scale_ptr,
        out_ptr,
        x_scale_ptr,
        step_factor,
        K,
        N,
        BLOCK,
        QMAX,
        RMS,
        CLAMP,
        TOKEN,
    )


@triton.jit
def _subtract(v, mean, K: tl.constexpr, N: tl.constexpr):
    """v - mean, and zero beyond K."""
    out = ()
    for piece in tl.static_range(len(v)):
        if N * num_values(v) == K:
            out = out + (v[piece] - mean,)
        else:
            mask = piece_mask(piece, K, N, num_values(v))
            out = out + (tl.where(mask, v[piece] - mean, 0.0),)
    return out


@triton.jit
def _multiply_by_scalar(v, factor):
    out = ()
    for piece in tl.static_range(len(v)):
        out = out + (v[piece] * factor,)
    return out


@triton.jit
def _add(v, w):
    out = ()
    for piece in tl.static_range(len(v)):
        out = out + (v[piece] + w[piece].to(tl.float32),)
    return out


@triton.jit
def _one_plus(w, TYPE: tl.constexpr):
    """1 + w, rounded to TYPE."""
    out = ()
    for piece in tl.static_range(len(w)):
        out = out + ((1.0 + w[piece].to(tl.float32)).to(TYPE).to(tl.float32),)
    return out


@triton.constexpr_function
def _joins(channel_scale_ptr, scale_ptr, shift_ptr, token_type, kept_ptr):
    """Whether a channel scale joins 1 + scale and shift."""
    if channel_scale_ptr is None or scale_ptr is None or shift_ptr is None or kept_ptr is not None:
        return False
    types = [v.dtype.element_ty for v in (scale_ptr, shift_ptr)]
    return channel_scale_ptr.dtype.element_ty == tl.bfloat16 and types == [token_type] * 2


@triton.constexpr_function
def _step_type(x_ptr, scale_ptr, shift_ptr):
    """What the steps of a modulation round to: the type of x where all vectors have it."""
    vectors = [v for v in (scale_ptr, shift_ptr) if v is not None]
    x_type = x_ptr.dtype.element_ty
    return x_type if all(v.dtype.element_ty == x_type for v in vectors) else tl.float32


@triton.jit
def _rounded(v, TYPE: tl.constexpr):
    """Rounded to TYPE, in fp32."""
    out = ()
    for piece in tl.static_range(len(v)):
        out = out + (v[piece].to(TYPE).to(tl.float32),)
    return out

"""Triton kernels of the "dual" rotation: x[permutation of all K] between two dense products with
matrices [128, 128]. rotate_quantize.py launches.

dual_kernel does all of it in one launch, where a token and both matrices fit shared memory. A
program holds whole tokens, as rows of 128:

    row       0 .. K/128 - 1     K/128 .. 2K/128 - 1     ..    left over: zeros
    holds     token 0            token 1

    x -> times the first matrix -> shared memory -> gathered -> times the second -> x_scale, codes

block_dense_kernel is one of the products, for everything else.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .token_tiles import MAGIC

# How much finer the second half of a number is than the first, which has 11 bits.
_FINER = tl.constexpr(2048.0)


@triton.jit
def _halves(v, size):
    """(high, low, power): v = (high + low / 2048) * power to 22 bits of the numbers near `size`.

    high, low: fp16. size: the largest |v|, its bits as int32, which order like the numbers, and NaN
    above infinity. power: a power of two, so that it takes nothing from v; not so small or large
    that its inverse would be none. What is not finite stays so in high.
    """
    power = tl.minimum(tl.maximum(size & 0x7F800000, 0x00800000), 0x7E800000)
    v = v * (0x7F000000 - power).to(tl.float32, bitcast=True)
    high = v.to(tl.float16)
    low = ((v - high.to(tl.float32)) * _FINER).to(tl.float16)
    return high, low, power.to(tl.float32, bitcast=True)


@triton.jit
def _load_matrix(matrix_ptr):
    """The halves of a matrix [128, 128] fp32."""
    index = tl.arange(0, 128)
    matrix = tl.load(matrix_ptr + index[:, None] * 128 + index[None, :])
    size = tl.max(tl.max(tl.abs(matrix).to(tl.int32, bitcast=True), 1), 0)
    return _halves(matrix, size)


@triton.jit
def _product(v, matrix_high, matrix_low, matrix_power):
    """v [R, 128] @ matrix in fp32, as accurate as that: high * high and both mixed products.

    The small ones come first, for tensor cores cut off the end of every partial sum.
    """
    size = tl.max(tl.abs(v).to(tl.int32, bitcast=True), 1)[:, None]
    high, low, power = _halves(v, size)
    total = tl.dot(low, matrix_high)
    total = tl.dot(high, matrix_low, total)
    total = tl.dot(high, matrix_high, total * (1.0 / _FINER))
    return total * (power * matrix_power)


@triton.jit
def dual_kernel(
    x_ptr,  # [M, K] bf16, fp16 or fp32
    x_row_stride,
    channel_scale_ptr,  # [K] fp32 or None
    permutation_ptr,  # [K] int32 or None
    matrices_ptr,  # [2, 128, 128] fp32
    out_ptr,  # [M, K / 4] int32: four int8 codes; [M, K] floating point when x_scale_ptr is None
    x_scale_ptr,  # [M] fp32, or None: store the rotated tokens, unquantized
    step_factor,  # fp32
    num_tokens,  # M
    K: tl.constexpr,
    TOKENS: tl.constexpr,  # of a program at a time, whole ones
    SLOTS: tl.constexpr,  # TOKENS, rounded up to a power of two
    ROWS: tl.constexpr,  # TOKENS * K / 128, rounded up to a power of two
    QMAX: tl.constexpr,
    RMS: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """v = ((x * channel_scale) @ blockdiag(first))[permutation] @ blockdiag(second), quantized as
    rotate_and_store of token_tiles.py does it. A program takes TOKENS tokens after others."""
    row = tl.arange(0, ROWS)
    own = row // (K // 128)
    place = (row % (K // 128))[:, None] * 128 + tl.arange(0, 128)[None, :]
    slot = tl.arange(0, SLOTS)
    is_slot = own[None, :] == slot[:, None]
    high_1, low_1, power_1 = _load_matrix(matrices_ptr)
    high_2, low_2, power_2 = _load_matrix(matrices_ptr + 128 * 128)
    # Whatever does not change would be kept in registers by disable_licm=False, which then spill.
    for tile in tl.range(
        tl.program_id(0).to(tl.int64),
        tl.cdiv(num_tokens, TOKENS),
        tl.num_programs(0),
        num_stages=1,
        disable_licm=True,
    ):
        start = tile * TOKENS
        left = tl.minimum(num_tokens - start, TOKENS)
        mask = (own < left)[:, None]
        x_place = own[:, None] * x_row_stride + place
        v = tl.load(x_ptr + start * x_row_stride + x_place, mask=mask, other=0.0).to(tl.float32)
        if channel_scale_ptr is not None:
            v = v * tl.load(channel_scale_ptr + place)
        v = _product(v, high_1, low_1, power_1)
        if permutation_ptr is not None:
            source = tl.where(mask, own[:, None] * K + tl.load(permutation_ptr + place), 0)
            v = tl.gather(tl.reshape(v, (ROWS * 128,)), tl.reshape(source, (ROWS * 128,)), 0)
            v = tl.reshape(v, (ROWS, 128))
        v = _product(v, high_2, low_2, power_2)
        if x_scale_ptr is None:
            out = out_ptr + start * K + (own[:, None] * K + place)
            tl.store(out, v.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            if RMS:
                square = tl.sum(v * v, 1)[None, :]
                size = tl.sqrt_rn(tl.sum(tl.where(is_slot, square, 0.0), 1) / K)
            else:
                most = tl.max(tl.abs(v).to(tl.int32, bitcast=True), 1)[None, :]
                size = tl.max(tl.where(is_slot, most, 0), 1).to(tl.float32, bitcast=True)
            x_scale = size * step_factor
            tl.store(x_scale_ptr + start + slot, x_scale, mask=slot < left)
            inverse = tl.div_rn(1.0, x_scale)
            inverse = tl.where((inverse > 0) & (inverse < float("inf")), inverse, 0.0)
            inverse = tl.sum(tl.where(is_slot, inverse[:, None], 0.0), 0)[:, None]
            code = tl.fma(v, tl.broadcast_to(inverse, v.shape), MAGIC)
            if CLAMP:
                code = tl.minimum(tl.maximum(code, MAGIC - QMAX), MAGIC + QMAX)
            code = tl.where(inverse > 0, code.to(tl.int32, bitcast=True), 0) & 255
            # Bytes are put together here: a conversion of int8 from the layout of a product may go
            # wrong, see token_tiles.py.
            even, odd = tl.split(tl.reshape(code, (ROWS, 64, 2)))
            even, odd = tl.split(tl.reshape(even | (odd << 8), (ROWS, 32, 2)))
            quad = (row % (K // 128))[:, None] * 32 + tl.arange(0, 32)[None, :]
            out = out_ptr + start * (K // 4) + (own[:, None] * (K // 4) + quad)
            tl.store(out, even | (odd << 16), mask=mask)


@triton.jit
def block_dense_kernel(
    x_ptr,  # [M, K] bf16, fp16 or fp32
    x_row_stride,
    channel_scale_ptr,  # [K] fp32 or None
    permutation_ptr,  # [K] int32 or None
    matrix_ptr,  # [128, 128] fp32
    out_ptr,  # [M, K]
    num_rows,  # M * K / 128
    K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """out[m] = (x[m][permutation] * channel_scale) @ blockdiag(matrix); a program multiplies ROWS
    blocks of 128, which may belong to several tokens."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = (row < num_rows)[:, None]
    token = (row // (K // 128))[:, None]
    place = (row % (K // 128)).to(tl.int32)[:, None] * 128 + tl.arange(0, 128)[None, :]
    source = place
    if permutation_ptr is not None:
        source = tl.load(permutation_ptr + place)
    v = tl.load(x_ptr + token * x_row_stride + source, mask=mask, other=0.0).to(tl.float32)
    if channel_scale_ptr is not None:
        v = v * tl.load(channel_scale_ptr + place)
    high, low, power = _load_matrix(matrix_ptr)
    v = _product(v, high, low, power)
    tl.store(out_ptr + token * K + place, v.to(out_ptr.dtype.element_ty), mask=mask)

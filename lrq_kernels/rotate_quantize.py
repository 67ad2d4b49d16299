"""Triton kernels of lrq::rotate_quantize and lrq::rotate, and their launchers.

    v = rotation(x[permutation] * channel_scale)          fp32, one token (row of x) at a time
    x_scale = step of the token,  x_q = rint(v / x_scale)

A token stays in the registers of one program from load to store, so x is read once. The block
Hadamard is a product with a constant H16 on the tensor cores and butterflies between registers;
its operands are split so that it is as accurate as fp32 (see `_times_hadamard16`). The "dual"
rotation needs whole-row permutation between two dense products: it runs as separate launches with
an fp32 intermediate that stays in the L2 cache.

Imported by ops.py on the first CUDA call, never on import of the package. Arguments are validated
there; the functions here trust them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Width of a tile row: the Hadamard blocks of most models, and the only size of a dense factor.
_WIDTH = 128
# fp32 has unit spacing just above 1.5 * 2^23: adding it rounds half to even, and the low byte of
# the sum is the rounded integer in two's complement.
_MAGIC = tl.constexpr(12582912.0)
# Blocks of 128 that one program of the dense kernel multiplies, and its warps: 4 of them
# spill on sm_80.
_DENSE_ROWS = 64
_DENSE_WARPS = 8
# Elements of the fp32 intermediates of "dual" (two of 16 MiB): they fit the 50 MB L2 of an H200.
_DUAL_ELEMENTS = 1 << 22

# ---- kernels ------------------------------------------------------------------------------------


@triton.jit
def _times_hadamard16(a):
    """a fp32 [R, 16] @ H16, H16[i, j] = (-1)^popcount(i & j), with the error of fp32 arithmetic.

    a = high + low with 11 leading bits in high, so both parts are exact in tf32 (low up to 2^-22 of
    a) and so are the products with +-1. The small part is summed first: tensor cores truncate
    their sums, and this leaves that error to the last two of four steps.
    """
    c = tl.arange(0, 16)
    parity = c[:, None] & c[None, :]
    parity = parity ^ (parity >> 2)
    parity = (parity ^ (parity >> 1)) & 1
    h = (1 - 2 * parity).to(tl.float32)
    high = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    y = tl.dot(a - high, h, input_precision="tf32")
    return tl.dot(high, h, y, input_precision="tf32")


@triton.jit
def _butterfly(y, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """(a, b) -> (a + b, a - b) for all pairs of y [SIZE] that are STRIDE apart."""
    y = tl.reshape(y, (SIZE // (2 * STRIDE), 2, STRIDE))
    first, second = tl.split(tl.permute(y, (0, 2, 1)))
    y = tl.permute(tl.join(first + second, first - second), (0, 2, 1))
    return tl.reshape(y, (SIZE,))


@triton.jit
def _block_hadamard(v, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """v fp32 [ROWS, WIDTH] times blockdiag(H_BLOCK), not normalized; natural Sylvester order.

    An index is (block, r, c, j): r counts the tile rows of a block, c = 0..15, j the low bits.
    H_BLOCK is the Kronecker product over r, c and j, applied in any order: H16 over c as a dot, the
    rest as butterflies. The rows of the dot are ordered so that these stay inside a thread (one
    stage aside where BLOCK > WIDTH leaves few blocks):

        row of the dot, high bits first    j high, r | block high | j low    | block low
        where the accumulator holds it     registers | warps      | register | 8 lanes
    """
    J: tl.constexpr = WIDTH // 32
    R: tl.constexpr = BLOCK // WIDTH
    BLOCKS: tl.constexpr = ROWS // R
    LOW: tl.constexpr = BLOCKS if BLOCKS < 8 else 8
    HIGH: tl.constexpr = BLOCKS // LOW
    SIZE: tl.constexpr = ROWS * WIDTH
    a = tl.permute(tl.reshape(v, (HIGH, LOW, R, 16, J, 2)), (4, 2, 0, 5, 1, 3))
    y = tl.reshape(_times_hadamard16(tl.reshape(a, (SIZE // 16, 16))), (SIZE,))
    y = _butterfly(y, SIZE, LOW * 16)
    for stage in tl.static_range((J * R).bit_length() - 1):
        y = _butterfly(y, SIZE, SIZE >> (stage + 1))
    y = tl.permute(tl.reshape(y, (J, R, HIGH, 2, LOW, 16)), (2, 4, 1, 5, 0, 3))
    return tl.reshape(y, (ROWS, WIDTH))


@triton.jit
def _row_kernel(
    x_ptr,  # [M, K] bf16, fp16 or fp32
    x_row_stride,
    channel_scale_ptr,  # [K] fp32 or None
    permutation_ptr,  # [K] int32 or None
    out_ptr,  # [M, K] int8 codes, or floating point when x_scale_ptr is None
    x_scale_ptr,  # [M] fp32, or None: store the rotated row, unquantized
    step_factor,  # fp32
    K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # 1: no rotation
    QMAX: tl.constexpr,
    RMS: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """One token, k = 0..K-1 padded to ROWS * WIDTH:

    v[k]    = (x[permutation[k]] * channel_scale[k]) @ blockdiag(H_BLOCK) / sqrt(BLOCK)
    x_scale = (RMS ? sqrt(mean v^2) : max|v|) * step_factor
    x_q[k]  = clamp(rint(v[k] / x_scale), -QMAX, QMAX), and 0 unless 0 < x_scale < inf
    """
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = k < K
    if permutation_ptr is None:
        source = k
    else:
        source = tl.load(permutation_ptr + k, mask=mask, other=0)
    v = tl.load(x_ptr + token * x_row_stride + source, mask=mask, other=0.0).to(tl.float32)
    if channel_scale_ptr is not None:
        v = v * tl.load(channel_scale_ptr + k, mask=mask, other=0.0)
    # The norm of H rides on the scalars of the row instead of on every element.
    NORM: tl.constexpr = BLOCK**-0.5
    if BLOCK > 1:
        v = _block_hadamard(v, ROWS, WIDTH, BLOCK)
    out = out_ptr + token * K + k
    if x_scale_ptr is None:
        tl.store(out, (v * NORM).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        if RMS:
            size = tl.sqrt_rn(tl.sum(v * v) / K)
        else:
            # |v| as integers sorts like the numbers, and NaN above infinity: it is not lost.
            bits = tl.abs(v).to(tl.int32, bitcast=True)
            size = tl.max(bits).to(tl.float32, bitcast=True)
        x_scale = size * NORM * step_factor
        tl.store(x_scale_ptr + token, x_scale)
        inverse = tl.div_rn(1.0, x_scale)
        if (inverse > 0) & (inverse < float("inf")):
            codes = tl.fma(v, inverse * NORM, _MAGIC)
            if CLAMP:
                codes = tl.minimum(tl.maximum(codes, _MAGIC - QMAX), _MAGIC + QMAX)
            tl.store(out, codes.to(tl.int32, bitcast=True).to(tl.int8), mask=mask)
        else:
            tl.store(out, tl.zeros((ROWS, WIDTH), tl.int8), mask=mask)


@triton.jit
def _block_dense_kernel(
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
    """out[m] = (x[m][permutation] * channel_scale) @ blockdiag(matrix), as accurate as fp32.

    A program multiplies ROWS blocks of 128, which may belong to several tokens. Products of 32
    terms are added outside the tensor cores, because those truncate their sums.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = (row < num_rows)[:, None]
    token = (row // (K // 128))[:, None]
    block = (row % (K // 128)).to(tl.int32)[:, None] * 128
    column = tl.arange(0, 128)[None, :]
    total = tl.zeros((ROWS, 128), tl.float32)
    for start in tl.range(0, 128, 32, num_stages=1):
        term = start + tl.arange(0, 32)
        k = block + term[None, :]
        if permutation_ptr is None:
            source = k
        else:
            source = tl.load(permutation_ptr + k, mask=mask, other=0)
        a = tl.load(x_ptr + token * x_row_stride + source, mask=mask, other=0.0).to(tl.float32)
        if channel_scale_ptr is not None:
            a = a * tl.load(channel_scale_ptr + k, mask=mask, other=0.0)
        b = tl.load(matrix_ptr + term[:, None] * 128 + column)
        total += tl.dot(a, b, input_precision="tf32x3")
    tl.store(out_ptr + token * K + block + column, total.to(out_ptr.dtype.element_ty), mask=mask)


# ---- launchers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowLaunch:
    """Tile and warps of `_row_kernel`: one token is a [rows, width] tile."""

    rows: int
    width: int
    num_warps: int


def row_launch(in_features: int, block_size: int) -> RowLaunch:
    """Launch parameters for a token of in_features (block_size 1: no rotation).

    32 elements a thread: about 100 registers, so that 16 warps or more share an SM. On an H200
    (2026-11-22) prototypes of this form were bound by latency and occupancy, and few warps a
    program with many programs an SM won.
    """
    width = min(block_size, _WIDTH) if block_size > 1 else _WIDTH
    # A dot has at least 16 rows, width / 16 of them for each tile row.
    fewest = max(block_size // width, 256 // width)
    needed = -(-in_features // width)
    rows = max(fewest, 1 << (needed - 1).bit_length())
    num_warps = min(16, max(1, rows * width // 1024))
    return RowLaunch(rows, width, num_warps)


def _launch_rows(
    x: Tensor,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    out: Tensor,
    x_scale: Tensor | None,
    block_size: int,
    step: tuple[int, bool, float],
) -> None:
    """Run `_row_kernel` on x [M, K]; step = (qmax, rms, scale_factor), unused without x_scale."""
    tokens, in_features = x.shape
    qmax, rms, scale_factor = step
    launch = row_launch(in_features, block_size)
    _row_kernel[(tokens,)](
        x,
        x.stride(0),
        channel_scale,
        permutation,
        out,
        x_scale,
        scale_factor if rms else scale_factor / qmax,
        K=in_features,
        ROWS=launch.rows,
        WIDTH=launch.width,
        BLOCK=block_size,
        QMAX=qmax,
        RMS=rms,
        CLAMP=rms or scale_factor < 1.0,
        num_warps=launch.num_warps,
    )


def _launch_dense(
    x: Tensor,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrix: Tensor,
    out: Tensor,
) -> None:
    """Run `_block_dense_kernel`: x [M, K] -> out [M, K]."""
    tokens, in_features = x.shape
    num_rows = tokens * in_features // _WIDTH
    _block_dense_kernel[(triton.cdiv(num_rows, _DENSE_ROWS),)](
        x,
        x.stride(0),
        channel_scale,
        permutation,
        matrix,
        out,
        num_rows,
        K=in_features,
        ROWS=_DENSE_ROWS,
        num_warps=_DENSE_WARPS,
    )


def _launch_dual(
    x: Tensor,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor,
    out: Tensor,
    quantized: tuple[Tensor, tuple[int, bool, float]] | None,
) -> None:
    """out = ((x * channel_scale) @ R1)[permutation] @ R2, then quantized to (x_scale, step)."""
    tokens, in_features = x.shape
    chunk = max(1, _DUAL_ELEMENTS // in_features)
    shape = (min(chunk, tokens), in_features)
    first = torch.empty(shape, dtype=torch.float32, device=x.device)
    second = torch.empty_like(first) if quantized else None
    for start in range(0, tokens, chunk):
        stop = min(start + chunk, tokens)
        part, rows = slice(start, stop), slice(0, stop - start)
        _launch_dense(x[part], channel_scale, None, matrices[0], first[rows])
        if quantized is None or second is None:
            _launch_dense(first[rows], None, permutation, matrices[1], out[part])
        else:
            x_scale, step = quantized
            _launch_dense(first[rows], None, permutation, matrices[1], second[rows])
            _launch_rows(second[rows], None, None, out[part], x_scale[part], 1, step)


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
    """lrq::rotate_quantize on a GPU: (x_q int8 [..., K], x_scale fp32 [...]); see reference.py."""
    x_q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if x.numel() == 0:
        return x_q, torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device)
    x_scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows, out, scale = x.reshape(-1, x.shape[-1]), x_q.view(-1, x.shape[-1]), x_scale.view(-1)
    step = (2 ** (act_bits - 1) - 1, scale_mode == "rms", scale_factor)
    with torch.cuda.device_of(x):
        if matrices is not None:
            _launch_dual(rows, channel_scale, permutation, matrices, out, (scale, step))
        else:
            block = block_size if rotation == "hadamard" else 1
            _launch_rows(rows, channel_scale, permutation, out, scale, block, step)
    return x_q, x_scale


def rotate(
    x: Tensor,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
) -> Tensor:
    """lrq::rotate on a GPU: the rotated x [..., K] in x's dtype; see reference.py."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    rows, out = x.reshape(-1, x.shape[-1]), y.view(-1, x.shape[-1])
    with torch.cuda.device_of(x):
        if matrices is not None:
            _launch_dual(rows, channel_scale, permutation, matrices, out, None)
        else:
            block = block_size if rotation == "hadamard" else 1
            _launch_rows(rows, channel_scale, permutation, out, None, block, (1, False, 1.0))
    return y

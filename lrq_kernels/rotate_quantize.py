"""Triton kernels of lrq::rotate_quantize and lrq::rotate, and their launchers.

    v = rotation(x[permutation] * channel_scale)          fp32, one token (row of x) at a time
    x_scale = step of the token,  x_q = rint(v / x_scale)

A token stays in the registers of one program from load to store, so x is read once. The block
Hadamard is seven to ten stages of fp32 additions on values that never leave the place they were
loaded to: most stages pair registers of one thread, the others lanes of one warp (see "A token in
registers"). The "dual" rotation needs whole-row permutation between two dense products: it runs as
separate launches with an fp32 intermediate that stays in the L2 cache.

Imported by ops.py on the first CUDA call, never on import of the package. Arguments are validated
there; the functions here trust them.
"""

# A tuple that grows in a kernel has no one type for Python.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Width of the dense factors of "dual", and of a block of a token in registers.
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

# ---- a token in registers -----------------------------------------------------------------------
#
# A token is a tuple of tiles [N], one value a thread (or a few). Which bit of k selects what:
#
#     bits of k     high    | 9 8 7   6 5       4 3     2 1 0
#     selects       element | element quarter   element column
#                   (warp)  | (lane)  of tuple  (lane)  of tuple
#
# Element n of a tile stands for k = 128 * (n // 4) + 32 * quarter + 8 * (n % 4) + column: a thread
# loads eight neighbours (its columns) with one instruction. The tuple lists columns fastest, then
# quarters, then chunks of 32 * N elements: more than one chunk avoids padding a token to a power of
# two. N is a multiple of 32, and elements 32i..32i+31 sit in the lanes of one warp.
#
# Values leave the thread that loaded them only for butterflies between lanes: no layout conversion
# happens (a test asserts it). That is for speed, but also because Triton 3.6 and 3.7 miscompile
# conversions of int8 inside a warp that reorder the bytes of a register: an earlier form of the
# kernel swapped the codes 1 and 2 of every four that way. Correctness needs no particular layout.
# Rows of an odd width would bring such a conversion in, as a thread's eight codes are then no
# aligned piece: they are written to rows of a multiple of eight and copied.


@triton.jit
def _piece(GROUP: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """k [N, 8] of all columns of GROUP = 4 * chunk + quarter, and the mask k < K."""
    n = tl.arange(0, N)[:, None]
    first = (GROUP // 4) * (32 * N) + (n >> 2) * 128 + (GROUP % 4) * 32 + (n & 3) * 8
    k = first + tl.arange(0, 8)[None, :]
    if (GROUP // 4 + 1) * 32 * N <= K:
        mask = tl.full((N, 1), 1, tl.int1)  # the compiler drops it
    elif K % 8 == 0:
        # One condition for all columns of a thread keeps the access one wide instruction.
        mask = first < K
    else:
        mask = k < K
    return k, mask


@triton.jit
def _load_pieces(row_ptr, K: tl.constexpr, N: tl.constexpr, CHUNKS: tl.constexpr):
    """A row [K] as one piece [N, 8] for each group."""
    pieces = ()
    for group in tl.static_range(4 * CHUNKS):
        k, mask = _piece(group, N, K)
        pieces = pieces + (tl.load(row_ptr + k, mask=mask, other=0),)
    return pieces


@triton.jit
def _halves(piece):
    """[N, C] -> its even and its odd columns, each [N, C / 2]."""
    return tl.split(tl.reshape(piece, (piece.shape[0], piece.shape[1] // 2, 2)))


@triton.jit
def _columns(piece):
    """[N, 8] -> eight tiles [N]."""
    even, odd = _halves(piece)
    c04, c26 = _halves(even)
    c15, c37 = _halves(odd)
    c0, c4 = tl.split(c04)
    c1, c5 = tl.split(c15)
    c2, c6 = tl.split(c26)
    c3, c7 = tl.split(c37)
    return c0, c1, c2, c3, c4, c5, c6, c7


@triton.jit
def _to_piece(c):
    """Eight tiles [N] -> [N, 8]."""
    even = tl.join(tl.join(c[0], c[4]), tl.join(c[2], c[6]))
    odd = tl.join(tl.join(c[1], c[5]), tl.join(c[3], c[7]))
    return tl.reshape(tl.join(even, odd), (c[0].shape[0], 8))


@triton.jit
def _load_scaled(
    row_ptr,
    channel_scale_ptr,
    permutation_ptr,
    K: tl.constexpr,
    N: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """x[permutation] * channel_scale as a token of fp32 in registers, zero beyond K."""
    if permutation_ptr is None:
        pieces = _load_pieces(row_ptr, K, N, CHUNKS)
    else:
        pieces = _load_pieces(permutation_ptr, K, N, CHUNKS)
    if channel_scale_ptr is not None:
        scale_pieces = _load_pieces(channel_scale_ptr, K, N, CHUNKS)
    v = ()
    for group in tl.static_range(4 * CHUNKS):
        piece = pieces[group]
        if permutation_ptr is not None:
            _, mask = _piece(group, N, K)
            piece = tl.load(row_ptr + piece, mask=mask, other=0.0)
        columns = _columns(piece.to(tl.float32))
        if channel_scale_ptr is not None:
            scales = _columns(scale_pieces[group])
        for c in tl.static_range(8):
            if channel_scale_ptr is not None:
                v = v + (columns[c] * scales[c],)
            else:
                v = v + (columns[c],)
    return v


@triton.jit
def _between_tiles(v, STRIDE: tl.constexpr):
    """(a, b) -> (a + b, a - b) for all pairs of tiles that are STRIDE apart in the tuple."""
    out = ()
    for i in tl.static_range(len(v)):
        if i & STRIDE:
            out = out + (v[i - STRIDE] - v[i],)
        else:
            out = out + (v[i] + v[i + STRIDE],)
    return out


@triton.jit
def _between_lanes(v, STRIDE: tl.constexpr):
    """(a, b) -> (a + b, a - b) for all pairs of elements that are STRIDE < 32 apart in a tile."""
    N: tl.constexpr = v[0].shape[0]
    lane = tl.broadcast_to(tl.arange(0, 32)[None, :], (N // 32, 32))
    sign = tl.where((lane & STRIDE) == 0, 1.0, -1.0)
    out = ()
    for i in tl.static_range(len(v)):
        own = tl.reshape(v[i], (N // 32, 32))
        other = tl.gather(own, lane ^ STRIDE, 1)
        out = out + (tl.reshape(tl.fma(own, sign, other), (N,)),)
    return out


@triton.jit
def _block_hadamard(v, BLOCK: tl.constexpr):
    """v @ blockdiag(H_BLOCK), not normalized; BLOCK = 32..1024, or 1: v itself.

    The natural Sylvester matrix is one butterfly stage for each bit of k, in any order.
    """
    if BLOCK >= 32:
        v = _between_tiles(_between_tiles(_between_tiles(v, 1), 2), 4)
        v = _between_lanes(_between_lanes(v, 1), 2)
    if BLOCK >= 64:
        v = _between_tiles(v, 8)
    if BLOCK >= 128:
        v = _between_tiles(v, 16)
    if BLOCK >= 256:
        v = _between_lanes(v, 4)
    if BLOCK >= 512:
        v = _between_lanes(v, 8)
    if BLOCK >= 1024:
        v = _between_lanes(v, 16)
    return v


@triton.jit
def _token_size(v, K: tl.constexpr, RMS: tl.constexpr):
    """sqrt(mean v^2), or max |v|; NaN when any element is."""
    if RMS:
        total = v[0] * v[0]
        for i in tl.static_range(1, len(v)):
            total = tl.fma(v[i], v[i], total)
        return tl.sqrt_rn(tl.sum(total) / K)
    else:
        largest = tl.abs(v[0])
        for i in tl.static_range(1, len(v)):
            largest = tl.maximum(largest, tl.abs(v[i]), propagate_nan=tl.PropagateNan.ALL)
        # Integers sort like the non-negative numbers they encode, and NaN above infinity.
        bits = tl.abs(largest).to(tl.int32, bitcast=True)
        return tl.max(bits).to(tl.float32, bitcast=True)


# ---- kernels ------------------------------------------------------------------------------------


@triton.jit
def _row_kernel(
    x_ptr,  # [M, K] bf16, fp16 or fp32
    x_row_stride,
    channel_scale_ptr,  # [K] fp32 or None
    permutation_ptr,  # [K] int32 or None
    out_ptr,  # [M, ceil8(K)] int8 codes, or floating point when x_scale_ptr is None
    x_scale_ptr,  # [M] fp32, or None: store the rotated row, unquantized
    step_factor,  # fp32
    K: tl.constexpr,
    N: tl.constexpr,
    CHUNKS: tl.constexpr,  # 32 * N * CHUNKS >= K
    BLOCK: tl.constexpr,  # 1: no rotation
    QMAX: tl.constexpr,
    RMS: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """One token:

    v[k]    = (x[permutation[k]] * channel_scale[k]) @ blockdiag(H_BLOCK) / sqrt(BLOCK)
    x_scale = (RMS ? sqrt(mean v^2) : max|v|) * step_factor
    x_q[k]  = clamp(rint(v[k] / x_scale), -QMAX, QMAX), and 0 unless 0 < x_scale < inf
    """
    token = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + token * x_row_stride
    OUT_K: tl.constexpr = (K + 7) // 8 * 8
    out_row = out_ptr + token * OUT_K
    v = _load_scaled(x_row, channel_scale_ptr, permutation_ptr, K, N, CHUNKS)
    v = _block_hadamard(v, BLOCK)
    # The norm of H rides on the scalars of the row instead of on every element.
    NORM: tl.constexpr = BLOCK**-0.5
    if x_scale_ptr is None:
        for group in tl.static_range(4 * CHUNKS):
            columns = ()
            for c in tl.static_range(8):
                columns = columns + ((v[8 * group + c] * NORM).to(out_ptr.dtype.element_ty),)
            k, mask = _piece(group, N, OUT_K)
            tl.store(out_row + k, _to_piece(columns), mask=mask)
    else:
        x_scale = _token_size(v, K, RMS) * NORM * step_factor
        tl.store(x_scale_ptr + token, x_scale)
        inverse = tl.div_rn(1.0, x_scale)
        if (inverse > 0) & (inverse < float("inf")):
            for group in tl.static_range(4 * CHUNKS):
                columns = ()
                for c in tl.static_range(8):
                    code = tl.fma(v[8 * group + c], inverse * NORM, _MAGIC)
                    if CLAMP:
                        code = tl.minimum(tl.maximum(code, _MAGIC - QMAX), _MAGIC + QMAX)
                    columns = columns + (code.to(tl.int32, bitcast=True).to(tl.int8),)
                k, mask = _piece(group, N, OUT_K)
                tl.store(out_row + k, _to_piece(columns), mask=mask)
        else:
            for group in tl.static_range(4 * CHUNKS):
                k, mask = _piece(group, N, OUT_K)
                tl.store(out_row + k, tl.zeros((N, 8), tl.int8), mask=mask)


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
    """How `_row_kernel` holds a token: `chunks` chunks of 32 tiles of `elements` values."""

    elements: int
    chunks: int
    num_warps: int


def row_launch(in_features: int) -> RowLaunch:
    """Launch parameters for a token of in_features.

    One or two values a thread in each tile: 50 to 90 registers, so that 20 to 40 warps share an SM
    and the loads of several tokens are in flight.
    """
    groups = triton.next_power_of_2(triton.cdiv(in_features, 1024))
    return RowLaunch(elements=32 * groups, chunks=1, num_warps=min(8, groups))


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
    launch = row_launch(in_features)
    padding = -in_features % 8
    rows = out.new_empty(tokens, in_features + padding) if padding else out
    _row_kernel[(tokens,)](
        x,
        x.stride(0),
        channel_scale,
        permutation,
        rows,
        x_scale,
        scale_factor if rms else scale_factor / qmax,
        K=in_features,
        N=launch.elements,
        CHUNKS=launch.chunks,
        BLOCK=block_size,
        QMAX=qmax,
        RMS=rms,
        CLAMP=rms or scale_factor < 1.0,
        num_warps=launch.num_warps,
    )
    if padding:
        out.copy_(rows[:, :in_features])


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

"""A token in the registers of one Triton program: how its K values lie there, how they are loaded,
rotated, measured and stored. Device functions alone; rotate_kernels.py has the kernels.

Each of N = 32 * num_warps threads holds `values` values. They are cut into chunks of 32, 16, 8 or 4
(76 is 32 + 32 + 8 + 4), so that nearly every K of a real model is held without padding: a warp
holds 1152 as 36 values a lane. A chunk of V values a thread covers N * V consecutive k. Which bit
of k selects what inside it:

    bits of k    high   | 9 8 7 |  6 5 4 3 2 1 0
    V = 32       warp     lane  |  P P L L C C C      P  piece of the token
    V = 16       warp     lane  |  P L L L C C C      L  lane: neighbours in a block of 128
    V =  8       warp     lane  |  L L L L C C C      C  column of a piece
    V =  4       warp           |  L L L L L C C

A token is a tuple of pieces [N, 8] (the last one [N, 4] where values is odd in fours): the columns
of a row are neighbours that one thread loads with one instruction. Few large tensors rather than
many small ones, because Triton's compiler takes time quadratic in their number.

Values leave the thread that loaded them only for butterflies between lanes of one warp: a layout
conversion renames registers at most (a test asserts it). That is for speed, but also because Triton
3.6 and 3.7 miscompile conversions of int8 inside a warp that reorder the bytes of a register: an
earlier form of the kernel swapped the codes 1 and 2 of every four that way. So butterflies between
lanes come after those between columns: the gather in them puts columns back into ascending order.
And rows of an odd width, of which a thread's columns are no aligned piece, would bring such a
conversion in: they are written to rows of a multiple of eight, `padded_row`, and copied.
"""

# A tuple that grows in a kernel has no one type for Python.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

# fp32 has unit spacing just above 1.5 * 2^23: adding it rounds half to even, and the low byte of
# the sum is the rounded integer in two's complement.
MAGIC = tl.constexpr(12582912.0)


# ---- places -------------------------------------------------------------------------------------


@triton.constexpr_function
def chunk_size(start, values):
    """Values of the chunk that starts after `start` values: the largest that is left."""
    left = values - start
    return 32 if left >= 32 else 16 if left >= 16 else 8 if left >= 8 else 4


@triton.constexpr_function
def start_of(piece, values):
    """Values before the chunk of a piece; N times that is the first k of the chunk."""
    start = 0
    while start + chunk_size(start, values) <= 8 * piece:
        start += chunk_size(start, values)
    return start


@triton.constexpr_function
def stop_of(piece, values):
    return start_of(piece, values) + chunk_size(start_of(piece, values), values)


@triton.constexpr_function
def num_pieces(values):
    return (values + 7) // 8


@triton.constexpr_function
def padded_row(in_features):
    return (in_features + 7) // 8 * 8


@triton.constexpr_function
def num_values(pieces):
    """Of a token given as pieces."""
    return 8 * len(pieces) - 8 + pieces[-1].shape[1]


@triton.constexpr_function
def log2(power):
    return power.bit_length() - 1


@triton.jit
def piece_columns(PIECE: tl.constexpr, N: tl.constexpr, VALUES: tl.constexpr):
    """k [N, 1] of the first column of each thread."""
    START: tl.constexpr = start_of(PIECE, VALUES)
    V: tl.constexpr = stop_of(PIECE, VALUES) - START
    COLUMNS: tl.constexpr = min(V, 8)
    LANES: tl.constexpr = 128 // V
    GROUP: tl.constexpr = (8 * PIECE - START) // 8
    n = tl.arange(0, N)[:, None]
    in_block = GROUP * COLUMNS * LANES + (n & (LANES - 1)) * COLUMNS
    return START * N + (n >> log2(LANES)) * 128 + in_block


@triton.jit
def piece_mask(PIECE: tl.constexpr, K: tl.constexpr, N: tl.constexpr, VALUES: tl.constexpr):
    """k < K of a piece, [N, 1] or [N, columns]."""
    STOP: tl.constexpr = stop_of(PIECE, VALUES)
    COLUMNS: tl.constexpr = min(STOP - start_of(PIECE, VALUES), 8)
    first = piece_columns(PIECE, N, VALUES)
    if STOP * N <= K:
        mask = tl.full((N, 1), 1, tl.int1)  # the compiler drops it
    elif K % COLUMNS == 0:
        # One condition for all columns of a thread keeps the access one wide instruction.
        mask = first < K
    else:
        mask = first + tl.arange(0, COLUMNS)[None, :] < K
    return mask


@triton.jit
def piece_place(PIECE: tl.constexpr, K: tl.constexpr, N: tl.constexpr, VALUES: tl.constexpr):
    """k [N, columns] of a piece, and its mask."""
    COLUMNS: tl.constexpr = min(stop_of(PIECE, VALUES) - start_of(PIECE, VALUES), 8)
    k = piece_columns(PIECE, N, VALUES) + tl.arange(0, COLUMNS)[None, :]
    return k, piece_mask(PIECE, K, N, VALUES)


# ---- loads and stores ---------------------------------------------------------------------------


@triton.jit
def load_pieces(row_ptr, indices, K: tl.constexpr, N: tl.constexpr, VALUES: tl.constexpr):
    """row[k] as a tuple of pieces, or row[indices[k]] where indices is not None; zero beyond K."""
    pieces = ()
    for piece in tl.static_range(num_pieces(VALUES)):
        k, mask = piece_place(piece, K, N, VALUES)
        if indices is not None:
            k = indices[piece]
        pieces = pieces + (tl.load(row_ptr + k, mask=mask, other=0),)
    return pieces


@triton.jit
def load_two_rows(
    first_ptr,
    second_ptr,
    indices,
    SPLIT: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    VALUES: tl.constexpr,
):
    """load_pieces of [first | second], first holding k < SPLIT."""
    pieces = ()
    for piece in tl.static_range(num_pieces(VALUES)):
        k, mask = piece_place(piece, K, N, VALUES)
        if indices is not None:
            k = indices[piece]
            in_first = k < SPLIT
        elif SPLIT % 8 == 0:
            in_first = piece_columns(piece, N, VALUES) < SPLIT
        else:
            in_first = k < SPLIT
        if (indices is None) & (SPLIT >= N * stop_of(piece, VALUES)):
            loaded = tl.load(first_ptr + k, mask=mask, other=0)
        elif (indices is None) & (SPLIT <= N * start_of(piece, VALUES)):
            loaded = tl.load(second_ptr + (k - SPLIT), mask=mask, other=0)
        else:
            loaded = tl.load(first_ptr + k, mask=mask & in_first, other=0)
            loaded = tl.load(second_ptr + (k - SPLIT), mask=mask & (in_first == 0), other=loaded)
        pieces = pieces + (loaded,)
    return pieces


@triton.jit
def to_float(pieces):
    out = ()
    for piece in tl.static_range(len(pieces)):
        out = out + (pieces[piece].to(tl.float32),)
    return out


@triton.jit
def multiply(v, w):
    """Elementwise product of a token with a vector in pieces."""
    out = ()
    for piece in tl.static_range(len(v)):
        out = out + (v[piece] * w[piece].to(tl.float32),)
    return out


@triton.jit
def store_pieces(row_ptr, v, K: tl.constexpr, N: tl.constexpr):
    """row[k] = v[k], rounded to the type that row_ptr points to; a row of padded_row(K)."""
    for piece in tl.static_range(len(v)):
        k, mask = piece_place(piece, padded_row(K), N, num_values(v))
        tl.store(row_ptr + k, v[piece].to(row_ptr.dtype.element_ty), mask=mask)


# ---- rotation -----------------------------------------------------------------------------------
#
# A stage is (a, b) -> (a + b, a - b) for all pairs of values whose k differ in one bit.


@triton.jit
def _between_columns(piece, STRIDE: tl.constexpr):
    N: tl.constexpr = piece.shape[0]
    COLUMNS: tl.constexpr = piece.shape[1]
    pairs = tl.reshape(piece, (N, COLUMNS // (2 * STRIDE), 2, STRIDE))
    a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    pairs = tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2))
    return tl.reshape(pairs, (N, COLUMNS))


@triton.jit
def _between_lanes(piece, STRIDE: tl.constexpr):
    WARPS: tl.constexpr = piece.shape[0] // 32
    COLUMNS: tl.constexpr = piece.shape[1]
    lane = tl.arange(0, 32)[None, :, None]
    sign = tl.where((lane & STRIDE) == 0, 1.0, -1.0)
    own = tl.reshape(piece, (WARPS, 32, COLUMNS))
    other = tl.gather(own, tl.broadcast_to(lane ^ STRIDE, (WARPS, 32, COLUMNS)), 1)
    return tl.reshape(tl.fma(own, tl.broadcast_to(sign, own.shape), other), (32 * WARPS, COLUMNS))


@triton.jit
def _between_pieces(pieces, STRIDE: tl.constexpr):
    out = ()
    for i in tl.static_range(len(pieces)):
        if STRIDE & i:
            out = out + (pieces[i - STRIDE] - pieces[i],)
        else:
            out = out + (pieces[i] + pieces[i + STRIDE],)
    return out


@triton.jit
def _stage(pieces, BIT: tl.constexpr):
    """The stage of one bit of k on the pieces of a chunk: see the table of bits above."""
    COLUMNS: tl.constexpr = pieces[0].shape[1]
    LANES: tl.constexpr = 128 // (len(pieces) * COLUMNS)
    STRIDE: tl.constexpr = 1 << BIT
    if (STRIDE >= COLUMNS * LANES) & (BIT < 7):
        out = _between_pieces(pieces, STRIDE // (COLUMNS * LANES))
    else:
        out = ()
        for i in tl.static_range(len(pieces)):
            if STRIDE < COLUMNS:
                out = out + (_between_columns(pieces[i], STRIDE),)
            elif BIT < 7:
                out = out + (_between_lanes(pieces[i], STRIDE // COLUMNS),)
            else:
                out = out + (_between_lanes(pieces[i], STRIDE // 128 * LANES),)
    return out


@triton.jit
def _chunk(v, PIECE: tl.constexpr):
    """The pieces of the chunk that begins with a piece."""
    part = ()
    for i in tl.static_range(PIECE, num_pieces(stop_of(PIECE, num_values(v)))):
        part = part + (v[i],)
    return part


@triton.jit
def _chunk_hadamard(pieces, BLOCK: tl.constexpr):
    for bit in tl.static_range(log2(BLOCK)):
        pieces = _stage(pieces, bit)
    return pieces


@triton.jit
def block_hadamard(v, BLOCK: tl.constexpr):
    """v @ blockdiag(H_BLOCK), not normalized; BLOCK = 32..1024, or 1: v itself.

    The natural Sylvester matrix is one butterfly stage for each bit of k, in any order. A block
    lies in the lanes of one warp: every chunk has at least BLOCK / 32 values a thread.
    """
    out = ()
    for piece in tl.static_range(len(v)):
        if start_of(piece, num_values(v)) == 8 * piece:
            out = out + _chunk_hadamard(_chunk(v, piece), BLOCK)
    return out


# ---- sums, step, codes --------------------------------------------------------------------------


@triton.jit
def token_sum(v):
    """Sum of all values of a token."""
    total = v[0]
    for i in tl.static_range(1, len(v)):
        if v[i].shape[1] == v[0].shape[1]:
            total = total + v[i]
    thread = tl.sum(total, 1)
    if v[-1].shape[1] != v[0].shape[1]:
        thread = thread + tl.sum(v[-1], 1)
    return tl.sum(thread, 0)


@triton.jit
def token_square_sum(v):
    squares = ()
    for i in tl.static_range(len(v)):
        squares = squares + (v[i] * v[i],)
    return token_sum(squares)


@triton.jit
def _bits_of_size(v):
    """Integers that sort like |v|, and NaN above infinity."""
    return tl.abs(v).to(tl.int32, bitcast=True)


@triton.jit
def token_absmax(v):
    """max |v|; NaN when any element is."""
    largest = tl.abs(v[0])
    for i in tl.static_range(1, len(v)):
        if v[i].shape[1] == v[0].shape[1]:
            largest = tl.maximum(largest, tl.abs(v[i]), propagate_nan=tl.PropagateNan.ALL)
    thread = tl.max(_bits_of_size(largest), 1)
    if v[-1].shape[1] != v[0].shape[1]:
        thread = tl.maximum(thread, tl.max(_bits_of_size(v[-1]), 1))
    return tl.max(thread, 0).to(tl.float32, bitcast=True)


@triton.jit
def _store_codes(
    out_row, v, factor, K: tl.constexpr, N: tl.constexpr, QMAX: tl.constexpr, CLAMP: tl.constexpr
):
    codes = ()
    for i in tl.static_range(len(v)):
        code = tl.fma(v[i], factor, MAGIC)
        if CLAMP:
            code = tl.minimum(tl.maximum(code, MAGIC - QMAX), MAGIC + QMAX)
        codes = codes + (code.to(tl.int32, bitcast=True),)
    store_pieces(out_row, codes, K, N)


@triton.jit
def _store_zeros(out_row, v, K: tl.constexpr, N: tl.constexpr):
    codes = ()
    for i in tl.static_range(len(v)):
        codes = codes + (tl.zeros(v[i].shape, tl.int8),)
    store_pieces(out_row, codes, K, N)


@triton.jit
def rotate_and_store(
    v,  # pieces of the smoothed token
    out_row,  # [padded_row(K)] int8 codes, or floating point when x_scale_ptr is None
    x_scale_ptr,  # fp32, or None: store the rotated token, unquantized
    step_factor,  # fp32
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,  # 1: no rotation
    QMAX: tl.constexpr,
    RMS: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """v       = v @ blockdiag(H_BLOCK) / sqrt(BLOCK)
    x_scale = (RMS ? sqrt(mean v^2) : max|v|) * step_factor
    x_q     = clamp(rint(v / x_scale), -QMAX, QMAX), and 0 unless 0 < x_scale < inf
    """
    v = block_hadamard(v, BLOCK)
    # The norm of H rides on the scalars of the token instead of on every element.
    NORM: tl.constexpr = BLOCK**-0.5
    if x_scale_ptr is None:
        scaled = ()
        for i in tl.static_range(len(v)):
            scaled = scaled + (v[i] * NORM,)
        store_pieces(out_row, scaled, K, N)
    else:
        if RMS:
            size = tl.sqrt_rn(token_square_sum(v) / K)
        else:
            size = token_absmax(v)
        x_scale = size * NORM * step_factor
        tl.store(x_scale_ptr, x_scale)
        inverse = tl.div_rn(1.0, x_scale)
        if (inverse > 0) & (inverse < float("inf")):
            _store_codes(out_row, v, inverse * NORM, K, N, QMAX, CLAMP)
        else:
            _store_zeros(out_row, v, K, N)

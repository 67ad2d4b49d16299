"""The arithmetic of every op in plain PyTorch.

These functions are the CPU kernels, the oracle of the tests and the documentation at once. Integer
accumulation is exact and the float epilogue has one fixed order, so the GEMM kernels must match
them bit for bit. Given float64 activations, rotate, rotate_quantize and gemv compute in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .codebook import ascending_to_code, decode_levels
from .exact_math import fused_multiply_add, integer_matmul
from .packing import pack_codes, to_int32, unpack_codes
from .rotation import block_dense, block_hadamard, plain_matmul
from .scheme import activation_qmax

TILE = 128  # both N and K of a device tile pair are padded to this
# Rows of the epilogue are processed in chunks that stay in a CPU core's cache.
_EPILOGUE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 27}


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
        v = _scaled(v, channel_scale, x.dtype)
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
    between the two dense factors and channel_scale comes first. It is fp32, or bf16:
    then the product is rounded to x's dtype, so that kernels may multiply in it.
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
        order = None if rotation == "dual" else permutation
        natural = _unpermuted(channel_scale, order)
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


# ---- device layout of packed weights ------------------------------------------------------------
#
# A tile is 64 channels x 128 k. Thread T = 32w + 4g + t of a warpgroup owns rows 16w + g + 8r and
# k(h, p) = 32h + 16(p >> 2) + 4t + (p & 3): the A fragment of mma.m16n8k32. A word holds eight
# nibbles p = 0..7. See csrc/layout/packed_weight.h for the picture.


def _device_code(bits: int) -> list[int]:
    """Device code of each canonical code; b = 4 interleaves ascending levels for sign-fill."""
    table = [0] * (1 << bits)
    for v, code in enumerate(ascending_to_code(bits)):
        table[code] = ((v & 1) << 3) | (v >> 1) if bits == 4 else v
    return table


def prepack(codes: Tensor, in_features: int, weight_bits: int) -> Tensor:
    """Canonical codes int32 [N, ceil(K/32)*b] to the device layout
    int32 [ceil(N/128), ceil(K/128), 2, 256*b]; the padding holds device code 0."""
    n = codes.shape[0]
    n_tiles, k_tiles = -(-n // TILE), -(-in_features // TILE)
    table = torch.tensor(_device_code(weight_bits), dtype=torch.uint8, device=codes.device)
    device_codes = table[unpack_codes(codes, weight_bits, in_features).long()]
    padded = F.pad(device_codes, (0, k_tiles * TILE - in_features, 0, n_tiles * TILE - n))
    # n = (n128, half, w, r, g); k = (k128, h, q, t, s) with nibble p = 4q + s
    grid = padded.view(n_tiles, 2, 4, 2, 8, k_tiles, 4, 2, 4, 4)
    # -> (n128, k128, half, w, g, t, h, r, p)
    grid = grid.permute(0, 5, 1, 2, 4, 8, 6, 3, 7, 9).reshape(n_tiles, k_tiles, 2, 128, 4, 2, 8)
    grid = grid.to(torch.int64)
    if weight_bits == 4:
        nibbles = grid  # word (h, r)
    elif weight_bits == 3:
        # word (r, i), i = 0..2: codes of h = i, and above them bit i of the codes of h = 3
        fourth = torch.stack([(grid[..., 3, :, :] >> i) & 1 for i in range(3)], dim=-3)
        nibbles = (grid[..., :3, :, :] | fourth << 3).transpose(-3, -2)
    else:
        # word (i, r): codes of h = 2i, and above them those of h = 2i + 1
        nibbles = grid[..., 0::2, :, :] | grid[..., 1::2, :, :] << 2
    shifts = torch.arange(8, device=codes.device) * 4
    words = to_int32((nibbles << shifts).sum(dim=-1))
    words = words.reshape(n_tiles, k_tiles, 2, 128, 2 * weight_bits)
    # A thread's words are stored in pieces of 4 (16 bytes), threads side by side within a piece.
    pieces = [piece.flatten(3) for piece in words.split(4, dim=-1)]
    return torch.cat(pieces, dim=-1).contiguous()


def unprepack(weight: Tensor, out_features: int, in_features: int, weight_bits: int) -> Tensor:
    """Exact inverse of prepack: canonical codes int32 [N, ceil(K/32)*b]."""
    return pack_codes(_codes(weight, out_features, in_features, weight_bits), weight_bits)


def _codes(weight: Tensor, out_features: int, in_features: int, weight_bits: int) -> Tensor:
    """Canonical codes uint8 [N, K] of a prepacked weight."""
    n_tiles, k_tiles = weight.shape[:2]
    sizes = [128 * min(4, 2 * weight_bits - start) for start in range(0, 2 * weight_bits, 4)]
    pieces = [piece.unflatten(-1, (128, -1)) for piece in weight.split(sizes, dim=-1)]
    words = torch.cat(pieces, dim=-1).to(torch.int64) & 0xFFFFFFFF
    shifts = torch.arange(8, device=weight.device) * 4
    nibbles = (words[..., None] >> shifts) & 15
    if weight_bits == 4:
        grid = nibbles.unflatten(-2, (4, 2))
    elif weight_bits == 3:
        by_h = nibbles.unflatten(-2, (2, 3)).transpose(-3, -2)
        fourth = sum(by_h[..., i : i + 1, :, :] >> 3 << i for i in range(3))
        grid = torch.cat([by_h & 7, fourth], dim=-3)
    else:
        pairs = nibbles.unflatten(-2, (2, 2))
        grid = torch.stack([pairs & 3, pairs >> 2], dim=-3).flatten(-4, -3)
    # (n128, k128, half, w, g, t, h, r, q, s) -> (n128, half, w, r, g, k128, h, q, t, s)
    grid = grid.reshape(n_tiles, k_tiles, 2, 4, 8, 4, 4, 2, 2, 4)
    grid = grid.permute(0, 2, 3, 7, 4, 1, 6, 8, 5, 9).reshape(n_tiles * TILE, k_tiles * TILE)
    canonical = torch.empty(1 << weight_bits, dtype=torch.uint8, device=weight.device)
    canonical[torch.tensor(_device_code(weight_bits), device=weight.device)] = torch.arange(
        1 << weight_bits, dtype=torch.uint8, device=weight.device
    )
    return canonical[grid[:out_features, :in_features]].contiguous()


def weight_levels(
    weight: Tensor,
    levels: Tensor,
    out_features: int,
    in_features: int,
    weight_bits: int,
    table_of_row: Tensor | None = None,
) -> Tensor:
    """int8 level of every weight, [N, K]: the operand of the integer GEMM.

    levels int8 [N, 2^b], or [T, 2^b] with the table of each row, uint8 [N]."""
    codes = _codes(weight, out_features, in_features, weight_bits)
    return decode_levels(codes, levels, table_of_row)


def dequantize(
    weight: Tensor,
    levels: Tensor,
    weight_scale: Tensor,
    out_features: int,
    in_features: int,
    weight_bits: int,
    out_dtype: torch.dtype,
    table_of_row: Tensor | None = None,
) -> Tensor:
    """level * weight_scale in fp32, rounded once to out_dtype: [N, K]."""
    int8 = weight_levels(weight, levels, out_features, in_features, weight_bits, table_of_row)
    return (int8.float() * weight_scale[:, None]).to(out_dtype)


# ---- GEMM ---------------------------------------------------------------------------------------


def epilogue(
    accumulator: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """int32 [M, N] to the output of the linear; the order of rounding is the contract:

    y = fma(rn(acc * x_scale), weight_scale, bias); y = gelu_tanh(y) if asked;
    y = fma(gate, y, residual), or residual + y without a gate; one rounding to out_dtype.
    gate is [B, N]: row m belongs to sample m // (M / B).
    """
    scaled = accumulator.float() * x_scale[:, None]
    if bias is None:
        y = scaled * weight_scale
    else:
        y = fused_multiply_add(scaled, weight_scale, bias)
    if activation == "gelu_tanh":
        y = F.gelu(y, approximate="tanh")
    if residual is not None:
        if gate is None:
            y = residual.float() + y
        else:
            y = fused_multiply_add(gate.float(), y, residual.float())
    return y.to(out_dtype)


def gemm(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    levels: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    weight_bits: int,
    out_features: int,
    activation: str,
    out_dtype: torch.dtype,
    table_of_row: Tensor | None = None,
) -> Tensor:
    """x_q int8 [M, K], x_scale fp32 [M], prepacked weight -> [M, N] in out_dtype.

    out_dtype int32 returns the accumulators. See `epilogue` for the float order.
    """
    m, in_features = x_q.shape
    w_q = weight_levels(weight, levels, out_features, in_features, weight_bits, table_of_row)
    accumulator = integer_matmul(x_q, w_q)
    if out_dtype == torch.int32:
        return accumulator
    out = torch.empty(m, out_features, dtype=out_dtype, device=x_q.device)
    limit = _EPILOGUE_ELEMENTS.get(x_q.device.type, 1 << 18)
    step = max(1, limit // max(1, out_features))
    row_gate = None
    for start in range(0, m, step):
        rows = slice(start, min(start + step, m))
        if gate is not None:
            samples = torch.arange(rows.start, rows.stop, device=gate.device)
            row_gate = gate[samples // (m // gate.shape[0])]
        out[rows] = epilogue(
            accumulator[rows],
            x_scale[rows],
            weight_scale,
            bias,
            None if residual is None else residual[rows],
            row_gate,
            activation,
            out_dtype,
        )
    return out


GEMV_WARPS = 8  # the sum over K has this many parts


def split_limbs(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] in bf16 or fp16 as integers: (q int32 [M, tiles, 128], step fp32 [M, tiles]).

    A block of 128 inputs has the least power of two as its step for which |q| <= 32639, so that
    q = 256 high + low in two int8 values; not below 2^-126. NaN where the block holds inf or NaN.
    """
    padded = F.pad(x, (0, -x.shape[1] % TILE)).float()
    blocks = padded.view(x.shape[0], padded.shape[1] // TILE, TILE)
    largest = blocks.abs().amax(dim=-1)
    finite = torch.isfinite(largest)
    bits = torch.where(finite, largest, torch.zeros_like(largest)).view(torch.int32)
    # largest = c 2^e with 1 <= c < 2: 2^(e - 14), or twice that where c 2^14 could exceed 32639.
    exponent = ((bits + 0x10000) >> 23).clamp(min=15)
    inverse = ((268 - exponent) << 23).view(torch.float32)
    step = ((exponent - 14) << 23).view(torch.float32)
    step = torch.where(finite, step, torch.full_like(step, torch.nan))
    q = torch.where(finite[..., None], blocks, torch.zeros_like(blocks)) * inverse[..., None]
    return q.round().to(torch.int32), step


def gemv(
    x: Tensor,
    weight: Tensor,
    levels: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    out_features: int,
    table_of_row: Tensor | None = None,
) -> Tensor:
    """x [M, K] (bf16, fp16, fp32) times the decoded weight: fma(sum_k x * level, scale, bias).

    The sum over a block of 128 inputs is exact over the integers of split_limbs, then rounded to
    fp32; part = fma(that, step, part) for eight parts, block i in part i % 8, and the parts are
    added in order. For fp32 the sum is fp32 in no fixed order. The result has x's dtype.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        return gemm_a16(
            x, weight, levels, weight_scale, bias, weight_bits, out_features, table_of_row
        )
    w_q = weight_levels(weight, levels, out_features, x.shape[1], weight_bits, table_of_row)
    total = _sum_of_blocks(*split_limbs(x), w_q)
    if bias is None:
        return (total * weight_scale).to(x.dtype)
    return fused_multiply_add(total, weight_scale, bias).to(x.dtype)


def gemm_a16(
    x: Tensor,
    weight: Tensor,
    levels: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    out_features: int,
    table_of_row: Tensor | None = None,
) -> Tensor:
    """x [M, K] (bf16, fp16, fp32) times the decoded weight: fma(sum_k x * level, scale, bias).

    The sum is fp32 in no fixed order, over exact products; the result has x's dtype.
    """
    w_q = weight_levels(weight, levels, out_features, x.shape[1], weight_bits, table_of_row)
    if x.dtype == torch.float64:
        y = (x @ w_q.double().T) * weight_scale.double()
        return y if bias is None else y + bias.double()
    total = plain_matmul(x.float(), w_q.float().T)
    if bias is None:
        return (total * weight_scale).to(x.dtype)
    return fused_multiply_add(total, weight_scale, bias).to(x.dtype)


def _sum_of_blocks(q: Tensor, step: Tensor, w_q: Tensor) -> Tensor:
    """fp32 [M, N] of q int32 [M, tiles, 128], step fp32 [M, tiles] and w_q int8 [N, K]."""
    m, tiles, _ = q.shape
    low = ((q + 128) & 255) - 128
    high = (q - low) >> 8
    parts = torch.zeros(GEMV_WARPS, m, w_q.shape[0], device=q.device)
    for tile in range(tiles):
        levels = w_q[:, tile * TILE : (tile + 1) * TILE].float().T
        inputs = torch.cat([high[:, tile], low[:, tile]])[:, : levels.shape[0]].float()
        # Both products are exact in fp32.
        sums = plain_matmul(inputs, levels).to(torch.int32)
        exact = 256 * sums[:m] + sums[m:]
        part = tile % GEMV_WARPS
        parts[part] = fused_multiply_add(exact.float(), step[:, tile, None], parts[part])
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total

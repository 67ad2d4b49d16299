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
from .rotate_reference import (
    activate,
    activation_rotate_quantize,
    concat_rotate_quantize,
    joins_modulation,
    modulate,
    norm_modulate,
    norm_modulate_rotate_quantize,
    quantize_by_scale,
    rotate,
    rotate_quantize,
    rotate_rows,
    rotated_rows,
    token_scale,
)
from .rotation import plain_matmul

__all__ = [
    "TILE",
    "activate",
    "activation_rotate_quantize",
    "concat_rotate_quantize",
    "dequantize",
    "epilogue",
    "gemm",
    "gemm_a16",
    "gemv",
    "joins_modulation",
    "modulate",
    "norm_modulate",
    "norm_modulate_rotate_quantize",
    "prepack",
    "quantize_by_scale",
    "rotate",
    "rotate_quantize",
    "rotate_rows",
    "rotated_rows",
    "split_limbs",
    "token_scale",
    "unprepack",
    "weight_levels",
]

TILE = 128  # both N and K of a device tile pair are padded to this
# Rows of the epilogue are processed in chunks that stay in a CPU core's cache.
_EPILOGUE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 27}


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

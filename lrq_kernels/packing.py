"""Canonical packing of b-bit codes (b = 2, 3, 4): what a checkpoint stores.

One row is a little-endian bit stream along K: code k occupies bits [k*b, k*b + b). 32 codes fill
exactly b words, so a code never straddles a group of b words; a ragged end is zero.

    b = 3, one row      word 0                            word 1                      word 2
    bit                 0  3  6        27 30              32 33      36
    code                |k0|k1|k2| ... |k9|k10 low 2 bits |k10 high |k11| ...   ...   |k31|
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scheme import check_weight_bits

CODES_PER_GROUP = 32


def packed_words(in_features: int, bits: int) -> int:
    """int32 words of one packed row: ceil(K / 32) * bits."""
    return -(-in_features // CODES_PER_GROUP) * bits


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (uint8 [N, K], each < 2^bits) into int32 [N, ceil(K/32)*bits].

    Raises TypeError for another dtype, ValueError for another shape or a code out of range.
    """
    check_weight_bits(bits, "pack_codes")
    if codes.dtype != torch.uint8:
        raise TypeError(f"pack_codes: codes must be uint8, got {codes.dtype}")
    if codes.dim() != 2:
        raise ValueError(f"pack_codes: codes must be [N, K], got shape {tuple(codes.shape)}")
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"pack_codes: codes must be below {1 << bits}, got {int(codes.max())}")
    n, k = codes.shape
    groups = -(-k // CODES_PER_GROUP)
    padded = codes.new_zeros(n, groups * CODES_PER_GROUP)
    padded[:, :k] = codes
    padded = padded.view(n, groups, CODES_PER_GROUP)
    words = torch.zeros(n, groups, bits, dtype=torch.int64, device=codes.device)
    for index in range(CODES_PER_GROUP):
        word, shift = divmod(index * bits, 32)
        value = padded[:, :, index].to(torch.int64) << shift
        words[:, :, word] |= value & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, :, word + 1] |= value >> 32
    return to_int32(words).view(n, groups * bits)


def unpack_codes(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Inverse of pack_codes: int32 [N, ceil(K/32)*bits] to uint8 [N, in_features].

    Raises TypeError or ValueError when dtype or width do not fit `bits` and `in_features`.
    """
    check_weight_bits(bits, "unpack_codes")
    if packed.dtype != torch.int32:
        raise TypeError(f"unpack_codes: packed must be int32, got {packed.dtype}")
    expected = packed_words(in_features, bits)
    if packed.dim() != 2 or packed.shape[1] != expected:
        raise ValueError(
            f"unpack_codes: packed must be [N, {expected}] for K = {in_features}, "
            f"{bits} bits, got shape {tuple(packed.shape)}"
        )
    n = packed.shape[0]
    groups = expected // bits
    words = (packed.to(torch.int64) & 0xFFFFFFFF).view(n, groups, bits)
    codes = torch.empty(n, groups, CODES_PER_GROUP, dtype=torch.uint8, device=packed.device)
    for index in range(CODES_PER_GROUP):
        word, shift = divmod(index * bits, 32)
        value = words[:, :, word] >> shift
        if shift + bits > 32:
            value = value | (words[:, :, word + 1] << (32 - shift))
        codes[:, :, index] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return codes.view(n, groups * CODES_PER_GROUP)[:, :in_features].contiguous()


def to_int32(words: Tensor) -> Tensor:
    """int64 words holding 32 unsigned bits each, reinterpreted as int32 (two's complement)."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)

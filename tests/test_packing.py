"""Canonical packing: where each bit lies, and that nothing is lost."""

from __future__ import annotations

import pytest
import torch

from lrq_kernels import pack_codes, unpack_codes
from lrq_kernels.packing import packed_words

BITS = (4, 3, 2)
# 1: one code; 31, 33: a ragged end on either side of a group of 32; 10, 11, 21: where 3-bit codes
# straddle words; 128, 1152: whole groups
SIZES = (1, 10, 11, 21, 31, 32, 33, 64, 95, 128, 1152)


def random_codes(n: int, k: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", SIZES)
def test_round_trip(bits: int, k: int):
    codes = random_codes(7, k, bits)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (7, packed_words(k, bits)) == (7, -(-k // 32) * bits)
    assert torch.equal(unpack_codes(packed, bits, k), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", (1, 31, 33, 75))
def test_code_k_occupies_bits_kb_of_a_little_endian_stream(bits: int, k: int):
    codes = random_codes(3, k, bits)
    for row, words in zip(codes.tolist(), pack_codes(codes, bits).tolist(), strict=True):
        stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
        assert stream == sum(code << (i * bits) for i, code in enumerate(row))


@pytest.mark.parametrize("bits", BITS)
def test_every_code_at_its_largest_fills_every_bit(bits: int):
    codes = torch.full((2, 64), (1 << bits) - 1, dtype=torch.uint8)
    assert bool((pack_codes(codes, bits) == -1).all())


def test_strided_codes_pack_like_their_copy():
    codes = random_codes(40, 6, 3).T
    assert torch.equal(pack_codes(codes, 3), pack_codes(codes.contiguous(), 3))


@pytest.mark.parametrize("bits", BITS)
def test_no_rows(bits: int):
    packed = pack_codes(torch.empty(0, 40, dtype=torch.uint8), bits)
    assert packed.shape == (0, 2 * bits)
    assert unpack_codes(packed, bits, 40).shape == (0, 40)


@pytest.mark.parametrize("bits", (0, 1, 5, 8, 4.0))
def test_refuses_other_widths(bits: int):
    with pytest.raises(ValueError, match=f"pack_codes: weight_bits .* got {bits}"):
        pack_codes(torch.zeros(1, 32, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=f"unpack_codes: weight_bits .* got {bits}"):
        unpack_codes(torch.zeros(1, 4, dtype=torch.int32), bits, 32)


@pytest.mark.parametrize("bits", BITS)
def test_refuses_a_code_out_of_range(bits: int):
    codes = random_codes(2, 40, bits)
    codes[1, 39] = 1 << bits
    with pytest.raises(ValueError, match=f"below {1 << bits}, got {1 << bits}"):
        pack_codes(codes, bits)


def test_refuses_other_dtypes_and_shapes():
    with pytest.raises(TypeError, match="must be uint8, got torch.int64"):
        pack_codes(torch.zeros(1, 32, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match=r"\[N, K\], got shape \(32,\)"):
        pack_codes(torch.zeros(32, dtype=torch.uint8), 4)
    with pytest.raises(TypeError, match="must be int32, got torch.uint8"):
        unpack_codes(torch.zeros(1, 4, dtype=torch.uint8), 4, 32)
    with pytest.raises(ValueError, match=r"\[N, 8\] for K = 33, 4 bits, got shape \(1, 4\)"):
        unpack_codes(torch.zeros(1, 4, dtype=torch.int32), 4, 33)

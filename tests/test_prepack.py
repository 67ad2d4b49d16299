"""lrq::prepack, unprepack and dequantize on a GPU: the bits of the CPU reference.

The layout itself is held against the design in test_reference.py and test_packed_weight_maps.py.
"""

from __future__ import annotations

import pytest
import torch

from lrq_kernels import ops, pack_codes
from lrq_kernels.packing import packed_words
from lrq_kernels.testing import poisoned_memory, random_levels

pytestmark = pytest.mark.gpu

BITS = (4, 3, 2)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (
    (1, 1),  # one code
    (1, 32),  # one canonical run
    (63, 129),  # a row short of half a tile, one input in the second k tile
    (64, 128),  # half a tile: the other half is padding
    (65, 127),  # one row in the second half
    (128, 128),  # one tile
    (129, 96),  # one row in the second tile
    (200, 333),  # nothing divides anything; rows of the output start at odd addresses
    (257, 1002),  # K even, not a multiple of 4
    (1152, 4608),  # PixArt
)


def random_codes(n: int, k: int, bits: int) -> torch.Tensor:
    return pack_codes(torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8), bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_prepack_and_back(bits: int, n: int, k: int):
    codes = random_codes(n, k, bits)
    with poisoned_memory():
        weight = ops.prepack(codes.cuda(), k, bits)
        back = ops.unprepack(weight, n, k, bits)
    assert torch.equal(weight.cpu(), ops.prepack(codes, k, bits))
    assert torch.equal(back.cpu(), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k"), [(5, 33), (70, 130)])
def test_bits_past_k_and_codes_in_the_padding_are_dropped(bits: int, n: int, k: int):
    """unprepack gives zeros there, whatever the words and the padding hold."""
    shape = (n, packed_words(k, bits))
    noisy = torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).int()
    weight = ops.prepack(noisy.cuda(), k, bits)
    assert torch.equal(weight.cpu(), ops.prepack(noisy, k, bits))
    canonical = ops.unprepack(weight, n, k, bits)
    random_weight = torch.randint(-(2**31), 2**31, weight.shape, dtype=torch.int64).int()
    expected = ops.unprepack(random_weight, n, k, bits)
    assert torch.equal(ops.unprepack(random_weight.cuda(), n, k, bits).cpu(), expected)
    assert torch.equal(ops.prepack(canonical, k, bits), weight)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_dequantize(bits: int, n: int, k: int):
    weight = ops.prepack(random_codes(n, k, bits), k, bits)
    levels = random_levels(n, bits, extreme=True)
    scale = torch.rand(n) * 10.0 ** torch.randint(-6, 3, (n,))
    scale[0] = 0.0
    for dtype in FLOATS:
        expected = ops.dequantize(weight, levels, scale, n, k, bits, dtype)
        with poisoned_memory():
            got = ops.dequantize(weight.cuda(), levels.cuda(), scale.cuda(), n, k, bits, dtype)
        assert got.dtype == dtype and torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("bits", BITS)
def test_nothing_in_gives_nothing_out(bits: int):
    for n, k in ((0, 64), (64, 0)):
        codes = torch.zeros(n, packed_words(k, bits), dtype=torch.int32, device="cuda")
        weight = ops.prepack(codes, k, bits)
        assert weight.shape == (-(-n // 128), -(-k // 128), 2, 256 * bits)
        assert ops.unprepack(weight, n, k, bits).shape == codes.shape

"""TwinLogCodebook: code order, nearest-level encoding, and the codebooks it refuses."""

from __future__ import annotations

import pytest
import torch

from lrq_kernels import TwinLogCodebook
from lrq_kernels import codebook as codebook_module
from lrq_kernels.testing import random_levels

BITS = (4, 3, 2)


def random_codebook(n: int, bits: int) -> TwinLogCodebook:
    return TwinLogCodebook(random_levels(n, bits), torch.rand(n) * 0.01 + 1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_ascending_order_and_code_agree(bits: int):
    codebook = random_codebook(9, bits)
    ascending = codebook.ascending()
    assert codebook.bits == bits
    assert torch.equal(ascending, codebook.levels.sort(dim=1).values)
    # v = L + m in the non-negative half, L - 1 - m in the other
    half = 1 << (bits - 1)
    for code in range(2 * half):
        v = half + code if code < half else half - 1 - (code - half)
        assert torch.equal(ascending[:, v], codebook.levels[:, code])


@pytest.mark.parametrize("bits", BITS)
def test_encode_is_the_nearest_level(bits: int):
    codebook = random_codebook(17, bits)
    weight = torch.randn(17, 301) * 0.7 * codebook.scale[:, None] * 127
    values = codebook.levels.double() * codebook.scale.double()[:, None]  # [N, 2^b]
    distances = (weight.double()[:, :, None] - values[:, None, :]).abs()
    chosen = distances.gather(2, codebook.encode(weight).long()[:, :, None])[:, :, 0]
    # The border between two levels is computed in fp32, so a value on it may fall to either side.
    slack = values.abs().amax(dim=1, keepdim=True) * torch.finfo(torch.float32).eps
    assert bool((chosen <= distances.amin(dim=2) + 2 * slack).all())


@pytest.mark.parametrize("bits", BITS)
def test_encode_of_decode_returns_a_code_of_the_same_level(bits: int):
    codebook = random_codebook(33, bits)
    codes = torch.randint(0, 1 << bits, (33, 70), dtype=torch.uint8)
    # Neighbouring levels may coincide, and then so do the values of two codes.
    decoded = codebook.decode(codes)
    assert torch.equal(codebook.decode(codebook.encode(decoded)), decoded)
    expected = torch.stack([codebook.levels[n, codes[n].long()] for n in range(33)]).float()
    assert torch.equal(decoded, expected * codebook.scale[:, None])


def test_a_value_halfway_takes_the_lower_level():
    levels = torch.tensor([[2, 6, -2, -6]], dtype=torch.int8)
    codebook = TwinLogCodebook(levels, torch.tensor([0.5]))
    weight = torch.tensor([[2.0, 2.0 + 1e-6, 0.0, 1e-6, -2.0]])  # borders at 2, 0 and -2
    assert codebook.encode(weight).tolist() == [[0, 1, 2, 0, 3]]


def test_encode_in_chunks_equals_encode_at_once(monkeypatch: pytest.MonkeyPatch):
    codebook = random_codebook(11, 3)
    weight = torch.randn(11, 40) * 0.3
    whole = codebook.encode(weight)
    monkeypatch.setattr(codebook_module, "_ENCODE_CHUNK_ELEMENTS", 100)  # 2 rows, the last alone
    assert torch.equal(codebook.encode(weight), whole)


def test_encode_takes_16_bit_and_strided_weights():
    codebook = random_codebook(6, 4)
    weight = torch.randn(80, 6).to(torch.bfloat16).T
    assert torch.equal(codebook.encode(weight), codebook.encode(weight.float().contiguous()))


def test_a_row_of_scale_zero_decodes_to_zero():
    codebook = TwinLogCodebook(random_levels(2, 4), torch.zeros(2))
    assert torch.equal(codebook.decode(codebook.encode(torch.randn(2, 5))), torch.zeros(2, 5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_encode_refuses_weights_that_are_not_finite(bad: float):
    weight = torch.zeros(3, 5)
    weight[2, 4] = bad
    with pytest.raises(ValueError, match="weight must be finite"):
        random_codebook(3, 4).encode(weight)


@pytest.mark.parametrize("shape", [(4, 5), (3,), (3, 5, 1)])
def test_encode_refuses_another_shape(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"\[N, K\] with N = 3"):
        random_codebook(3, 4).encode(torch.zeros(shape))


GOOD = [3, 7, -1, -9]


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([-1, 7, -1, -9], "wrong sign"),  # rounding to int8 made a small positive level negative
        ([3, 7, 0, -9], "wrong sign"),  # ... and a small negative level zero
        ([7, 3, -1, -9], "must not decrease"),
        ([3, 7, -9, -1], "must not decrease"),
    ],
)
def test_refuses_levels(levels: list[int], message: str):
    rows = torch.tensor([GOOD, levels], dtype=torch.int8)
    with pytest.raises(ValueError, match=message):
        TwinLogCodebook(rows, torch.ones(2))


@pytest.mark.parametrize("extreme", [[0, 127, -1, -128], [0, 0, -1, -1], [127, 127, -128, -128]])
def test_accepts_the_ends_of_the_range_and_equal_levels(extreme: list[int]):
    codebook = TwinLogCodebook(torch.tensor([extreme], dtype=torch.int8), torch.ones(1))
    assert codebook.decode(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)).tolist() == [extreme]


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_refuses_scales(scale: float):
    with pytest.raises(ValueError, match="scale must be finite and not negative"):
        TwinLogCodebook(torch.tensor([GOOD], dtype=torch.int8), torch.tensor([scale]))


@pytest.mark.parametrize(
    ("levels", "scale", "error", "message"),
    [
        (torch.zeros(2, 4), torch.ones(2), TypeError, "levels must be int8"),
        (torch.zeros(2, 4, dtype=torch.int8), torch.ones(2).double(), TypeError, "float64"),
        (torch.zeros(2, 5, dtype=torch.int8), torch.ones(2), ValueError, r"\(2, 5\)"),
        (torch.zeros(2, 32, dtype=torch.int8), torch.ones(2), ValueError, r"\(2, 32\)"),
        (torch.zeros(4, dtype=torch.int8), torch.ones(4), ValueError, r"\(4,\)"),
        (torch.zeros(2, 4, dtype=torch.int8), torch.ones(3), ValueError, r"\[2\].*\(3,\)"),
    ],
)
def test_refuses_dtypes_and_shapes(
    levels: torch.Tensor, scale: torch.Tensor, error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        TwinLogCodebook(levels, scale)

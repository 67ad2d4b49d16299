"""Rotation: orthogonal, its own inverse map, and the same for activations and weights."""

from __future__ import annotations

import pytest
import torch

from lrq_kernels import QuantScheme, Rotation
from lrq_kernels.rotation import block_hadamard
from lrq_kernels.testing import make_rotation, relative_error

KINDS = [
    ("none", 128, 100),
    ("hadamard", 32, 96),
    ("hadamard", 64, 192),
    ("hadamard", 128, 384),
    ("hadamard", 256, 512),
    ("hadamard", 512, 1024),
    ("hadamard", 1024, 1024),
    ("dual", 128, 384),
]
# A few roundings of values of the same size; fp32 products of 128 terms stay well below.
FP32_ERROR = 1e-5
FP64_ERROR = 1e-12
DUAL_STORAGE_ERROR = 1e-6  # the dense pair is orthogonal to fp32 only


def rotation_of(kind: str, block_size: int, k: int, permuted: bool) -> Rotation:
    return make_rotation(k, QuantScheme(rotation=kind, block_size=block_size), permuted=permuted)


def sylvester(size: int) -> torch.Tensor:
    """Natural order: H[i, j] = (-1)^popcount(i & j)."""
    rows = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("kind", "block_size", "k"), KINDS)
@pytest.mark.parametrize("permuted", [False, True])
def test_inverse_undoes_apply(kind: str, block_size: int, k: int, permuted: bool):
    rotation = rotation_of(kind, block_size, k, permuted)
    x = torch.randn(3, 2, k, dtype=torch.float64)
    limit = DUAL_STORAGE_ERROR if kind == "dual" else FP64_ERROR
    assert relative_error(rotation.inverse(rotation.apply(x)), x) < limit
    assert relative_error(rotation.apply(rotation.inverse(x)), x) < limit
    narrow = x.float()
    assert relative_error(rotation.inverse(rotation.apply(narrow)), narrow) < FP32_ERROR


@pytest.mark.parametrize(("kind", "block_size", "k"), KINDS)
@pytest.mark.parametrize("permuted", [False, True])
def test_rotated_activation_times_rotated_weight_is_the_product(
    kind: str, block_size: int, k: int, permuted: bool
):
    rotation = rotation_of(kind, block_size, k, permuted)
    x, w = torch.randn(5, k, dtype=torch.float64), torch.randn(7, k, dtype=torch.float64)
    product = rotation.apply(x) @ rotation.apply(w).T
    limit = DUAL_STORAGE_ERROR if kind == "dual" else FP64_ERROR
    assert relative_error(product, x @ w.T) < limit


@pytest.mark.parametrize(("kind", "block_size", "k"), KINDS)
def test_apply_is_orthogonal(kind: str, block_size: int, k: int):
    rotated = rotation_of(kind, block_size, k, True).apply(torch.eye(k, dtype=torch.float64))
    limit = DUAL_STORAGE_ERROR if kind == "dual" else FP64_ERROR
    assert relative_error(rotated @ rotated.T, torch.eye(k)) < limit


@pytest.mark.parametrize("block_size", [32, 128])
def test_hadamard_is_permutation_then_signs_then_natural_order(block_size: int):
    k = 2 * block_size
    rotation = rotation_of("hadamard", block_size, k, True)
    x = torch.randn(k, dtype=torch.float64)
    v = torch.stack([x[int(rotation.permutation[j])] * int(rotation.signs[j]) for j in range(k)])
    h = torch.block_diag(*[sylvester(block_size) / block_size**0.5] * 2)
    assert relative_error(rotation.apply(x), v @ h) < FP64_ERROR


def test_dual_is_first_factor_then_permutation_then_second():
    rotation = rotation_of("dual", 128, 256, True)
    first, second = rotation.matrices.double()
    x = torch.randn(256, dtype=torch.float64)
    v = (x @ torch.block_diag(first, first))[rotation.permutation.long()]
    expected = v @ torch.block_diag(second, second)
    assert relative_error(rotation.apply(x), expected) < FP64_ERROR


def test_block_hadamard_of_a_one_hot_row_is_a_row_of_signs():
    x = torch.zeros(1, 64)
    x[0, 37] = 8.0  # times 1/sqrt(64)
    assert torch.equal(block_hadamard(x, 64)[0].double(), sylvester(64)[37])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_input_is_rotated_in_fp32_and_rounded_once(dtype: torch.dtype):
    rotation = rotation_of("hadamard", 128, 256, True)
    x = torch.randn(4, 256).to(dtype)
    assert torch.equal(rotation.apply(x), rotation.apply(x.float()).to(dtype))


def test_autocast_does_not_reach_the_arithmetic():
    rotation = rotation_of("dual", 128, 256, True)
    x = torch.randn(4, 256)
    expected = rotation.apply(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rotation.apply(x), expected)


def test_no_rows():
    for kind, block_size, k in KINDS:
        assert rotation_of(kind, block_size, k, True).apply(torch.empty(0, k)).shape == (0, k)


def test_hadamard_draws_its_signs_from_the_generator():
    first = Rotation.hadamard(256, generator=torch.Generator().manual_seed(5))
    again = Rotation.hadamard(256, generator=torch.Generator().manual_seed(5))
    other = Rotation.hadamard(256, generator=torch.Generator().manual_seed(6))
    assert torch.equal(first.signs, again.signs)
    assert not torch.equal(first.signs, other.signs)


def signs(k: int = 128) -> torch.Tensor:
    return torch.ones(k, dtype=torch.int8)


def identity_pair() -> torch.Tensor:
    return torch.eye(128).repeat(2, 1, 1)


def damaged_pair(value: float) -> torch.Tensor:
    pair = identity_pair()
    pair[1, 3, 3] = value
    return pair


@pytest.mark.parametrize(
    ("rotation", "message"),
    [
        (Rotation("fourier"), "kind must be one of .* got 'fourier'"),
        (Rotation("none", signs=signs()), "kind 'none' takes no tensors, got .'signs'"),
        (Rotation("hadamard", 256, signs()), "divide K = 128, got 256"),
        (Rotation("hadamard", 96, signs()), "block_size must be one of"),
        (Rotation("hadamard", 128), r"signs must be int8 \[128\], got None"),
        (Rotation("hadamard", 128, signs(256)), r"signs must be int8 \[128\], got .* \[256\]"),
        (Rotation("hadamard", 128, signs().float()), "signs must be int8"),
        (Rotation("hadamard", 128, signs() * 2), r"signs must be \+1 or -1"),
        (Rotation("hadamard", 128, signs() * 0), r"signs must be \+1 or -1"),
        (Rotation("hadamard", 128, signs(), None, identity_pair()), "takes no matrices"),
        (
            Rotation("hadamard", 128, signs(), torch.arange(128)),
            r"permutation must be int32 \[128\], got torch.int64",
        ),
        (
            Rotation("hadamard", 128, signs(), torch.arange(127, dtype=torch.int32)),
            r"got torch.int32 \[127\]",
        ),
        (
            Rotation("hadamard", 128, signs(), torch.zeros(128, dtype=torch.int32)),
            r"each of 0..127 once",
        ),
        (Rotation("dual", 128), r"matrices must be float32 \[2, 128, 128\], got None"),
        (Rotation.dual(identity_pair().double()), "got torch.float64"),
        (Rotation.dual(identity_pair()[:1]), r"got torch.float32 \[1, 128, 128\]"),
        (Rotation.dual(damaged_pair(0.9)), "must be orthogonal"),
        (Rotation.dual(damaged_pair(float("nan"))), "must be orthogonal"),
        (Rotation("dual", 128, signs(), None, identity_pair()), "takes no signs"),
        (Rotation("dual", 64, None, None, identity_pair()), "blocks of 128"),
    ],
)
def test_validate_names_what_is_wrong(rotation: Rotation, message: str):
    with pytest.raises(ValueError, match=message):
        rotation.validate(128)


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024])
def test_regular_spreads_what_all_channels_share(block_size: int):
    """A constant input comes out of one magnitude everywhere, or of one in half of the places."""
    rotation = Rotation.regular(3 * block_size, block_size)
    y = rotation.apply(torch.full((1, 3 * block_size), 2.0, dtype=torch.float64)).abs()
    four = block_size in (64, 256, 1024)
    values = (2.0,) if four else (0.0, 2.0 * 2**0.5)
    found, counts = y.unique(return_counts=True)
    assert found.tolist() == pytest.approx(values, abs=1e-12)
    assert counts.tolist() == [3 * block_size // len(values)] * len(values)
    random = Rotation.hadamard(3 * block_size, block_size).apply(torch.ones(1, 3 * block_size))
    assert float(random.abs().max()) > float(y.max()) / 2
    x = torch.randn(5, 3 * block_size, dtype=torch.float64)
    torch.testing.assert_close(rotation.inverse(rotation.apply(x)), x)
    with pytest.raises(ValueError, match="must be one of .* and divide K"):
        Rotation.regular(3 * block_size + 16, block_size)


def test_hadamard_refuses_a_block_that_does_not_divide():
    with pytest.raises(ValueError, match="divide K = 192, got 128"):
        Rotation.hadamard(192, 128)


def test_to_moves_every_tensor():
    for kind in ("hadamard", "dual"):
        moved = rotation_of(kind, 128, 128, True).to("meta")
        tensors = (moved.signs, moved.permutation, moved.matrices)
        assert [t.is_meta for t in tensors if t is not None] == [True, True]

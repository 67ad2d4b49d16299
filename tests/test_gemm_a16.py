"""lrq::gemm_a16 on a GPU: any number of tokens in 16 bits, exact products, fp32 sums."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lrq_kernels import ops, pack_codes
from lrq_kernels.testing import Problem, assert_at_most_twice, make_problem, poisoned_memory

planner = pytest.importorskip("lrq_kernels._planner")
pytestmark = pytest.mark.gpu

BITS = (4, 3, 2)
DTYPES = (torch.bfloat16, torch.float16)
TILES = tuple(range(len(planner.a16_tiles())))
SHAPES = (
    (9, 64, 128),  # half a channel tile, one step
    (65, 136, 384),  # a second tile of eight channels
    (130, 100, 200),  # rows of y that are not whole pieces; a k tile that is not full
    (257, 1152, 1152),  # one token in the last tile
    (700, 3072, 512),  # more tiles than SMs for small tiles
    (2500, 2304, 640),  # several tiles a block, whole and ragged bands
    (40, 128, 15360),  # the longest sums
)


def needs_kernel() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for compute capability 9.0; elsewhere gemm_a16 is torch's")


def run(problem: Problem, x: Tensor, bias: Tensor | None = None, tile: int = -1) -> Tensor:
    constants = (problem.weight, problem.levels, problem.weight_scale)
    with poisoned_memory():
        return ops.gemm_a16(x, *constants, bias, problem.weight_bits, problem.sizes[1], tile)


def draw(n: int, k: int, bits: int) -> Problem:
    return make_problem(1, n, k, bits, device="cuda")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_integers_are_exact(bits: int, dtype: torch.dtype, tile: int, m: int, n: int, k: int):
    """Sums below 2^24 do not round, so every product and every place of the result counts."""
    needs_kernel()
    problem = draw(n, k, bits)
    problem.weight_scale.fill_(2.0**-8)
    x = torch.randint(-3, 4, (m, k), device="cuda").to(dtype)
    total = x.double() @ problem.weight_levels().double().T
    assert float(total.abs().max()) < 2**24
    for bias in (None, problem.bias):
        wide = total * 2.0**-8 if bias is None else total * 2.0**-8 + bias.double()
        # Rounded twice, to fp32 and to 16 bits, as the kernel does.
        assert torch.equal(run(problem, x, bias, tile), wide.float().to(dtype))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_as_good_as_torch(bits: int, dtype: torch.dtype, m: int, n: int, k: int):
    problem = draw(n, k, bits)
    levels, scale = problem.weight_levels(), problem.weight_scale
    x = torch.randn(m, k, device="cuda").to(dtype)
    oracle = x.double() @ (levels.double() * scale.double()[:, None]).T + problem.bias.double()
    dense = (levels.float() * scale[:, None]).to(dtype)
    baseline = F.linear(x, dense, problem.bias.to(dtype))
    for tile in (-1, *TILES) if torch.cuda.get_device_capability() == (9, 0) else (-1,):
        assert_at_most_twice(run(problem, x, problem.bias, tile), baseline, oracle)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_hot_tokens_return_the_columns_of_the_weight(bits: int, dtype: torch.dtype):
    problem = draw(264, 200, bits)
    dense = problem.weight_levels().float() * problem.weight_scale[:, None]
    columns = run(problem, torch.eye(200, device="cuda").to(dtype))
    assert torch.equal(columns, dense.to(dtype).T)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tile", TILES)
def test_what_lies_around_x_and_in_the_padding_is_not_used(bits: int, tile: int):
    needs_kernel()
    problem = draw(70, 168, bits)
    x = torch.randn(75, 168, device="cuda").bfloat16()
    expected = run(problem, x, problem.bias, tile)
    wide = torch.full((77, 168 + 24), float("nan"), device="cuda", dtype=torch.bfloat16)
    wide[1:-1, 8 : 8 + 168] = x
    inner = wide[1:-1, 8 : 8 + 168]
    assert torch.equal(run(problem, inner, problem.bias, tile), expected)
    codes = torch.randint(0, 1 << bits, (128, 256), device="cuda", dtype=torch.uint8)
    codes[:70, :168] = problem.codes
    noisy = ops.prepack(pack_codes(codes, bits), 256, bits)
    assert torch.equal(
        run(dataclasses.replace(problem, weight=noisy), x, problem.bias, tile), expected
    )


@pytest.mark.parametrize("tile", TILES)
def test_a_token_does_not_depend_on_its_neighbours(tile: int):
    needs_kernel()
    problem = draw(392, 1160, 4)
    x = torch.randn(300, 1160, device="cuda").bfloat16()
    together = run(problem, x, problem.bias, tile)
    assert torch.equal(run(problem, x[100:101], problem.bias, tile)[0], together[100])
    x[7, 5] = float("nan")
    spoilt = run(problem, x, problem.bias, tile)
    assert bool(spoilt[7].isnan().all())
    assert torch.equal(spoilt[:7], together[:7]) and torch.equal(spoilt[8:], together[8:])


@pytest.mark.parametrize("tile", (-1, *TILES))
def test_a_hundred_runs_are_bit_identical(tile: int):
    if tile >= 0:
        needs_kernel()
    problem = draw(3072, 3072, 4)
    x = torch.randn(600, 3072, device="cuda").half()
    first = run(problem, x, problem.bias, tile)
    assert all(torch.equal(run(problem, x, problem.bias, tile), first) for _ in range(100))


def test_few_rows_are_those_of_gemv():
    problem = draw(200, 384, 3)
    constants = (problem.weight, problem.levels, problem.weight_scale, problem.bias, 3, 200)
    for rows in (1, 16):
        x = torch.randn(rows, 384, device="cuda").half()
        assert torch.equal(run(problem, x, problem.bias), ops.gemv(x, *constants))


def test_what_the_kernel_cannot_read_goes_through_torch():
    """fp32, and rows of 16 bits that TMA cannot address."""
    problem = draw(72, 130, 4)
    dense = problem.weight_levels().double() * problem.weight_scale.double()[:, None]
    for rows, dtype in ((3, torch.float32), (20, torch.float32), (20, torch.bfloat16)):
        x = torch.randn(rows, 130, device="cuda").to(dtype)
        oracle = F.linear(x.double(), dense, problem.bias.double())
        baseline = F.linear(x, dense.to(dtype), problem.bias.to(dtype))
        got = run(problem, x, problem.bias)
        assert got.dtype == dtype
        assert_at_most_twice(got, baseline, oracle)
    with pytest.raises(ValueError, match="tile must be -1 where"):
        run(problem, torch.randn(20, 130, device="cuda"), tile=0)


def test_no_tokens():
    problem = draw(70, 160, 4)
    y = run(problem, torch.empty(0, 160, device="cuda", dtype=torch.float16))
    assert y.shape == (0, 70) and y.dtype == torch.float16

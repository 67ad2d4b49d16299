"""lrq::gemv on a GPU: few tokens in 16 bits, the bits of the reference, as good as torch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lrq_kernels import ops, pack_codes, reference
from lrq_kernels.testing import Problem, assert_at_most_twice, make_problem, poisoned_memory

pytestmark = pytest.mark.gpu

BITS = (4, 3, 2)
DTYPES = (torch.bfloat16, torch.float16)
SIZES = (
    (16, 128),  # one group of channels, one k tile
    (64, 1152),  # nine k tiles for eight warps
    (70, 130),  # a group with six channels, two inputs in the second k tile
    (129, 1000),  # one channel in the second tile; a k tile that is not full
    (33, 77),  # rows of x that start at odd addresses
    (1152, 384),  # fewer k tiles than warps
    (18432, 3072),  # modulation of FLUX: more groups than blocks; all inputs in one window
    (36864, 640),  # blocks with more groups than they hold sums of
    (3072, 15360),  # the longest sums: several windows of inputs
    (40000, 4700),  # both: sums that wait for the next window, then for the next batch
)


def draw(n: int, k: int, bits: int) -> Problem:
    return make_problem(1, n, k, bits, device="cuda")


def run(problem: Problem, x: Tensor, bias: Tensor | None = None) -> Tensor:
    constants = (problem.weight, problem.levels, problem.weight_scale)
    with poisoned_memory():
        return ops.gemv(x, *constants, bias, problem.weight_bits, problem.sizes[1])


def weight(problem: Problem, dtype: torch.dtype) -> Tensor:
    return problem.weight_levels().to(dtype) * problem.weight_scale.to(dtype)[:, None]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_every_number_of_tokens_is_as_good_as_torch(bits: int, n: int, k: int):
    problem = draw(n, k, bits)
    exact, narrow = weight(problem, torch.float64), weight(problem, torch.float32)
    for dtype in DTYPES:
        inputs = torch.randn(16, k, device="cuda").to(dtype)
        for rows in (*range(1, 10), 13, 16):
            x = inputs[:rows]
            for bias in (None, problem.bias):
                oracle = F.linear(x.double(), exact, None if bias is None else bias.double())
                # fp32 inside and one rounding: stricter than torch on 16-bit weights.
                baseline = F.linear(x.float(), narrow, bias).to(dtype)
                assert_at_most_twice(run(problem, x, bias), baseline, oracle)


def hard_rows(k: int, dtype: torch.dtype) -> Tensor:
    """[8, k]: ordinary, tiny, subnormal, with outliers of one input and of many, zero blocks, the
    largest values there are, one at the edge where a step doubles."""
    x = torch.randn(8, k, device="cuda")
    x[1] *= torch.finfo(dtype).tiny
    x[2] *= torch.finfo(dtype).tiny / 64
    x[3, k // 2] *= 1000
    x[4] *= torch.exp(2 * x[5])
    x[5, : k // 3] = 0
    x[6, ::7] = torch.finfo(dtype).max
    x[7, ::5] = 255 / 128
    return x.to(dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_bits_of_the_reference(bits: int, dtype: torch.dtype, n: int, k: int):
    problem = draw(n, k, bits)
    x = torch.cat([hard_rows(k, dtype), hard_rows(k, dtype)])
    constants = (problem.weight, problem.levels, problem.weight_scale)
    for rows in (1, 3, 4, 5, 8, 9, 14, 16):
        for bias in (None, problem.bias):
            expected = reference.gemv(x[:rows], *constants, bias, bits, n)
            got = run(problem, x[:rows], bias)
            assert torch.equal(got.isnan(), expected.isnan())
            assert torch.equal(got.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(70, 160), (129, 77)])
def test_one_hot_tokens_return_the_columns_of_the_weight(
    bits: int, dtype: torch.dtype, n: int, k: int
):
    problem = draw(n, k, bits)
    columns = torch.cat([run(problem, x) for x in torch.eye(k, device="cuda").to(dtype).split(13)])
    assert torch.equal(columns, weight(problem, torch.float32).to(dtype).T)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_its_neighbours(bits: int, dtype: torch.dtype):
    problem = draw(130, 1160, bits)
    x = torch.randn(16, 1160, device="cuda").to(dtype)
    together = run(problem, x, problem.bias)
    for m in range(16):
        assert torch.equal(run(problem, x[m : m + 1], problem.bias)[0], together[m])
    assert torch.equal(run(problem, x[4:11], problem.bias), together[4:11])
    x[3, 5], x[4, 7] = float("nan"), float("inf")
    spoilt = run(problem, x, problem.bias)
    assert bool(spoilt[3].isnan().all()) and not bool(spoilt[4].isfinite().any())
    kept = [0, 1, 2, *range(5, 16)]
    assert torch.equal(spoilt[kept], together[kept])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k"), [(70, 160), (33, 77)])
def test_memory_around_x_and_the_padding_of_the_weight_are_not_used(bits: int, n: int, k: int):
    problem = draw(n, k, bits)
    x = torch.randn(5, k, device="cuda").bfloat16()
    expected = run(problem, x, problem.bias)
    wide = torch.full((7, k + 9), float("nan"), device="cuda", dtype=torch.bfloat16)
    wide[1:-1, 3 : 3 + k] = x
    assert torch.equal(run(problem, wide[1:-1, 3 : 3 + k], problem.bias), expected)

    whole_tiles = (-(-n // 128) * 128, -(-k // 128) * 128)
    codes = torch.randint(0, 1 << bits, whole_tiles, device="cuda", dtype=torch.uint8)
    codes[:n, :k] = problem.codes
    noisy = ops.prepack(pack_codes(codes, bits), whole_tiles[1], bits)
    assert torch.equal(run(dataclasses.replace(problem, weight=noisy), x, problem.bias), expected)


def test_no_tokens():
    problem = draw(70, 160, 4)
    y = run(problem, torch.empty(0, 160, device="cuda", dtype=torch.float16))
    assert y.shape == (0, 70) and y.dtype == torch.float16


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hundred_runs_are_bit_identical(dtype: torch.dtype):
    problem = draw(3072, 3072, 4)
    x = torch.randn(2, 3072, device="cuda").to(dtype)
    first = run(problem, x)
    assert all(torch.equal(run(problem, x), first) for _ in range(100))


def test_kernels_in_a_row_see_what_those_in_front_wrote():
    """Blocks of a gemv start while the one in front still runs: as a chain, alone and in a graph,
    where an input or a weight is written just before."""
    problem = draw(1024, 1024, 4)
    other = draw(1024, 1024, 4)
    x = torch.randn(4, 1024, device="cuda").bfloat16()
    problem.weight_scale.fill_(2.0**-12)
    weight = problem.weight.clone()
    constants = (problem.levels, problem.weight_scale, None, 4, 1024)

    def chain(wait: bool) -> Tensor:
        y = x
        for step in range(24):
            weight.copy_((problem if step % 3 else other).weight)
            for _ in range(2):
                y = ops.gemv(y, weight, *constants)
                if wait:
                    torch.cuda.synchronize()
        return y

    expected = chain(wait=True)
    assert all(torch.equal(chain(wait=False), expected) for _ in range(20))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(wait=False)
    for _ in range(20):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)


@pytest.mark.parametrize("bits", BITS)
def test_results_too_large_for_fp16_are_infinite(bits: int):
    problem = draw(64, 128, bits)
    problem.weight_scale.fill_(100.0)
    x = torch.full((2, 128), 30.0, device="cuda", dtype=torch.float16)
    constants = (problem.weight, problem.levels, problem.weight_scale, None, bits, 64)
    expected = reference.gemv(x, *constants)
    assert bool(expected.isinf().any())
    got = run(problem, x)
    assert torch.equal(got.isinf(), expected.isinf())
    assert torch.equal(got.sign(), expected.sign())

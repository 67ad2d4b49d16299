"""lrq::gemm on a GPU: exact integers, the reference's floats bit for bit, nothing from padding.

The epilogue's order of rounding is held against fractions in test_reference.py; here the kernels
are held against that reference, and their accumulators against float64.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lrq_kernels import ops, pack_codes, reference
from lrq_kernels.testing import Problem, assert_at_most_twice, make_problem, poisoned_memory

planner = pytest.importorskip("lrq_kernels._planner")
pytestmark = pytest.mark.gpu

BITS = (4, 3, 2)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = (
    *range(1, 10),  # a few tokens of the smallest tile, and one more than gemv takes
    *(15, 16, 17),  # around 16: the smallest tile
    *(63, 64, 65),  # around a tile of 64
    *(127, 128, 129),  # around a tile of 128
    *(191, 192, 193),  # a last tile half full, and one token more
    *(255, 256, 257),  # two tiles and one token
    *(511, 512),  # several tiles; the text tokens of FLUX
    *(4095, 4096),  # more tiles than SMs, the last one ragged or whole
    4608,  # the joint tokens of FLUX
)
CHANNELS = (
    64,  # half a packed tile
    128,  # one
    192,  # one and a half: half a tile is padding
    1152,  # nine tiles, no power of two; PixArt
    3072,  # FLUX
)
INPUTS = (
    128,  # one k step: fewer than pipeline stages
    256,  # two
    384,  # three: as many as stages of the largest tile
    1152,  # nine: stages are reused
    15360,  # the longest sums of FLUX
)
RAGGED = (
    (1, 1, 16),  # one output, one piece of 16 bytes
    (5, 33, 32),  # rows of y that start at odd addresses
    (17, 70, 96),  # a quarter of a k tile missing
    (65, 129, 160),  # one channel in the second tile; a k tile with one slice
    (9, 136, 1),  # one input
    (130, 1001, 1000),  # nothing divides anything
    (33, 200, 130),  # two inputs in the last k tile
)


def on_gpu(m: int, n: int, k: int, bits: int, **options: bool) -> Problem:
    return make_problem(m, n, k, bits, device="cuda", **options)


def run(
    problem: Problem,
    out_dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    activation: str = "none",
    op: Callable[..., Tensor] = ops.gemm,
) -> Tensor:
    # The reference multiplies by cuBLAS, which the mode behind poisoned_memory warns about.
    with nullcontext() if op is reference.gemm else poisoned_memory():
        return op(
            problem.x_q,
            problem.x_scale,
            problem.weight,
            problem.levels,
            problem.weight_scale,
            bias,
            residual,
            gate,
            problem.weight_bits,
            problem.sizes[1],
            activation,
            out_dtype,
        )


def exact_product(problem: Problem) -> Tensor:
    """int32 [M, N] by float64, which holds every sum exactly."""
    product = problem.x_q.double() @ problem.weight_levels().double().T
    return product.to(torch.int32)


def first_rows(problem: Problem, m: int) -> Problem:
    """The same weight with the first m tokens; the others follow in memory, as a poison."""
    return dataclasses.replace(problem, x_q=problem.x_q[:m], x_scale=problem.x_scale[:m])


def arch() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


# ---- accumulators -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", CHANNELS)
@pytest.mark.parametrize("k", INPUTS)
def test_accumulators_equal_float64_for_every_number_of_tokens(bits: int, n: int, k: int):
    problem = on_gpu(max(TOKENS), n, k, bits)
    expected = exact_product(problem)
    for m in TOKENS:
        got = run(first_rows(problem, m), torch.int32)
        assert torch.equal(got, expected[:m]), f"M = {m}"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("m", "n", "k"), RAGGED)
def test_accumulators_of_ragged_sizes(bits: int, m: int, n: int, k: int):
    problem = on_gpu(m, n, k, bits)
    assert torch.equal(run(problem, torch.int32), exact_product(problem))


def by_config(index: int) -> Callable[..., Tensor]:
    """lrq::gemm on one row of the table."""
    return lambda *arguments: torch.ops.lrq.gemm_config.default(*arguments, index)


def config_problems(config) -> list[tuple[int, int, int]]:  # type: ignore[no-untyped-def]
    """(M, N, K): tokens around tiles, k steps around stages, more tiles than SMs."""
    tile, group = config.tile_m, config.tile_n * config.cluster
    steps = (1, 2, 3, config.stages - 1, config.stages, config.stages + 1, 2 * config.stages + 1)
    problems = [
        (max(tile * tiles + edge, 1), group - 8, 384) for tiles in (0, 1, 2) for edge in (-1, 0, 1)
    ]
    problems += [(tile // 2 + 1, group, 128 * count - 96) for count in steps]
    problems += [(tile + 3, 2 * group - 7, 160)]  # rows of y at odd addresses
    problems += [(40 * tile + 5, 12 * group, 640)]  # several tiles a block, odd k steps
    problems += [(37 * tile + 5, 9 * group - 64, 256)]  # even k steps, half a tile of channels
    problems += [(2 * tile + 9, 3 * group - 20, 1100)]  # k steps that no split_k divides
    return [p for p in problems if config.is_legal(*p, 4, 90 if config.arch == 90 else 80)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("index", "config"),
    [
        pytest.param(index, config, id=config.name)
        for index, config in enumerate(planner.gemm_configs())
    ],
)
def test_every_configuration(bits: int, index: int, config):
    if not config.is_legal(1, config.tile_n * config.cluster, 1024, bits, arch()):
        pytest.skip(f"{config.name} does not run on compute capability {arch()}")
    op = by_config(index)
    for m, n, k in config_problems(config):
        problem = on_gpu(m, n, k, bits)
        case = f"{m} x {n} x {k}"
        assert torch.equal(run(problem, torch.int32, op=op), exact_product(problem)), case
        arguments = {"bias": problem.bias}
        for samples in (0, -1, 1, math.gcd(m, 6)):
            arguments |= operands(m, n, samples, torch.bfloat16)
            got = run(problem, torch.bfloat16, op=op, **arguments)
            expected = run(problem, torch.bfloat16, op=reference.gemm, **arguments)
            assert torch.equal(got, expected), f"{case}, samples {samples}"
        arguments = {"bias": problem.bias, "activation": "gelu_tanh"}
        for out_dtype in FLOATS:
            got = run(problem, out_dtype, op=op, **arguments)
            portable = run(problem, out_dtype, op=by_config(0), **arguments)
            assert torch.equal(got, portable), f"{case}, GELU, {out_dtype}"


def with_a_tail(config, m: int, k: int, tokens: int) -> int:  # type: ignore[no-untyped-def]
    """Fewest channels, not of whole tiles, whose last wave on this GPU is cut into parts of so many
    tokens."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    for groups in range(1, 2 * sms):
        n = groups * config.cluster * config.tile_n - 56
        walks = planner.walks(config, m, n, k, 4, sms)
        if min(walk[-1][1] for walk in walks) == tokens:
            return n
    raise AssertionError(f"no tail of {tokens} tokens on {sms} SMs")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", [32, 64, 128])
@pytest.mark.parametrize("name", ["sm90_m256", "sm90_m256_c2"])
@pytest.mark.parametrize("k", [100, 640, 1152])  # one k step; odd; as many as reuse the stages
def test_a_last_wave_in_parts_of_fewer_tokens(bits: int, tokens: int, name: str, k: int):
    index, config = next((i, c) for i, c in enumerate(planner.gemm_configs()) if c.name == name)
    if not config.is_legal(1, 256, k, bits, arch()):
        pytest.skip(f"{name} does not run on compute capability {arch()}")
    op = by_config(index)
    m = 812  # tokens of some parts end within, of others lie past the last
    problem = on_gpu(m, with_a_tail(config, m, k, tokens), k, bits)
    assert torch.equal(run(problem, torch.int32, op=op), exact_product(problem))
    for out_dtype in FLOATS:
        for samples in (0, -1, 1, 2):
            arguments = {"bias": problem.bias} | operands(*problem.sizes[:2], samples, out_dtype)
            got = run(problem, out_dtype, op=op, **arguments)
            expected = run(problem, out_dtype, op=reference.gemm, **arguments)
            assert torch.equal(got, expected), f"{out_dtype}, samples {samples}"
        arguments = {"bias": problem.bias, "activation": "gelu_tanh"}
        portable = run(problem, out_dtype, op=by_config(0), **arguments)
        assert torch.equal(run(problem, out_dtype, op=op, **arguments), portable), out_dtype


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k"), [(192, 384), (70, 160)])
def test_one_hot_tokens_return_the_columns_of_the_weight(bits: int, n: int, k: int):
    """Shows where in the layout an error sits."""
    problem = on_gpu(k, n, k, bits)
    problem.x_q.copy_(torch.eye(k))
    assert torch.equal(run(problem, torch.int32), problem.weight_levels().T.int())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("x", [127, -127, -128])
def test_largest_magnitudes_over_the_longest_sum(bits: int, x: int):
    m, n, k = 33, 130, 15360
    problem = on_gpu(m, n, k, bits, extreme=True)
    problem.x_q.fill_(x)
    top, bottom = (1 << (bits - 1)) - 1, (1 << bits) - 1  # codes of the largest magnitudes
    problem.codes[0], problem.codes[1] = top, bottom
    weight = ops.prepack(pack_codes(problem.codes, bits), k, bits)
    problem = dataclasses.replace(problem, weight=weight)
    got = run(problem, torch.int32)
    assert got[:, :2].unique(dim=0).tolist() == [[127 * x * k, -128 * x * k]]
    assert torch.equal(got, exact_product(problem))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("m", "n", "k"), [(17, 70, 160), (130, 200, 130)])
def test_codes_in_the_padding_of_the_weight_are_not_used(bits: int, m: int, n: int, k: int):
    problem = on_gpu(m, n, k, bits)
    whole_tiles = (-(-n // 128) * 128, -(-k // 128) * 128)
    codes = torch.randint(0, 1 << bits, whole_tiles, device="cuda", dtype=torch.uint8)
    codes[:n, :k] = problem.codes
    weight = ops.prepack(pack_codes(codes, bits), whole_tiles[1], bits)
    assert weight.shape == problem.weight.shape and not torch.equal(weight, problem.weight)
    poisoned = dataclasses.replace(problem, weight=weight)
    assert torch.equal(run(poisoned, torch.int32), run(problem, torch.int32))


@pytest.mark.parametrize("bits", BITS)
def test_memory_around_x_is_not_used(bits: int):
    """Row strides beyond K, with 0x80 past K, before the first row and after the last."""
    m, n, k = 50, 192, 224
    problem = on_gpu(m, n, k, bits)
    wide = torch.full((m + 2, k + 80), -128, dtype=torch.int8, device="cuda")
    wide[1:-1, 16 : 16 + k] = problem.x_q
    inside = wide[1:-1, 16 : 16 + k]
    assert inside.stride() == (k + 80, 1)
    expected = run(problem, torch.int32)
    assert torch.equal(run(dataclasses.replace(problem, x_q=inside), torch.int32), expected)
    for row in (0, m - 1):
        one = dataclasses.replace(
            problem, x_q=inside[row : row + 1], x_scale=problem.x_scale[row : row + 1]
        )
        assert torch.equal(run(one, torch.int32), expected[row : row + 1])


def test_no_tokens():
    problem = first_rows(on_gpu(4, 192, 128, 4), 0)
    for out_dtype in (*FLOATS, torch.int32):
        y = run(problem, out_dtype)
        assert y.shape == (0, 192) and y.dtype == out_dtype and y.is_cuda
    gate = torch.ones(2, 192, device="cuda")
    y = run(problem, torch.float32, residual=gate[:0], gate=gate)
    assert y.shape == (0, 192)


# ---- epilogue -----------------------------------------------------------------------------------

# Also compared with the reference on the CPU, where it is independent of the GPU's arithmetic.
SMALL = ((1, 64, 128), (18, 192, 256), (66, 70, 160), (258, 1152, 384))
LARGE = ((4608, 3072, 384), (516, 1152, 1152))


def operands(m: int, n: int, samples: int, out_dtype: torch.dtype) -> dict[str, Tensor]:
    """samples: 0 no residual, -1 a residual without gate, B a gate per sample."""
    chosen = {}
    if samples:
        chosen["residual"] = torch.randn(m, n, device="cuda").to(out_dtype)
    if samples > 0:
        chosen["gate"] = torch.randn(samples, n, device="cuda").to(out_dtype)
    return chosen


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("m", "n", "k"), SMALL + LARGE)
def test_epilogue_is_the_reference_bit_for_bit(bits: int, m: int, n: int, k: int):
    problem = on_gpu(m, n, k, bits)
    for out_dtype, biased, samples in itertools.product(FLOATS, (False, True), (0, -1, 1, 2, 3)):
        if samples > 0 and m % samples:
            continue
        arguments = operands(m, n, samples, out_dtype)
        if biased:
            arguments["bias"] = problem.bias
        got = run(problem, out_dtype, **arguments)
        case = f"{out_dtype}, bias {biased}, samples {samples}"
        assert torch.equal(got, run(problem, out_dtype, op=reference.gemm, **arguments)), case


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("m", "n", "k"), SMALL)
def test_gpu_is_the_cpu_bit_for_bit(bits: int, m: int, n: int, k: int):
    problem = on_gpu(m, n, k, bits)
    tensors = {
        field.name: value.cpu() if isinstance(value, Tensor) else value
        for field in dataclasses.fields(problem)
        for value in [getattr(problem, field.name)]
    }
    on_cpu = Problem(**tensors)
    assert torch.equal(run(problem, torch.int32).cpu(), run(on_cpu, torch.int32))
    for out_dtype in FLOATS:
        arguments = operands(m, n, 1 if m % 2 else 2, out_dtype)
        for chosen in ({}, {"bias": problem.bias}, {"bias": problem.bias, **arguments}):
            expected = run(on_cpu, out_dtype, **{n: t.cpu() for n, t in chosen.items()})
            assert torch.equal(run(problem, out_dtype, **chosen).cpu(), expected)


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize(("m", "n", "k"), [(66, 70, 160), (516, 1152, 384)])
def test_gelu_is_as_good_as_torch(out_dtype: torch.dtype, m: int, n: int, k: int):
    problem = on_gpu(m, n, k, 4)
    # Spread over where GELU bends: about -6 to 6.
    scale = 3.0 / (exact_product(problem).double() * problem.x_scale[:, None]).std()
    problem.weight_scale.copy_(scale * (torch.rand(n, device="cuda") + 0.5))
    wide = exact_product(problem).double() * problem.x_scale[:, None] * problem.weight_scale
    oracle = F.gelu(wide + problem.bias.double(), approximate="tanh")
    for samples in (0, 2):
        arguments = {"bias": problem.bias, "activation": "gelu_tanh"}
        arguments |= operands(m, n, samples, out_dtype)
        if samples:
            gate = arguments["gate"].double().repeat_interleave(m // samples, dim=0)
            oracle = arguments["residual"].double() + gate * oracle
        baseline = run(problem, out_dtype, op=reference.gemm, **arguments)
        assert_at_most_twice(run(problem, out_dtype, **arguments), baseline, oracle)


def test_gelu_of_very_large_and_very_small_values():
    problem = on_gpu(2, 64, 128, 4)
    problem.weight_scale[:8] = torch.tensor([1e30, 1e6, 1e3, 1.0, 1e-3, 1e-10, 1e-30, 0.0])
    arguments = {"bias": torch.zeros(64, device="cuda"), "activation": "gelu_tanh"}
    got = run(problem, torch.float32, **arguments)
    expected = run(problem, torch.float32, op=reference.gemm, **arguments)
    assert bool(got.isfinite().all())
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("shift", [1, 4, 8])  # elements: 2 to 32 bytes off a 16-byte boundary
def test_operands_at_odd_addresses_and_with_row_strides(out_dtype: torch.dtype, shift: int):
    m, n = 36, 192
    problem = on_gpu(m, n, 128, 4)
    arguments = {"bias": problem.bias, **operands(m, n, 3, out_dtype)}
    expected = run(problem, out_dtype, **arguments)
    for name in ("residual", "gate"):
        tensor = arguments[name]
        wide = torch.full((tensor.shape[0], n + 2 * shift), float("nan"), device="cuda")
        wide = wide.to(out_dtype)
        wide[:, shift:-shift] = tensor
        arguments[name] = wide[:, shift:-shift]
    shifted = torch.zeros(n + shift, device="cuda")[shift:]
    arguments["bias"] = shifted.copy_(problem.bias)
    assert torch.equal(run(problem, out_dtype, **arguments), expected)
    weight_scale = torch.zeros(n + shift, device="cuda")[shift:].copy_(problem.weight_scale)
    moved = dataclasses.replace(problem, weight_scale=weight_scale)
    assert torch.equal(run(moved, out_dtype, **arguments), expected)


def test_nan_and_zero_scales_stay_in_their_rows_and_channels():
    problem = on_gpu(40, 130, 128, 4)
    clean = run(problem, torch.bfloat16, bias=problem.bias)
    problem.x_scale[7] = float("nan")
    problem.x_scale[9] = 0.0
    problem.weight_scale[3] = 0.0
    got = run(problem, torch.bfloat16, bias=problem.bias)
    assert bool(got[7].isnan().all())
    bias = problem.bias.bfloat16()
    assert torch.equal(got[9], bias)
    rows = [m for m in range(40) if m not in (7, 9)]
    assert torch.equal(got[rows, 3], bias[3].expand(38))
    columns = [n for n in range(130) if n != 3]
    assert torch.equal(got[rows][:, columns], clean[rows][:, columns])


# ---- sizes beyond 32 bits -----------------------------------------------------------------------


def test_x_of_more_than_2_to_the_31_bytes():
    problem = on_gpu(140_001, 64, 15360, 4)
    assert problem.x_q.numel() > 2**31
    got = run(problem, torch.int32)
    last = dataclasses.replace(problem, x_q=problem.x_q[-300:], x_scale=problem.x_scale[-300:])
    assert torch.equal(got[-300:], exact_product(last))


def test_y_of_more_than_2_to_the_31_elements():
    m, n = 700_001, 3080
    problem = on_gpu(m, n, 128, 4)
    residual = torch.zeros(m, n, dtype=torch.bfloat16, device="cuda")
    residual[-300:] = torch.randn(300, n)
    gate = torch.randn(1, n, device="cuda").bfloat16()
    got = run(problem, torch.bfloat16, residual=residual, gate=gate)
    assert got.numel() > 2**31
    last = dataclasses.replace(problem, x_q=problem.x_q[-300:], x_scale=problem.x_scale[-300:])
    expected = run(last, torch.bfloat16, residual=residual[-300:], gate=gate, op=reference.gemm)
    assert torch.equal(got[-300:], expected)


# ---- every run the same -------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "k"), [(5, 192, 15360), (300, 1152, 1152), (4608, 3072, 384)])
def test_a_hundred_runs_are_bit_identical(m: int, n: int, k: int):
    problem = on_gpu(m, n, k, 3)
    first = run(problem, torch.bfloat16, bias=problem.bias, activation="gelu_tanh")
    for _ in range(100):
        again = run(problem, torch.bfloat16, bias=problem.bias, activation="gelu_tanh")
        assert torch.equal(again, first)


def test_two_streams_at_once():
    problems = [on_gpu(700, 1152, 1152, bits) for bits in (4, 2)]
    expected = [exact_product(problem) for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for problem, stream in zip(problems, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(problem, torch.int32))
        torch.cuda.synchronize()
        assert all(map(torch.equal, results, expected))

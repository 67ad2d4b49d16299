"""The reference arithmetic against exact fractions, int64 and float64: the oracle's own oracle."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from lrq_kernels import exact_math, reference
from lrq_kernels.packing import pack_codes, unpack_codes
from lrq_kernels.scheme import QuantScheme
from lrq_kernels.testing import assert_at_most_twice, make_problem, make_rotation, relative_error

BITS = (4, 3, 2)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def round_to_float32(value: Fraction) -> float:
    """Nearest float32, half to even, subnormals included; for values below 2^128."""
    if value == 0:
        return 0.0
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    if abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, -126) - 23)
    return float(round(value / quantum) * quantum)  # round() of a Fraction: half to even


def exact_fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    triples = zip(*(t.double().flatten().tolist() for t in (a, b, c)), strict=True)
    rounded = [round_to_float32(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in triples]
    return torch.tensor(rounded, dtype=torch.float64).float().view(a.shape)


def naive_fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Rounded twice: to float64, then to float32."""
    return (a.double() * b.double() + c.double()).float()


# ---- fused multiply-add -------------------------------------------------------------------------


def test_fma_where_rounding_twice_is_wrong():
    a = torch.tensor([2.0**-12 * (1 + 2.0**-20)])
    b = torch.tensor([2.0**-12 * (1 - 2.0**-20)])
    c = torch.tensor([1 + 2.0**-23])
    # a * b is just below half an ulp of c: float64 rounds the sum up to the midpoint.
    assert naive_fma(a, b, c).item() == 1 + 2.0**-22
    fused = exact_math.fused_multiply_add(a, b, c)
    assert fused.item() == 1 + 2.0**-23 == exact_fma(a, b, c).item()


@pytest.mark.parametrize("exponent", [0, -20, 60, -101, -125, -126, -127, -140, -148])
def test_fma_next_to_midpoints(exponent: int):
    """a * b = half an ulp of c, times 1 - i^2 2^-40: a hair off the midpoint, on either side."""
    size = 400
    i = torch.randint(0, 8, (size,)).double()
    sign = torch.randint(0, 2, (3, size)).double() * 2 - 1
    ulp = 2.0 ** max(exponent - 23, -149)
    c = (sign[0] * torch.randint(1, 1 << 24, (size,)).double() * ulp).float()
    half = ulp / 2
    split = 2.0 ** (max(exponent, -126) // 2)
    a = (sign[1] * split * (1 + i * 2.0**-20)).float()
    b = (sign[2] * half / split * (1 - i * 2.0**-20)).float()
    expected = exact_fma(a, b, c)
    assert torch.equal(exact_math.fused_multiply_add(a, b, c), expected)
    assert not torch.equal(naive_fma(a, b, c), expected)  # or these cases prove nothing


def test_fma_of_random_numbers_of_every_size():
    size = 3000

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.ldexp(torch.randn(size), torch.randint(low, high, (size,)))

    a, b = draw(-60, 40), draw(-60, 40)
    # The addend is as large as the product, or up to 2^40 away from it.
    c = (a.double() * b.double() * draw(-40, 40).double()).clamp(-1e38, 1e38).float()
    assert torch.equal(exact_math.fused_multiply_add(a, b, c), exact_fma(a, b, c))


def test_fma_of_subnormal_results():
    size = 2000
    a = torch.randint(-(1 << 24), 1 << 24, (size,)).float() * 2.0**-100
    b = torch.randint(-(1 << 12), 1 << 12, (size,)).float() * 2.0**-66
    c = torch.randint(-(1 << 12), 1 << 12, (size,)).float() * 2.0**-149
    assert torch.equal(exact_math.fused_multiply_add(a, b, c), exact_fma(a, b, c))


def test_fma_carries_nan_and_infinity():
    inf, nan = float("inf"), float("nan")
    a = torch.tensor([inf, inf, 1.0, nan, 1e30, 0.0])
    b = torch.tensor([1.0, 0.0, 1.0, 1.0, 1e30, -1.0])
    c = torch.tensor([1.0, 1.0, -inf, 1.0, 0.0, -0.0])
    result = exact_math.fused_multiply_add(a, b, c)
    expected = torch.tensor([inf, nan, -inf, nan, inf, -0.0])
    assert torch.equal(result.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    assert bool(torch.signbit(result[5]))


def test_fma_broadcasts():
    a, b, c = torch.randn(5, 1), torch.randn(4), torch.randn(5, 4)
    full = [t.expand(5, 4).contiguous() for t in (a, b, c)]
    assert torch.equal(exact_math.fused_multiply_add(a, b, c), exact_fma(*full))


# ---- integer accumulation -----------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 32, 1023, 1024, 1025, 4608])  # around the exact chunks of 1024
def test_integer_matmul_equals_int64(k: int):
    x = torch.randint(-128, 128, (5, k), dtype=torch.int8)
    w = torch.randint(-128, 128, (7, k), dtype=torch.int8)
    assert torch.equal(exact_math.integer_matmul(x, w).long(), x.long() @ w.long().T)


def test_integer_matmul_at_the_largest_magnitudes():
    k = 21504  # the longest K of shapes.md; every partial sum as large as it can be
    x = torch.full((2, k), -128, dtype=torch.int8)
    x[1] = 127
    w = torch.full((2, k), -128, dtype=torch.int8)
    w[1] = 127
    assert exact_math.integer_matmul(x, w).tolist() == [
        [128 * 128 * k, -128 * 127 * k],
        [-127 * 128 * k, 127 * 127 * k],
    ]


def test_integer_matmul_where_one_float32_product_is_not_exact():
    x = torch.zeros(1, 4096, dtype=torch.int8)
    x[0, :2048], x[0, 2048] = 127, 1  # the sum is odd and above 2^24
    assert exact_math.integer_matmul(x, x).item() == 127 * 127 * 2048 + 1
    assert (x.float() @ x.float().T).item() != 127 * 127 * 2048 + 1


def test_autocast_does_not_reach_the_accumulation():
    problem = make_problem(4, 40, 256, 4)
    arguments = (problem.x_q, problem.codes.to(torch.int8))
    expected = exact_math.integer_matmul(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(exact_math.integer_matmul(*arguments), expected)


# ---- device layout ------------------------------------------------------------------------------


def device_code(code: int, bits: int) -> int:
    half = 1 << (bits - 1)
    v = half + code if code < half else half - 1 - (code - half)
    return (v & 1) << 3 | v >> 1 if bits == 4 else v


def prepack_by_formula(codes: torch.Tensor, bits: int) -> list[int]:
    """kernels.md section 2, word by word."""
    rows, columns = codes.shape
    table = codes.tolist()

    def code(n: int, k: int) -> int:
        return device_code(table[n][k], bits) if n < rows and k < columns else 0

    packed = []
    for nt in range(-(-rows // 128)):
        for kt in range(-(-columns // 128)):
            for half in range(2):
                lanes = []
                for lane in range(128):
                    w, g, t = lane // 32, lane % 32 // 4, lane % 4

                    def nibble(h: int, r: int, p: int) -> int:
                        n = 128 * nt + 64 * half + 16 * w + g + 8 * r  # noqa: B023
                        return code(n, 128 * kt + 32 * h + 16 * (p >> 2) + 4 * t + (p & 3))  # noqa: B023

                    words = [0] * (2 * bits)
                    for r in range(2):
                        for p in range(8):
                            for h in range(4):
                                c = nibble(h, r, p) << 4 * p
                                if bits == 4:
                                    words[2 * h + r] |= c
                                elif bits == 2:
                                    words[2 * (h // 2) + r] |= c << 2 * (h % 2)
                                elif h < 3:
                                    words[3 * r + h] |= c
                                else:
                                    for i in range(3):
                                        bit = nibble(3, r, p) >> i & 1
                                        words[3 * r + i] |= bit << 4 * p + 3
                    lanes.append(words)
                packed += [word for words in lanes for word in words[:4]]
                packed += [word for words in lanes for word in words[4:]]
    return packed


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("n", "k"),
    [(128, 128), (70, 130)],  # one tile; ragged rows, and K just past a tile
)
def test_prepack_is_the_layout_of_the_design(bits: int, n: int, k: int):
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    packed = reference.prepack(pack_codes(codes, bits), k, bits)
    assert packed.shape == (-(-n // 128), -(-k // 128), 2, 256 * bits)
    assert [word & 0xFFFFFFFF for word in packed.flatten().tolist()] == prepack_by_formula(
        codes, bits
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("n", "k"),
    [(1, 1), (1, 32), (63, 129), (64, 128), (129, 127), (200, 300), (384, 256)],
)
def test_unprepack_is_the_inverse_of_prepack(bits: int, n: int, k: int):
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    canonical = pack_codes(codes, bits)
    packed = reference.prepack(canonical, k, bits)
    assert torch.equal(reference.unprepack(packed, n, k, bits), canonical)
    levels = torch.randint(-128, 128, (n, 1 << bits), dtype=torch.int8)
    expected = torch.gather(levels, 1, codes.long())
    assert torch.equal(reference.weight_levels(packed, levels, n, k, bits), expected)


@pytest.mark.parametrize("bits", BITS)
def test_codes_in_the_padding_are_never_read(bits: int):
    n, k = 70, 130
    full = torch.randint(0, 1 << bits, (128, 256), dtype=torch.uint8)
    packed = reference.prepack(pack_codes(full, bits), 256, bits)
    canonical = reference.unprepack(packed, n, k, bits)
    assert torch.equal(unpack_codes(canonical, bits, k), full[:n, :k])


@pytest.mark.parametrize("out_dtype", FLOATS)
def test_dequantize_rounds_level_times_scale_once(out_dtype: torch.dtype):
    problem = make_problem(1, 70, 130, 3)
    _, n, k = problem.sizes
    weight = reference.dequantize(
        problem.weight, problem.levels, problem.weight_scale, n, k, 3, out_dtype
    )
    levels = problem.weight_levels()
    assert torch.equal(weight, (levels.float() * problem.weight_scale[:, None]).to(out_dtype))


# ---- rotate and quantize ------------------------------------------------------------------------

ROTATIONS = [("none", 128), ("hadamard", 32), ("hadamard", 128), ("hadamard", 1024), ("dual", 128)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_with_a_bf16_scale_are_rounded_to_the_tokens(dtype: torch.dtype) -> None:
    """As torch multiplies two tensors of that dtype; with a modulation its vectors are scaled."""
    x, scale = torch.randn(2, 7, 128).to(dtype), (torch.rand(128) + 0.5).bfloat16()
    rotation = (None, None, "hadamard", 128, 8, "absmax", 1.0)
    got = reference.rotate_quantize(x, scale, *rotation)
    expected = reference.rotate_quantize(x * scale.to(dtype), None, *rotation)
    assert all(map(torch.equal, got, expected))

    by, shift = torch.randn(2, 128).to(dtype), torch.randn(2, 128).to(dtype)
    front = (None, None, by, shift, "layer", 1e-6)
    got = reference.norm_modulate_rotate_quantize(x, *front, scale, *rotation, False)
    normed = reference.norm_modulate(x, *front[:2], None, None, *front[4:])
    factor, summand = (1 + by) * scale.to(dtype), shift * scale.to(dtype)
    y = normed * factor[:, None] + summand[:, None]
    expected = reference.rotate_quantize(y, None, *rotation)
    assert all(map(torch.equal, got, (*expected, x.new_empty(0))))
    # What is kept has no channel scale in it.
    *codes, kept = reference.norm_modulate_rotate_quantize(x, *front, scale, *rotation, True)
    expected = reference.rotate_quantize(kept, scale, *rotation)
    assert all(map(torch.equal, codes, expected))
    assert torch.equal(kept, reference.norm_modulate(x, *front))


@pytest.mark.parametrize(("kind", "block_size"), ROTATIONS)
@pytest.mark.parametrize("permuted", [False, True])
def test_rotate_is_smoothing_then_rotation(kind: str, block_size: int, permuted: bool):
    """channel_scale is in the order after the permutation, before everything for "dual"."""
    k = max(256, block_size)
    scheme = QuantScheme(rotation=kind, block_size=block_size)
    rotation = make_rotation(k, scheme, permuted=permuted)
    x, smooth = torch.randn(3, k, dtype=torch.float64), torch.rand(k) + 0.5
    channel_scale = smooth
    if kind == "hadamard":
        if permuted:
            channel_scale = smooth[rotation.permutation.long()]
        channel_scale = channel_scale * rotation.signs
    rotated = reference.rotate(
        x, channel_scale, rotation.permutation, rotation.matrices, kind, block_size
    )
    assert relative_error(rotated, rotation.apply(x * smooth)) < 1e-12


def quantize(x: torch.Tensor, **changes: object) -> tuple[torch.Tensor, torch.Tensor]:
    arguments: dict[str, object] = {
        "channel_scale": None,
        "permutation": None,
        "matrices": None,
        "rotation": "none",
        "block_size": 128,
        "act_bits": 8,
        "scale_mode": "absmax",
        "scale_factor": 1.0,
    }
    return reference.rotate_quantize(x, **{**arguments, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("act_bits", [8, 4])
@pytest.mark.parametrize("scale_factor", [1.0, 0.8])
def test_absmax_scale_and_codes(act_bits: int, scale_factor: float):
    qmax = 127 if act_bits == 8 else 7
    x = torch.randn(6, 96)
    x_q, x_scale = quantize(x, act_bits=act_bits, scale_factor=scale_factor)
    step = torch.tensor(scale_factor / qmax, dtype=torch.float32)
    assert torch.equal(x_scale, x.abs().amax(dim=1) * step)
    exact = x.double() / x_scale.double()[:, None]
    assert bool(((x_q - exact.clamp(-qmax, qmax)).abs() <= 0.5 + 1e-4).all())
    assert int(x_q.abs().max()) == qmax


def test_rms_scale():
    x = torch.randn(5, 256)
    _, x_scale = quantize(x, act_bits=4, scale_mode="rms", scale_factor=0.3545)
    exact = x.double().square().mean(dim=1).sqrt() * 0.3545
    assert relative_error(x_scale, exact) < 1e-6


def test_rms_codes_saturate():
    x = torch.zeros(1, 128)
    x[0, :2] = torch.tensor([100.0, -100.0])  # rms 12.5
    x_q, _ = quantize(x, act_bits=4, scale_mode="rms", scale_factor=1.0)
    assert x_q[0, :3].tolist() == [7, -7, 0]


def test_codes_round_half_to_even():
    v = torch.tensor([[0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 126.5, 127.5, -127.5]])
    codes = reference.quantize_by_scale(v, torch.ones(1), 8)
    assert codes.tolist() == [[0, 2, 2, 4, 0, -2, -2, 126, 127, -127]]


def test_a_zero_row_has_scale_and_codes_zero():
    x = torch.randn(3, 128)
    x[1] = 0
    for scale_mode in ("absmax", "rms"):
        x_q, x_scale = quantize(x, rotation="hadamard", scale_mode=scale_mode)
        assert x_scale[1] == 0 and not bool(x_q[1].any())
        assert bool((x_scale[[0, 2]] > 0).all()) and bool(x_q[[0, 2]].any(dim=1).all())


@pytest.mark.parametrize("scale_mode", ["absmax", "rms"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_nan_and_infinity_reach_the_scale_of_their_row_alone(
    scale_mode: str, bad: float, rotation: str
):
    x = torch.randn(3, 128)
    clean_q, clean_scale = quantize(x, rotation=rotation, scale_mode=scale_mode)
    x[1, 77] = bad
    x_q, x_scale = quantize(x, rotation=rotation, scale_mode=scale_mode)
    assert not bool(torch.isfinite(x_scale[1])) and not bool(x_q[1].any())
    assert torch.equal(x_q[[0, 2]], clean_q[[0, 2]])
    assert torch.equal(x_scale[[0, 2]], clean_scale[[0, 2]])


def test_a_step_whose_reciprocal_overflows_gives_codes_zero():
    """As in the kernels, which cannot tell such a row from a zero row."""
    x_q, x_scale = quantize(torch.full((1, 128), 1e-38))
    assert 0 < x_scale.item() < 2.0**-128
    assert not bool(x_q.any())
    x_q, _ = quantize(torch.full((1, 128), 1e-35))
    assert bool((x_q == 127).all())


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_outputs_are_contiguous_whatever_the_strides_of_x(rotation: str):
    x = torch.randn(4, 3, 128)
    x_q, x_scale = quantize(x.transpose(0, 1), rotation=rotation)
    assert x_q.is_contiguous() and x_scale.is_contiguous()
    expected_q, expected_scale = quantize(x.transpose(0, 1).contiguous(), rotation=rotation)
    assert torch.equal(x_q, expected_q) and torch.equal(x_scale, expected_scale)


def test_no_rows_and_one_row():
    x_q, x_scale = quantize(torch.empty(0, 128), rotation="hadamard")
    assert x_q.shape == (0, 128) and x_scale.shape == (0,)
    x = torch.randn(128)
    x_q, x_scale = quantize(x, rotation="hadamard")
    full_q, full_scale = quantize(x[None], rotation="hadamard")
    assert torch.equal(x_q, full_q[0]) and torch.equal(x_scale, full_scale[0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantized_codes_reconstruct_the_rotated_input(dtype: torch.dtype):
    x = torch.randn(8, 512).to(dtype)
    x_q, x_scale = quantize(x, rotation="hadamard", block_size=256)
    oracle = reference.rotate(x.double(), None, None, None, "hadamard", 256)
    # Half a step of the widest code, and what fp32 adds to it.
    assert bool((x_q * x_scale[:, None] - oracle).abs().le(0.51 * x_scale[:, None]).all())


# ---- GEMM and GEMV ------------------------------------------------------------------------------


def exact_gemm(problem, bias=None, residual=None, gate_rows=None) -> torch.Tensor:
    """fp32 output by fractions, each rounding of the contract spelled out."""
    accumulator = problem.x_q.long() @ problem.weight_levels().long().T
    m, n = accumulator.shape
    scaled = accumulator.float() * problem.x_scale[:, None]
    zero = torch.zeros(m, n)
    w_scale = problem.weight_scale.expand(m, n)
    y = exact_fma(scaled, w_scale, zero if bias is None else bias.expand(m, n))
    if residual is not None:
        gate = torch.ones(m, n) if gate_rows is None else gate_rows.float()
        y = exact_fma(gate, y, residual.float())
    return y


def run_gemm(problem, out_dtype, bias=None, residual=None, gate=None, activation="none"):
    return reference.gemm(
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


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("out_dtype", FLOATS)
def test_gemm_rounds_where_the_contract_says(bits: int, out_dtype: torch.dtype):
    problem = make_problem(6, 50, 96, bits)
    residual = torch.randn(6, 50).to(out_dtype)
    gate = torch.randn(3, 50).to(out_dtype)
    gate_rows = gate[torch.arange(6) // 2]
    for bias in (None, problem.bias):
        assert torch.equal(
            run_gemm(problem, out_dtype, bias), exact_gemm(problem, bias).to(out_dtype)
        )
        assert torch.equal(
            run_gemm(problem, out_dtype, bias, residual),
            exact_gemm(problem, bias, residual).to(out_dtype),
        )
        assert torch.equal(
            run_gemm(problem, out_dtype, bias, residual, gate),
            exact_gemm(problem, bias, residual, gate_rows).to(out_dtype),
        )


@pytest.mark.parametrize("bits", BITS)
def test_gemm_in_int32_returns_the_accumulators(bits: int):
    problem = make_problem(3, 40, 384, bits, extreme=True)
    expected = problem.x_q.long() @ problem.weight_levels().long().T
    assert torch.equal(run_gemm(problem, torch.int32).long(), expected)


def test_gemm_is_near_the_product_of_what_the_codes_mean():
    problem = make_problem(9, 70, 256, 4)
    weight = problem.weight_levels().double() * problem.weight_scale.double()[:, None]
    x = problem.x_q.double() * problem.x_scale.double()[:, None]
    oracle = F.linear(x, weight, problem.bias.double())
    output = run_gemm(problem, torch.float32, problem.bias)
    assert relative_error(output, oracle) < 1e-6
    residual, gate = torch.randn(9, 70), torch.randn(1, 70)
    gated = run_gemm(problem, torch.float32, problem.bias, residual, gate, "gelu_tanh")
    oracle = residual.double() + gate.double() * F.gelu(oracle, approximate="tanh")
    assert relative_error(gated, oracle) < 1e-6


@pytest.mark.parametrize("samples", [1, 2, 3, 6])
def test_gate_belongs_to_its_sample(samples: int):
    problem = make_problem(6, 20, 64, 4)
    residual, gate = torch.randn(6, 20), torch.randn(samples, 20)
    together = run_gemm(problem, torch.float32, problem.bias, residual, gate)
    plain = run_gemm(problem, torch.float32, problem.bias)
    for m in range(6):
        sample = m // (6 // samples)
        expected = exact_fma(gate[sample], plain[m], residual[m])
        assert torch.equal(together[m], expected)


def test_epilogue_in_chunks_of_rows_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    problem = make_problem(12, 20, 64, 4)
    residual, gate = torch.randn(12, 20), torch.randn(4, 20)
    arguments = (problem, torch.bfloat16, problem.bias, residual.bfloat16(), gate.bfloat16())
    whole = run_gemm(*arguments)
    monkeypatch.setitem(reference._EPILOGUE_ELEMENTS, "cpu", 100)  # 5 rows: chunks cut samples
    assert torch.equal(run_gemm(*arguments), whole)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gemv_is_as_good_as_torch(bits: int, dtype: torch.dtype, with_bias: bool):
    problem = make_problem(1, 70, 160, bits)
    x = torch.randn(5, 160).to(dtype)
    bias = problem.bias if with_bias else None
    constants = (problem.weight, problem.levels, problem.weight_scale, bias, bits, 70)
    oracle = reference.gemv(x.double(), *constants)
    weight = problem.weight_levels().double() * problem.weight_scale.double()[:, None]
    expected = F.linear(x.double(), weight, None if bias is None else bias.double())
    assert relative_error(oracle, expected) < 1e-12
    baseline = F.linear(x.float(), weight.float(), bias).to(dtype)
    assert_at_most_twice(reference.gemv(x, *constants), baseline, oracle)


ROWS_OF_16_BITS = {
    "ordinary": lambda x: x,
    "one outlier": lambda x: x * torch.where(torch.arange(x.shape[1]) == 7, 1000.0, 1.0),
    "an outlier in each block": lambda x: (
        x * torch.where(torch.arange(x.shape[1]) % 128 == 0, 30.0, 1.0)
    ),
    "many outliers": lambda x: x * torch.exp(2 * torch.randn_like(x)),
    "tiny": lambda x: x * 2.0**-12,
}


@pytest.mark.parametrize("kind", ROWS_OF_16_BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_limbs_are_not_worse_than_torch_in_16_bits(kind: str, dtype: torch.dtype):
    """Without the factor of two: weights in 16 bits cost torch more than limbs cost here."""
    problem = make_problem(1, 64, 1152, 4)
    x = ROWS_OF_16_BITS[kind](torch.randn(64, 1152)).to(dtype)  # of few rows one may decide
    weight = problem.weight_levels().double() * problem.weight_scale.double()[:, None]
    oracle = x.double() @ weight.T
    constants = (problem.weight, problem.levels, problem.weight_scale, None, 4, 64)
    error = relative_error(reference.gemv(x, *constants), oracle)
    assert error < 1.1 * relative_error(F.linear(x, weight.to(dtype)), oracle)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_limbs_hold_what_they_promise(dtype: torch.dtype):
    x = torch.randn(6, 300) * torch.exp(2 * torch.randn(6, 300))
    x[1] *= torch.finfo(dtype).tiny
    x[2, :128] = 0
    x[3, ::9] = torch.finfo(dtype).max
    x[4, ::3] = torch.linspace(1.98, 2.0, 100)  # where a step doubles
    x = x.to(dtype)
    q, step = reference.split_limbs(x)
    assert q.shape == (6, 3, 128) and step.shape == (6, 3)
    assert int(q.min()) >= -32639 and int(q.max()) <= 32639
    exponent = torch.log2(step.double())
    assert torch.equal(exponent, exponent.round())
    padded = F.pad(x, (0, 84)).view(6, 3, 128).double()
    error = (q * step.double()[..., None] - padded).abs()
    assert bool((error <= step.double()[..., None] / 2).all())
    # No step is twice what it could be; the least of them is 2^-126.
    largest = q.abs().amax(dim=-1)
    assert bool(((2 * largest > 32639 - 2) | (step <= 2.0**-126)).all())
    # Exact near the largest of a block, where steps have not come to their end.
    within = 2.0**6 if dtype == torch.bfloat16 else 2.0**3
    near = padded.abs() * within >= padded.abs().amax(dim=-1, keepdim=True)
    assert float(error[near & (step > 2.0**-100)[..., None]].max()) == 0.0


def test_a_block_with_an_infinity_or_nan_spoils_its_row_alone():
    problem = make_problem(1, 24, 300, 3)
    x = torch.randn(3, 300).half()
    constants = (problem.weight, problem.levels, problem.weight_scale, problem.bias, 3, 24)
    clean = reference.gemv(x, *constants)
    x[0, 5], x[2, 299] = float("nan"), float("inf")
    y = reference.gemv(x, *constants)
    assert bool(y[0].isnan().all()) and bool(y[2].isnan().all())
    assert torch.equal(y[1], clean[1])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gemm_a16_sums_exact_products(bits: int, dtype: torch.dtype):
    """With inputs whose sums fp32 holds, every bit is known."""
    problem = make_problem(1, 70, 160, bits)
    problem.weight_scale.fill_(2.0**-8)
    x = torch.randint(-3, 4, (20, 160)).to(dtype)
    constants = (problem.weight, problem.levels, problem.weight_scale, problem.bias, bits, 70)
    total = x.double() @ problem.weight_levels().double().T
    expected = (total * 2.0**-8 + problem.bias.double()).float().to(dtype)
    assert torch.equal(reference.gemm_a16(x, *constants), expected)

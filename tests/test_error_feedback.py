"""Error feedback and the weight for a quantized input: against brute force and closed forms."""

from __future__ import annotations

import time

import ptx_emulator
import pytest
import torch
from compiled_kernels import assert_no_spills, compile_kernel
from torch import Tensor

from lrq_kernels.codebook import TwinLogCodebook
from lrq_kernels.packing import unpack_codes
from lrq_kernels.rotation import Rotation
from lrq_kernels.scheme import QuantScheme
from lrq_quant import rounding_kernels
from lrq_quant.calibration import ActivationStats
from lrq_quant.error_feedback import (
    BLOCK_SIZE,
    ErrorFeedback,
    codebook_nearest,
    rotated_gram,
    round_columns,
)
from lrq_quant.pipeline import quantize_linear
from lrq_quant.quantized_input import QuantizedInput, distinct_tokens
from lrq_quant.recipe import CalibrationOptions
from lrq_quant.rotation_search import dequantized_activation
from lrq_quant.twin_log import fit_twin_log


def correlated(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Tokens fp32 [rows, columns] whose covariance falls off and is far from diagonal."""
    mix = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    spectrum = torch.logspace(0, -2, columns)
    return torch.randn(rows, columns, generator=generator) * spectrum @ mix


def by_hand(weight: Tensor, gram: Tensor, nearest, damping: float, order: Tensor) -> Tensor:
    """The rule of the paper (Optimal Brain Quantization with a fixed order): after each column the
    inverse of the rest by elimination, in fp64."""
    weight = weight.double()[:, order].clone()
    inverse = (gram.double() + damping * gram.diagonal().double().mean() * torch.eye(len(gram)))[
        order
    ][:, order].inverse()
    result = torch.empty_like(weight)
    for k in range(weight.shape[1]):
        value = nearest(weight[:, k].float(), int(order[k])).double()
        result[:, k] = value
        error = (weight[:, k] - value) / inverse[k, k]
        weight -= error[:, None] * inverse[k]
        inverse = inverse - inverse[:, k : k + 1] * inverse[k : k + 1] / inverse[k, k]
    natural = torch.empty_like(result)
    natural[:, order] = result
    return natural


@pytest.mark.parametrize("act_order", [False, True])
def test_rounding_is_that_of_the_paper(generator, act_order):
    tokens = correlated(400, 150, generator)  # more columns than one block
    gram = tokens.T @ tokens
    weight = torch.randn(12, 150, generator=generator)
    nearest = codebook_nearest(fit_twin_log(weight, 3))
    order = torch.arange(150)
    if act_order:
        order = gram.diagonal().argsort(descending=True, stable=True)
    expected = by_hand(weight, gram, nearest, 0.01, order)
    got = ErrorFeedback(gram, act_order=act_order).round(weight, nearest)
    # A tie that falls to the other side changes the rest of its row: most rows must agree.
    same = (got.double() == expected).all(1)
    assert same.float().mean() > 0.7


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_value_is_a_level_and_the_output_is_closer(generator, bits):
    tokens = correlated(2000, 192, generator)
    weight = torch.randn(64, 192, generator=generator)
    codebook = fit_twin_log(weight, bits)
    rounded = ErrorFeedback(tokens.T @ tokens).round(weight, codebook_nearest(codebook))
    assert torch.equal(codebook.decode(codebook.encode(rounded)), rounded)
    plain = codebook.decode(codebook.encode(weight))
    fresh = tokens[1000:]
    errors = [((w - weight) @ fresh.T).square().sum() for w in (rounded, plain)]
    assert errors[0] < 0.6 * errors[1]


def test_refinement_lowers_the_error_pass_by_pass(generator):
    tokens = correlated(2000, 200, generator)
    weight = torch.randn(48, 200, generator=generator)
    codebook = fit_twin_log(weight, 3)
    feedback = ErrorFeedback(tokens.T @ tokens)
    errors = []
    for passes in (0, 1, 3):
        rounded = feedback.round(weight, codebook_nearest(codebook), passes)
        assert torch.equal(codebook.decode(codebook.encode(rounded)), rounded)
        difference = (rounded - weight).double()
        damped = (tokens.T @ tokens).double() + feedback.added * torch.eye(200)
        errors.append(((difference @ damped) * difference).sum(1))
    # Of each row, up to rounding: a step is taken only where it lowers the error.
    assert (errors[1] <= errors[0] * 1.0001).all() and (errors[2] <= errors[1] * 1.0001).all()
    assert errors[1].sum() < 0.97 * errors[0].sum()


def test_importance_is_the_error_that_feedback_cannot_undo(generator):
    """A column whose error the others can make good counts little: E[x_k^2 | all x_j to come]."""
    tokens = torch.randn(5000, 6, generator=generator)
    tokens[:, 5] = tokens[:, 0] + 0.1 * torch.randn(5000, generator=generator)
    feedback = ErrorFeedback(tokens.T @ tokens / 5000, damping=0.0, act_order=False)
    expected = torch.tensor([0.01, 1.0, 1.0, 1.0, 1.0, 1.01])
    torch.testing.assert_close(feedback.importance, expected, rtol=0.15, atol=0.005)


def test_solve_inverts_the_damped_gram(generator):
    tokens = correlated(300, 64, generator)
    gram = tokens.T @ tokens
    feedback = ErrorFeedback(gram, damping=0.02)
    rows = torch.randn(5, 64, generator=generator)
    damped = gram.double() + feedback.added * torch.eye(64)
    torch.testing.assert_close(feedback.solve(rows) @ damped, rows.double(), rtol=0, atol=1e-6)
    assert feedback.added == pytest.approx(0.02 * float(gram.diagonal().mean()), rel=1e-4)


def test_a_singular_gram_is_damped_until_it_works(generator):
    tokens = torch.randn(3, 64, generator=generator)
    weight = torch.randn(8, 64, generator=generator)
    nearest = codebook_nearest(fit_twin_log(weight, 4))
    rounded = ErrorFeedback(tokens.T @ tokens, damping=0.0).round(weight, nearest)
    assert torch.isfinite(rounded).all()
    silent = ErrorFeedback(torch.zeros(64, 64))
    plain = torch.stack([nearest(weight[:, k], k) for k in range(64)], 1)
    assert silent.added is None and torch.equal(silent.round(weight, nearest), plain)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"gram must be \[K, K\]"):
        ErrorFeedback(torch.ones(3, 4))
    with pytest.raises(ValueError, match="NaN or inf"):
        ErrorFeedback(torch.full((4, 4), torch.nan))
    with pytest.raises(ValueError, match="damping"):
        ErrorFeedback(torch.eye(4), damping=-1)
    with pytest.raises(ValueError, match=r"must be \[N, 4\]"):
        ErrorFeedback(torch.eye(4)).round(torch.ones(2, 5), lambda v, k: v)
    with pytest.raises(ValueError, match="must be finite"):
        ErrorFeedback(torch.eye(4)).round(torch.full((2, 4), torch.inf), lambda v, k: v)


def test_gram_follows_smoothing_and_rotation(generator):
    tokens = correlated(500, 128, generator)
    smooth = torch.rand(128, generator=generator) + 0.5
    rotation = Rotation.hadamard(128, 64, generator=generator)
    moved = rotation.apply(tokens * smooth)
    gram = rotated_gram(tokens.T @ tokens, smooth, rotation.apply)
    torch.testing.assert_close(gram, moved.T @ moved, rtol=1e-3, atol=1e-3)


def collected(tokens: Tensor) -> ActivationStats:
    options = CalibrationOptions(gram=True, sample_rows=len(tokens))
    stats = ActivationStats("layer", tokens.shape[1], options)
    stats.update(tokens)
    return stats


def quantized_input(tokens: Tensor, bits: int) -> QuantizedInput:
    return QuantizedInput(
        collected(tokens),
        None,
        lambda x: x,
        lambda x: dequantized_activation(x, bits, "rms", 0.3545),
        device=torch.device("cpu"),
        damping=1e-4,
    )


def test_target_lies_half_way_to_the_least_squares_weight_of_quantized_tokens(generator):
    """On fresh tokens that weight is better than the weight itself, by far; noise across channels
    that the model leaves out keeps it from the optimum by little. Half way most of it is won."""
    tokens = correlated(20000, 128, generator) + 0.1 * torch.randn(128, generator=generator)
    train, fresh = tokens[:17000], tokens[17000:]
    weight = torch.randn(32, 128, generator=generator)
    made = quantized_input(train, 4)
    fitted, target = made.least_squares(weight), made.target(weight, 4)

    def error(w: Tensor) -> float:
        x_q = dequantized_activation(fresh, 4, "rms", 0.3545)
        return float((fresh @ weight.T - x_q @ w.T).square().sum())

    x_q = dequantized_activation(fresh, 4, "rms", 0.3545)
    best = torch.linalg.lstsq(x_q, fresh @ weight.T).solution.T
    assert error(fitted) < 0.75 * error(weight)
    assert error(fitted) < 1.25 * float((fresh @ weight.T - x_q @ best.T).square().sum())
    torch.testing.assert_close(target, (weight + fitted) / 2)
    won = (error(weight) - error(target)) / (error(weight) - error(fitted))
    assert 0.6 < won < 0.8  # 0.75 if `fitted` were the optimum
    assert torch.equal(made.target(weight, 8), weight)


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(2, 8), (3, 4), (4, 4)])
def test_no_row_loses_gain(weight_bits, act_bits, generator):
    """Of the exact product on fresh tokens: levels, clipping and the filter each take some away."""
    tokens = correlated(20000, 128, generator)
    train, fresh = tokens[:17000], tokens[17000:]
    weight = torch.randn(32, 128, generator=generator)
    made = quantized_input(train, act_bits)
    scheme = QuantScheme(weight_bits, act_bits, "none", 128, "rms", 0.3545)
    state = quantize_linear(weight, None, scheme, quantized_input=made)

    def gain(weight_scale: Tensor) -> Tensor:
        codes = unpack_codes(state.codes, weight_bits, 128)
        decoded = TwinLogCodebook(state.levels, weight_scale).decode(codes)
        x_q = dequantized_activation(fresh, act_bits, "rms", 0.3545)
        y = fresh @ weight.T
        return (y * (x_q @ decoded.T)).sum(0) / y.square().sum(0)

    codebook = fit_twin_log(made.target(weight, act_bits), weight_bits, importance=made.importance)
    assert gain(codebook.scale).mean() < 0.993
    torch.testing.assert_close(gain(state.weight_scale), torch.ones(32), rtol=0, atol=0.03)
    assert abs(gain(state.weight_scale).mean() - 1) < 0.005


def test_rows_of_no_gain_are_left_alone(generator):
    made = quantized_input(correlated(2000, 64, generator), 8)
    weight = torch.randn(4, 64, generator=generator)
    decoded = torch.stack([weight[0], 0 * weight[1], -weight[2], weight[3] / 2])
    weight[3] = 0
    factor = made.lost_gain(weight, decoded)
    torch.testing.assert_close(factor[0], torch.tensor(1.0), rtol=0, atol=0.01)
    assert factor[1:].tolist() == [1, 1, 1]


def test_without_noise_the_target_is_the_weight(generator):
    tokens = correlated(2000, 64, generator)
    made = quantized_input(tokens, 16)
    weight = torch.randn(8, 64, generator=generator)
    torch.testing.assert_close(made.least_squares(weight), weight, rtol=0, atol=1e-4)
    silent = quantized_input(torch.zeros(100, 64), 4)
    assert torch.equal(silent.least_squares(weight), weight)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_tokens_all_alike_leave_the_weight(scale, seed):
    """Their covariance is nothing but rounding of the gram, of either sign."""
    generator = torch.Generator().manual_seed(seed)
    tokens = scale * torch.randn(1, 128, generator=generator).repeat(100, 1)
    weight = torch.randn(8, 128, generator=generator)
    target = quantized_input(tokens, 4).least_squares(weight)
    assert (target - weight).norm() < 0.25 * weight.norm()


@pytest.mark.gpu
def test_the_widest_input_of_flux_fits_a_gpu():
    """K = 15360 of a single block's proj_out: finite, better than nearest, in bounded memory."""
    columns, rows = 15360, 3072
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"generator": generator, "device": "cuda"}
    spread = torch.logspace(0, -1, columns, device="cuda")

    def tokens(count: int) -> Tensor:
        drawn = torch.randn(count, columns, **options) * spread
        drawn[:, 1:] += 0.7 * drawn[:, :-1].clone()
        return drawn

    stats = ActivationStats("proj_out", columns, CalibrationOptions(gram=True))
    # Eight tokens to a channel: with 1.6 the moments are so uncertain that 0.87 of the error stays.
    for _ in range(15):
        stats.update(tokens(8192))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    weight = torch.randn(rows, columns, **options)
    started = time.perf_counter()
    made = QuantizedInput(
        stats,
        None,
        lambda x: x,
        lambda x: dequantized_activation(x, 8, "absmax", 1.0),
        device=torch.device("cuda"),
    )
    target = made.least_squares(weight)
    codebook = fit_twin_log(target, 4, importance=made.importance)
    rounded = made.round(target, codebook_nearest(codebook))
    torch.cuda.synchronize()
    print(f"K = {columns}, N = {rows}: {time.perf_counter() - started:.1f} s", end=", ")
    peak = torch.cuda.max_memory_allocated() - before
    print(f"peak {peak / 2**30:.1f} GiB")
    plain = codebook.decode(codebook.encode(weight))
    fresh = tokens(8192)
    errors = [((w - weight) @ fresh.T).square().sum() for w in (rounded, plain)]
    assert torch.isfinite(rounded).all() and errors[0] < 0.8 * errors[1]
    assert peak < 24 * 2**30


def test_repeated_tokens_count_once(generator):
    """A caption at every step, and one token that is half of all."""
    captions = torch.randn(40, 16, generator=generator)
    stats = ActivationStats("captions", 16, CalibrationOptions(sample_rows=400))
    for _ in range(50):
        stats.update(captions)
    assert distinct_tokens(stats) == 40
    stats = ActivationStats("half", 16, CalibrationOptions(sample_rows=400))
    for _ in range(20):
        stats.update(torch.randn(100, 16, generator=generator))
        stats.update(captions[:1].expand(100, 16))
    assert 1500 < distinct_tokens(stats) < 2500


def test_statistics_without_gram_are_refused():
    stats = ActivationStats("layer", 8)
    with pytest.raises(ValueError, match="layer must hold the gram matrix"):
        QuantizedInput(stats, None, lambda x: x, lambda x: x, device=torch.device("cpu"))


# ---- a block of columns in one launch ---------------------------------------------------------


def compiled_block_kernel(refine: bool, levels: int, arch: int):
    """As for widths that 32 divides, which are those of the format."""
    pointers = ["value", "level", "matrix", "diagonal", "rounded", "change"]
    arguments: dict[str, object] = {f"{name}_ptr": "*fp32" for name in pointers}
    arguments["old_ptr"] = "*fp32" if refine else None
    for name in ("value", "old", "matrix", "rounded", "change"):
        arguments[f"{name}_row_stride"] = "i32"
    arguments |= {"rows": "i32", "columns": "i32", "REFINE": refine, "LEVELS": levels}
    arguments |= {"BLOCK": BLOCK_SIZE, "ROWS": rounding_kernels.ROWS}
    kernel = rounding_kernels.round_kernel
    return compile_kernel(kernel, arguments, 1, arch, divisible=("columns",))


def emulated(value, old, ascending, matrix, diagonal, rounded) -> Tensor:
    """rounding_kernels.round_block by the code that an H100 gets, run here."""
    rows, columns = value.shape
    compiled = compiled_block_kernel(old is not None, ascending.shape[1], 90)
    kernel = ptx_emulator.Kernel(compiled.asm["ptx"], 32)
    change = torch.full((rows, columns), torch.nan)
    tensors = {"value": value, "old": old, "level": ascending, "matrix": matrix.contiguous()}
    tensors |= {"diagonal": diagonal.contiguous(), "rounded": rounded, "change": change}
    values: dict[str, object] = {"rows": rows, "columns": columns}
    for name, tensor in tensors.items():
        values[f"{name}_row_stride"] = 0 if tensor is None else tensor.stride(0)
        if tensor is None:
            continue
        memory = torch.empty(0).set_(tensor.untyped_storage())[tensor.storage_offset() :]
        values[f"{name}_ptr"] = memory.view(torch.uint8).numpy()
        # The emulator does not mind where a load of four begins.
        assert all(step % 4 == 0 for step in (tensor.storage_offset(), *tensor.stride()[:-1]))
    names = [n for n in rounding_kernels.round_kernel.arg_names if n in values]
    for program in range(-(-rows // rounding_kernels.ROWS)):
        kernel(program, [values[name] for name in names])
    return change


def check_block(generator, bits: int, rows: int, columns: int, round_block, device: str) -> None:
    """round_block against torch's ops, without and with old levels."""
    weight = torch.randn(rows, 200, generator=generator)
    nearest = codebook_nearest(fit_twin_log(weight, bits))
    tokens = correlated(400, 200, generator)
    gram = tokens.T @ tokens
    block = slice(200 - columns, 200)
    factor = torch.linalg.cholesky(gram.double().inverse(), upper=True).float()[block, block]
    names = torch.arange(columns)

    def both(values: Tensor, old: Tensor | None, matrix: Tensor) -> Tensor:
        expected = torch.empty(rows, columns)
        change = round_columns(nearest, values.clone(), old, matrix, expected, names)
        # Parts of wider tensors, as in a weight; at odd places where the columns are odd.
        before = 32 if columns % 32 == 0 else 3
        wide = [torch.full((rows, columns + 2 * before), torch.nan, device=device) for _ in "123"]
        block_values, block_old, got = (x[:, before:-before] for x in wide)
        block_values.copy_(values)
        if old is not None:
            block_old.copy_(old)
        moved = round_block(
            block_values,
            None if old is None else block_old,
            nearest.ascending.to(device),
            matrix.to(device),
            matrix.diagonal().to(device),
            got,
        ).cpu()
        assert wide[2][:, :before].isnan().all() and wide[2][:, -before:].isnan().all()
        got = got.cpu()
        # Sums are rounded in another way: a value amid two levels may fall to the other, and takes
        # what follows in its row along.
        same = (got == expected).all(1)
        assert same.float().mean() > 0.8
        torch.testing.assert_close(moved[same], change[same], rtol=1e-4, atol=1e-4)
        return expected

    rounded = both(weight[:, block].contiguous(), None, factor)
    # As if nothing but this block had been rounded.
    gradient = (rounded - weight[:, block]) @ gram[block, block]
    refined = both(gradient, rounded, gram[block, block])
    assert rows * columns < 100 or (refined != rounded).any()


@pytest.mark.parametrize("bits,rows,columns", [(2, 9, 96), (3, 1, 32), (4, 6, 128)])
def test_block_of_columns_emulated(generator, bits, rows, columns):
    check_block(generator, bits, rows, columns, emulated, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rows,columns", [(3072, 128), (4, 96), (1, 33)])
def test_block_of_columns_on_a_gpu(generator, bits, rows, columns):
    check_block(generator, bits, rows, columns, rounding_kernels.round_block, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("passes", [0, 1])
def test_rounding_on_a_gpu_is_that_on_a_cpu(generator, passes):
    tokens = correlated(2000, 416, generator)
    weight = torch.randn(512, 416, generator=generator)
    codebook = fit_twin_log(weight, 4)
    expected = ErrorFeedback(tokens.T @ tokens).round(weight, codebook_nearest(codebook), passes)
    on_gpu = TwinLogCodebook(codebook.levels.cuda(), codebook.scale.cuda())
    feedback = ErrorFeedback((tokens.T @ tokens).cuda())
    got = feedback.round(weight.cuda(), codebook_nearest(on_gpu), passes).cpu()
    assert torch.equal(codebook.decode(codebook.encode(got)), got)
    assert (got == expected).all(1).float().mean() > 0.8
    errors = [((w - weight) @ tokens.T).square().sum() for w in (got, expected)]
    assert float(errors[0] / errors[1]) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("refine", [False, True])
def test_block_kernel_compiles_ahead_of_time(arch, refine):
    compiled = compiled_block_kernel(refine, 16, arch)
    assert_no_spills(compiled)
    # A row is a warp's own: nothing goes through shared memory, nothing waits for another.
    assert compiled.metadata.shared == 0 and "bar.sync" not in compiled.asm["ptx"]


def test_a_block_that_the_kernel_cannot_take_is_refused():
    wide = torch.zeros(4, BLOCK_SIZE + 1)
    levels, matrix = torch.zeros(4, 16), torch.eye(BLOCK_SIZE + 1)
    round_block = rounding_kernels.round_block
    with pytest.raises(ValueError, match="128 columns at most, got 129"):
        round_block(wide, None, levels, matrix, matrix.diagonal(), wide)
    for value in (wide[:, :8].double(), torch.zeros(8, 4).T):
        with pytest.raises(ValueError, match="round_block: value must be float32 with neighbour"):
            round_block(value, None, levels, matrix[:8, :8], matrix.diagonal()[:8], wide[:, :8])
    with pytest.raises(ValueError, match="round_block: old must be float32"):
        round_block(wide[:, :8], wide[:, :8].half(), levels, matrix, matrix, wide[:, :8])

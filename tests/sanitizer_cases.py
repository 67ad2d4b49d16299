"""Every CUDA and Triton kernel once, on the smallest ragged shapes, for compute-sanitizer:

    compute-sanitizer --tool memcheck python tests/sanitizer_cases.py
    compute-sanitizer --tool racecheck python tests/sanitizer_cases.py gemvs rotated_rows

Allocations are not cached, and operands end where their last element ends, so that an access past
a tensor is one past an allocation. Prints each case as it starts,
"cases done" at the end.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from lrq_kernels import _planner, ops, reference  # noqa: E402
from lrq_kernels.testing import Problem, make_problem  # noqa: E402

BITS = (4, 3, 2)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def exact_rows(rows: Tensor, stride: int) -> Tensor:
    """A copy of rows [M, K] on the GPU, `stride` apart, whose memory ends with the last one."""
    m, k = rows.shape
    memory = torch.zeros((m - 1) * stride + k, dtype=rows.dtype, device="cuda")
    return memory.as_strided((m, k), (stride, 1)).copy_(rows)


def expect_equal(got: Tensor, expected: Tensor, what: str) -> None:
    if not torch.equal(got.cpu(), expected.cpu()):
        raise SystemExit(f"wrong result: {what}")


def on_gpu(m: int, n: int, k: int, bits: int) -> Problem:
    """x_q ends with its last piece of 16 bytes: memcheck takes a cp.async for 16 bytes, though the
    hardware reads only as many as its src-size says. Rows of 3 bits share tables."""
    problem = make_problem(m, n, k, bits, device="cuda", tables=3 if bits == 3 else None)
    stride = -(-k // 16) * 16
    x_q = exact_rows(torch.nn.functional.pad(problem.x_q, (0, stride - k)), stride)[:, :k]
    return Problem(**{**vars(problem), "x_q": x_q})


def layouts(bits: int) -> None:
    for n, k in ((1, 1), (70, 130)):
        problem = on_gpu(1, n, k, bits)
        sizes = (n, k, bits)
        expect_equal(
            reference.weight_levels(problem.weight, problem.levels, *sizes, problem.table_of_row),
            problem.weight_levels(),
            f"prepack {sizes}",
        )
        codes = ops.unprepack(problem.weight, *sizes)
        expect_equal(ops.prepack(codes, k, bits), problem.weight, f"unprepack {sizes}")
        arguments = (problem.weight, problem.levels, problem.weight_scale, *sizes)
        for dtype in FLOATS:
            got = ops.dequantize(*arguments, dtype, problem.table_of_row)
            expected = reference.dequantize(*arguments, dtype, problem.table_of_row)
            expect_equal(got, expected, f"dequantize {sizes}")


def gemm(
    problem: Problem,
    out_dtype: torch.dtype,
    samples: int,
    activation: str,
    pads: tuple[int, int] = (3, 1),
    config: int | None = None,
) -> None:
    """pads: elements between rows of the residual and of the gate; config: a row of the table."""
    m, n, k = problem.sizes
    residual = gate = None
    if samples:
        residual = exact_rows(torch.randn(m, n).to(out_dtype), n + pads[0])
        gate = exact_rows(torch.randn(samples, n).to(out_dtype), n + pads[1])
    arguments = (
        problem.x_q,
        problem.x_scale,
        problem.weight,
        problem.levels,
        problem.weight_scale,
        None if out_dtype == torch.int32 else problem.bias,
        residual,
        gate,
        problem.weight_bits,
        n,
        activation,
        out_dtype,
        problem.table_of_row,
    )
    if config is None:
        got = ops.gemm(*arguments)
    else:
        got = torch.ops.lrq.gemm_config.default(*arguments[:-1], config, arguments[-1])
    if activation == "none":
        expect_equal(got, reference.gemm(*arguments), f"gemm {m, n, k, out_dtype}")


def gemms(bits: int) -> None:
    for m, n, k in ((1, 1, 1), (3, 33, 16), (18, 72, 96), (34, 130, 136)):
        problem = on_gpu(m, n, k, bits)
        for out_dtype in (*FLOATS, torch.int32):
            gemm(problem, out_dtype, 0, "none")
        gemm(problem, torch.bfloat16, 1, "gelu_tanh")
        gemm(problem, torch.float32, 1 if m % 2 else 2, "none")
    arch = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    for config in _planner.gemm_configs():
        m = config.tile_m // 2 + 1
        sizes = (128 * tiles - 60 for tiles in range(1, 257))
        for n in sizes:
            if _planner.select(m, n, 160, bits, arch).name == config.name:
                gemm(on_gpu(m, n, 160, bits), torch.bfloat16, 1, "none")
                break
    if arch == 90:
        tails(bits)


def tails(bits: int) -> None:
    """A last wave in parts of each number of tokens, of which some lie past the last token."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    for index, config in enumerate(_planner.gemm_configs()):
        seen = {config.tile_m}
        for n in range(200, 2 * sms * config.tile_n, config.cluster * config.tile_n):
            if config.tile_m != 256 or not config.is_legal(812, n, 100, bits, 90):
                continue
            walks = _planner.walks(config, 812, n, 100, bits, sms)
            if (tokens := min(walk[-1][1] for walk in walks)) not in seen:
                seen.add(tokens)
                gemm(on_gpu(812, n, 100, bits), torch.bfloat16, 1, "none", (8, 8), index)


def gemvs(bits: int) -> None:
    for (n, k), m in itertools.product(((1, 1), (33, 130), (16, 1152)), (1, 3, 5, 16)):
        problem = on_gpu(m, n, k, bits)
        constants = (problem.weight, problem.levels, problem.weight_scale, problem.bias, bits, n)
        for dtype in (torch.bfloat16, torch.float16):
            x = exact_rows(torch.randn(m, k).to(dtype), k + 1)
            y = ops.gemv(x, *constants, problem.table_of_row)
            if not bool(y.isfinite().all()):
                raise SystemExit(f"wrong result: gemv {m, n, k, dtype}")


def a16_gemms(bits: int) -> None:
    """Rows of 16 bits that TMA reads where the GPU has a kernel for them, else dequantized."""
    kernel = torch.cuda.get_device_capability() == (9, 0)
    tiles = [(-1, 16), *enumerate(m for m, _ in _planner.a16_tiles() if kernel)]
    for (n, k), (tile, tokens) in itertools.product(((1, 8), (136, 200)), tiles):
        m = tokens + 1
        problem = on_gpu(m, n, k, bits)
        constants = (problem.weight, problem.levels, problem.weight_scale, problem.bias, bits, n)
        for dtype in (torch.bfloat16, torch.float16):
            x = exact_rows(torch.randn(m, k).to(dtype), k + 8)
            y = ops.gemm_a16(x, *constants, tile, problem.table_of_row)
            if not bool(y.isfinite().all()):
                raise SystemExit(f"wrong result: gemm_a16 {m, n, k, tile, dtype}")


def rotations() -> None:
    """One dtype, permutation and scale mode a case: each combination is compiled anew."""
    dual = torch.linalg.qr(torch.randn(2, 128, 128)).Q.contiguous().cuda()
    bf16, fp16 = torch.bfloat16, torch.float16
    for rotation, block_size, k, dtype, permuted, act_bits, mode in (
        ("none", 128, 77, bf16, True, 8, "absmax"),
        ("hadamard", 32, 96, fp16, False, 4, "rms"),
        ("hadamard", 64, 192, bf16, False, 8, "rms"),
        ("hadamard", 128, 384, bf16, True, 8, "absmax"),
        ("hadamard", 256, 768, bf16, False, 4, "absmax"),
        ("hadamard", 1024, 1024, fp16, True, 8, "absmax"),
        ("dual", 128, 384, bf16, True, 8, "absmax"),
        ("dual", 128, 256, fp16, False, 4, "rms"),
    ):
        channel_scale = torch.rand(k, device="cuda")
        if rotation == "hadamard" and not permuted:  # what csrc/rotate takes
            channel_scale = torch.exp2((4 * channel_scale).floor()).bfloat16()
        permutation = torch.randperm(k, device="cuda").int() if permuted else None
        matrices = dual if rotation == "dual" else None
        x = exact_rows(torch.randn(3, k).to(dtype), k + 8)
        options = (channel_scale, permutation, matrices, rotation, block_size)
        wide = (x.double().cpu(), *[o.cpu() if isinstance(o, Tensor) else o for o in options])
        rotated = ops.rotate(x, *options).double().cpu()
        oracle = reference.rotate(*wide)
        if not bool(((rotated - oracle).abs() < 0.02 * oracle.abs().max()).all()):
            raise SystemExit(f"wrong result: rotate {rotation} {block_size}")
        x_q, x_scale = ops.rotate_quantize(x, *options, act_bits, mode, 0.5)
        quantized = (x_q * x_scale[:, None]).double().cpu()
        expected_q, expected_scale = reference.rotate_quantize(*wide, act_bits, mode, 0.5)
        error = (quantized - expected_q * expected_scale[:, None]).abs()
        if not bool((error < 1.5 * expected_scale[:, None]).all()):  # a step apart at ties
            raise SystemExit(f"wrong result: rotate_quantize {rotation} {block_size}")


def fused_rotations() -> None:
    """Each fused form with and without what is optional, on rows and vectors that end exactly."""
    bf16, fp16 = torch.bfloat16, torch.float16
    dual = torch.linalg.qr(torch.randn(2, 128, 128)).Q.contiguous().cuda()
    for rotation, k, dtype, permuted, keep in (
        ("none", 77, bf16, False, True),
        ("hadamard", 384, bf16, True, True),
        ("hadamard", 1152, fp16, False, False),
        ("dual", 256, fp16, True, True),
    ):
        permutation = torch.randperm(k, device="cuda").int() if permuted else None
        matrices = dual if rotation == "dual" else None
        scale = torch.rand(k, device="cuda")
        options = (scale, permutation, matrices, rotation, 128, 8, "absmax", 1.0)
        x = exact_rows(torch.randn(4, k).to(dtype), k + 8)
        other = exact_rows(torch.randn(4, k).to(dtype), k + 5)
        weight, vectors = torch.rand(k, device="cuda"), exact_rows(torch.randn(2, k), k + 3)
        samples = x.unflatten(0, (2, 2))
        front = (weight.to(dtype), None, vectors, vectors, "layer", 1e-6)
        for op, arguments in (
            ("norm_modulate_rotate_quantize", (samples, *front, *options, keep)),
            ("activation_rotate_quantize", (x, other, "silu", *options, keep)),
            ("activation_rotate_quantize", (x, None, "gelu_erf", *options, keep)),
            ("concat_rotate_quantize", (x[:, :40], other[:, : k - 40], *options)),
        ):
            got = getattr(ops, op)(*arguments)
            on_cpu = [a.cpu() if isinstance(a, Tensor) else a for a in arguments]
            expected = getattr(ops, op)(*on_cpu)
            steps = expected[1][..., None]
            error = (got[0] * got[1][..., None]).cpu() - expected[0] * steps
            if not bool((error.abs() < 1.5 * steps).all()):  # a step apart at ties
                raise SystemExit(f"wrong result: {op} {rotation} {k}")


def rotated_rows() -> None:
    """One and several warps a token, one and several tokens a warp, blocks past K, two sources,
    vectors of samples that lie on 16 bytes or elsewhere."""
    bf16, fp16 = torch.bfloat16, torch.float16
    for tokens, norm, first, second, samples, block_size, dtype, act_bits, mode in (
        (6, "none", 128, 0, 0, 128, bf16, 8, "absmax"),
        (6, "none", 1152, 0, 0, 128, fp16, 4, "rms"),
        (6, "none", 640, 384, 0, 256, bf16, 8, "rms"),
        (6, "none", 3072, 12288, 0, 1024, bf16, 8, "absmax"),
        (6, "layer", 1152, 0, 3, 128, bf16, 8, "absmax"),
        (6, "rms", 1024, 512, 1, 512, fp16, 8, "absmax"),
        (6, "layer", 8192, 0, 0, 128, bf16, 4, "absmax"),
        (801, "none", 1152, 0, 0, 128, bf16, 8, "absmax"),
        (801, "none", 1024, 512, 0, 128, bf16, 4, "rms"),
        (801, "none", 3072, 0, 0, 128, fp16, 8, "absmax"),
        (1602, "layer", 384, 0, 3, 128, bf16, 4, "absmax"),
    ):
        k = first + second
        x = exact_rows(torch.randn(tokens, first).to(dtype), first + 8)
        other = exact_rows(torch.randn(tokens, second).to(dtype), second + 16) if second else None
        scale = shift = None
        if samples:
            odd = tokens == 6
            scale = exact_rows(torch.randn(samples, k).to(dtype), k + odd)
            shift = torch.randn(samples, k)
            shift = exact_rows(shift if odd else shift.to(dtype), k + 3 * odd)
        powers = torch.exp2(torch.randint(-3, 4, (k,), device="cuda")).bfloat16()
        options = (norm, 1e-6, powers, block_size, act_bits, mode, 0.5)
        arguments = (x, other, scale, shift, *options)
        x_q, x_scale = ops._rotate_rows(*arguments)
        wide = [a.double().cpu() if isinstance(a, Tensor) else a for a in arguments]
        expected_q, expected_scale = reference.rotate_rows(*wide)
        error = x_q.cpu() * x_scale[:, None].double().cpu() - expected_q * expected_scale[:, None]
        if not bool((error.abs() < 1.5 * expected_scale[:, None]).all()):  # a step apart at ties
            raise SystemExit(f"wrong result: _rotate_rows {norm} {k} {block_size}")


def rounded_blocks(bits: int) -> None:
    """Against torch's ops, in tensors that end with the last row."""
    from lrq_quant.error_feedback import codebook_nearest, round_columns
    from lrq_quant.rounding_kernels import round_block
    from lrq_quant.twin_log import fit_twin_log

    for rows, columns in ((5, 32), (9, 128)):
        weight = torch.randn(rows, columns, device="cuda")
        nearest = codebook_nearest(fit_twin_log(weight, bits))
        factor = (torch.eye(columns) + torch.randn(columns, columns).triu(1) / columns).cuda()
        old = None
        for matrix in (factor, factor + factor.T):
            value = exact_rows(weight, columns + 32)
            rounded, expected = exact_rows(weight, columns + 32), torch.empty_like(weight)
            round_block(value, old, nearest.ascending, matrix, matrix.diagonal(), rounded)
            round_columns(nearest, weight.clone(), old, matrix, expected, torch.arange(columns))
            if float((rounded != expected).float().mean()) > 0.2:  # a tie takes its row along
                raise SystemExit(f"wrong result: round_block {rows, columns, bits}")
            old = exact_rows(expected, columns)


BY_BITS = (layouts, gemms, gemvs, a16_gemms, rounded_blocks)
OTHERS = (rotations, fused_rotations, rotated_rows)


def main(names: list[str]) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("sanitizer_cases: needs a CUDA device")
    known = [case.__name__ for case in (*BY_BITS, *OTHERS)]
    if unknown := set(names) - set(known):
        raise SystemExit(f"sanitizer_cases: cases must be of {known}, got {sorted(unknown)}")
    runs = [(case, (bits,)) for bits in BITS for case in BY_BITS]
    runs += [(case, ()) for case in OTHERS]
    for case, arguments in runs:
        if case.__name__ in (names or known):
            print(case.__name__, *arguments, flush=True)
            case(*arguments)
            torch.cuda.synchronize()
    print("cases done")


if __name__ == "__main__":
    main(sys.argv[1:])

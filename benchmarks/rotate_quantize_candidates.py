"""Other launches and modes of the Triton kernels of the activation path: checked, then timed.

    python -m benchmarks.rotate_quantize_candidates [--form plain] [--block 128] [--shapes MxK ...]
    TRITON_INTERPRET=1 python -m benchmarks.rotate_quantize_candidates      check only, no GPU

Of the plain form none was ahead by more than runs differ (csrc/rotate/NOTES.md); those of the other
forms have not been timed: each says what it tries, not what it brings. What wins moves into
lrq_kernels; what does not goes, with its figures written down.

A candidate is a launch, "warps x values a thread" (see lrq_kernels/token_tiles.py), and a mode:

    plain        the kernel of lrq_kernels at this launch, of any form
    regs         the same, with registers capped so that 25 to 50 % more warps share an SM
    cg           x is loaded past L1, which cannot help a token that is read once
    hoist        persistent programs: channel_scale stays in registers over all their tokens
    hoist+pre    and the next token is loaded while this one is rotated
    pre          persistent, next token loaded ahead, channel_scale from L1 for each token: fewer
                 registers than hoist+pre

Modes other than plain and regs exist for the plain form, and hoist and hoist+pre for "norm" too:
there (1 + scale) * channel_scale and shift * channel_scale stay in registers. Persistent programs
are as many as registers let run at once. Each candidate must give the codes of reference.py before
it is timed; failures are printed and left out. No run asserts anything.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.bench_rotate_quantize import EPS, SHAPES, cast_only, parse_shape
from benchmarks.timing import Call, bench_us, graph_us, in_parallel, num_buffers
from lrq_kernels import reference
from lrq_kernels import rotate_quantize as rq
from lrq_kernels.rotate_quantize import RowLaunch
from lrq_kernels.token_tiles import (
    load_pieces,
    multiply,
    num_pieces,
    piece_place,
    rotate_and_store,
    to_float,
    token_square_sum,
    token_sum,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# As in tests/rotate_cases.py and tests/test_fused_rotate_quantize.py.
TIE_RATE, FUSED_TIE_RATE, SMALL_SAMPLE, SCALE_ERROR = 20e-6, 300e-6, 2, 2e-6
# More would spill: a thread has 255 registers at most.
MOST_VALUES = 128
FORMS = ("plain", "norm", "gelu", "concat")


@dataclass(frozen=True)
class Mode:
    persistent: bool = False
    hoisted: bool = False
    prefetched: bool = False
    cache_modifier: str = ""
    capped: bool = False

    @property
    def of_lrq_kernels(self) -> bool:
        """Whether it is the kernel of lrq_kernels, only launched otherwise."""
        return not self.persistent and not self.cache_modifier


MODES = {
    "plain": Mode(),
    "regs": Mode(capped=True),
    "cg": Mode(cache_modifier=".cg"),
    "hoist": Mode(persistent=True, hoisted=True),
    "hoist+pre": Mode(persistent=True, hoisted=True, prefetched=True),
    "pre": Mode(persistent=True, prefetched=True),
}


@dataclass(frozen=True)
class Candidate:
    in_features: int
    launch: RowLaunch
    mode: str
    block_size: int
    form: str = "plain"

    def __str__(self) -> str:
        return f"{self.launch.num_warps:2d} x {self.launch.values:3d} {self.mode}"


def candidates(in_features: int, block_size: int, form: str = "plain") -> list[Candidate]:
    """All that are tried at this K."""
    found = []
    for num_warps in (1, 2, 4, 8, 16):
        values = rq.values_a_thread(in_features, block_size, num_warps)
        if not 8 < values <= MOST_VALUES:
            continue
        for name, mode in MODES.items():
            # A second or a third vector of values needs registers.
            exact = 32 * num_warps * values == in_features  # else a mean would count the padding
            has_kernel = form == "plain" or (form == "norm" and mode.hoisted and exact)
            room = values <= (48 if form == "norm" else 72) or not mode.hoisted
            if mode.of_lrq_kernels or (has_kernel and room):
                # The values and 24 more, in eights.
                registers = -(-(values + 24) // 8) * 8 if mode.capped else None
                launch = RowLaunch(num_warps, values, registers)
                found.append(Candidate(in_features, launch, name, block_size, form))
    return found


# ---- kernel -------------------------------------------------------------------------------------


@triton.jit
def _load_pieces(
    row_ptr, live, K: tl.constexpr, N: tl.constexpr, VALUES: tl.constexpr, CACHE: tl.constexpr
):
    """load_pieces of a row that may lie past the last token: zeros unless live."""
    pieces = ()
    for piece in tl.static_range(num_pieces(VALUES)):
        k, mask = piece_place(piece, K, N, VALUES)
        loaded = tl.load(row_ptr + k, mask=mask & live, other=0, cache_modifier=CACHE)
        pieces = pieces + (loaded,)
    return pieces


@triton.jit
def candidate_kernel(
    x_ptr,  # [M, K] bf16, fp16 or fp32
    x_row_stride,
    channel_scale_ptr,  # [K] fp32
    out_ptr,  # [M, K] int8
    x_scale_ptr,  # [M] fp32
    step_factor,  # fp32
    tokens,  # M
    K: tl.constexpr,  # a multiple of 128
    N: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
    PERSISTENT: tl.constexpr,  # a program takes every num_programs-th token
    HOISTED: tl.constexpr,
    PREFETCHED: tl.constexpr,
    CACHE: tl.constexpr,
):
    """row_kernel for absmax at scale factor 1, without permutation, in one of MODES."""
    token = tl.program_id(0)
    if PERSISTENT:
        step = tl.num_programs(0)
        if HOISTED:
            scale_pieces = load_pieces(channel_scale_ptr, None, K, N, VALUES)
        if PREFETCHED:
            x_row = x_ptr + token.to(tl.int64) * x_row_stride
            pieces = _load_pieces(x_row, token < tokens, K, N, VALUES, CACHE)
        for index in tl.range(token, tokens, step, num_stages=1):
            t = index + token * 0  # a tensor in the interpreter too
            if not HOISTED:
                scale_pieces = load_pieces(channel_scale_ptr, None, K, N, VALUES)
            if not PREFETCHED:
                x_row = x_ptr + t.to(tl.int64) * x_row_stride
                pieces = _load_pieces(x_row, True, K, N, VALUES, CACHE)
            v = multiply(to_float(pieces), scale_pieces)
            if PREFETCHED:
                after = t + step
                x_row = x_ptr + after.to(tl.int64) * x_row_stride
                pieces = _load_pieces(x_row, after < tokens, K, N, VALUES, CACHE)
            out_row = out_ptr + t.to(tl.int64) * K
            rotate_and_store(
                v, out_row, x_scale_ptr + t, step_factor, K, N, BLOCK, 127, False, False
            )
    else:
        x_row = x_ptr + token.to(tl.int64) * x_row_stride
        v = to_float(_load_pieces(x_row, True, K, N, VALUES, CACHE))
        v = multiply(v, load_pieces(channel_scale_ptr, None, K, N, VALUES))
        out_row = out_ptr + token.to(tl.int64) * K
        rotate_and_store(
            v, out_row, x_scale_ptr + token, step_factor, K, N, BLOCK, 127, False, False
        )


@triton.jit
def norm_candidate_kernel(
    x_ptr,  # [M, K] bf16, fp16 or fp32
    x_row_stride,
    scale_ptr,  # [K] of the same type, so shift
    shift_ptr,
    channel_scale_ptr,  # [K] fp32
    out_ptr,  # [M, K] int8
    x_scale_ptr,  # [M] fp32
    eps,  # fp32
    step_factor,  # fp32
    tokens,  # M
    K: tl.constexpr,  # N * VALUES
    N: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
    PREFETCHED: tl.constexpr,
):
    """norm_kernel for LayerNorm of one sample, absmax at scale factor 1, vectors hoisted."""
    token = tl.program_id(0)
    step = tl.num_programs(0)
    smooth = load_pieces(channel_scale_ptr, None, K, N, VALUES)
    factors = _times_one_plus(smooth, load_pieces(scale_ptr, None, K, N, VALUES))
    terms = multiply(smooth, load_pieces(shift_ptr, None, K, N, VALUES))
    if PREFETCHED:
        x_row = x_ptr + token.to(tl.int64) * x_row_stride
        pieces = _load_pieces(x_row, token < tokens, K, N, VALUES, "")
    for index in tl.range(token, tokens, step, num_stages=1):
        t = index + token * 0  # a tensor in the interpreter too
        if not PREFETCHED:
            x_row = x_ptr + t.to(tl.int64) * x_row_stride
            pieces = _load_pieces(x_row, True, K, N, VALUES, "")
        v = to_float(pieces)
        if PREFETCHED:
            after = t + step
            x_row = x_ptr + after.to(tl.int64) * x_row_stride
            pieces = _load_pieces(x_row, after < tokens, K, N, VALUES, "")
        v = _minus(v, token_sum(v) / K)
        v = _modulated(v, tl.rsqrt(token_square_sum(v) / K + eps), factors, terms)
        out_row = out_ptr + t.to(tl.int64) * K
        rotate_and_store(v, out_row, x_scale_ptr + t, step_factor, K, N, BLOCK, 127, False, False)


@triton.jit
def _times_one_plus(v, w):
    out = ()
    for piece in tl.static_range(len(v)):
        out = out + (v[piece] * (1.0 + w[piece].to(tl.float32)),)
    return out


@triton.jit
def _minus(v, mean):
    out = ()
    for piece in tl.static_range(len(v)):
        out = out + (v[piece] - mean,)
    return out


@triton.jit
def _modulated(v, inverse_deviation, factors, terms):
    out = ()
    for piece in tl.static_range(len(v)):
        out = out + (tl.fma(v[piece] * inverse_deviation, factors[piece], terms[piece]),)
    return out


def kernel_constants(candidate: Candidate) -> dict[str, Any]:
    mode, launch = MODES[candidate.mode], candidate.launch
    return {
        "K": candidate.in_features,
        "N": 32 * launch.num_warps,
        "VALUES": launch.values,
        "BLOCK": candidate.block_size,
        "PERSISTENT": mode.persistent,
        "HOISTED": mode.hoisted,
        "PREFETCHED": mode.prefetched,
        "CACHE": mode.cache_modifier,
    }


@dataclass(frozen=True)
class Vectors:
    """Along K: channel_scale fp32 [K], scale and shift bf16 or fp32 [1, K]."""

    channel_scale: Tensor
    scale: Tensor
    shift: Tensor

    @staticmethod
    def draw(in_features: int, device: str, dtype: torch.dtype) -> Vectors:
        signs = torch.randint(0, 2, (in_features,), device=device) * 2 - 1
        modulation = torch.randn(2, 1, in_features, device=device).to(dtype)
        return Vectors((torch.rand(in_features, device=device) + 0.5) * signs, *modulation)

    def wide(self) -> Vectors:
        """As the float64 oracle takes them: bf16 beside float64 would be another type."""
        return Vectors(self.channel_scale, self.scale.float(), self.shift.float())

    def sources(self, x: Tensor, form: str) -> tuple:
        """The arguments of the op of a form that come before channel_scale."""
        if form == "norm":
            return x, None, None, self.scale, self.shift, "layer", EPS
        if form == "gelu":
            return x, None, "gelu_tanh"
        third = x.shape[1] // 5 // 8 * 8
        return (x[:, :third], x[:, third:]) if form == "concat" else (x,)


OPS = {
    "plain": "rotate_quantize",
    "norm": "norm_modulate_rotate_quantize",
    "gelu": "activation_rotate_quantize",
    "concat": "concat_rotate_quantize",
}


def _of_form(
    module: Any, form: str, block_size: int, x: Tensor, vectors: Vectors
) -> tuple[Tensor, Tensor]:
    """x_q and x_scale by rq or by reference."""
    arguments = (vectors.channel_scale, None, None, "hadamard", block_size, 8, "absmax", 1.0)
    keep = (False,) if form in ("norm", "gelu") else ()
    return getattr(module, OPS[form])(*vectors.sources(x, form), *arguments, *keep)[:2]


def launch_own(
    candidate: Candidate, x: Tensor, vectors: Vectors, out: tuple[Tensor, Tensor], programs: int
) -> Any:
    """Run a kernel of this file; Triton's handle of it."""
    constants = kernel_constants(candidate)
    if candidate.form == "norm":
        return norm_candidate_kernel[(programs,)](
            x,
            x.stride(0),
            vectors.scale,
            vectors.shift,
            vectors.channel_scale,
            *out,
            EPS,
            1 / 127,
            x.shape[0],
            **{name: constants[name] for name in ("K", "N", "VALUES", "BLOCK", "PREFETCHED")},
            num_warps=candidate.launch.num_warps,
        )
    return candidate_kernel[(programs,)](
        x,
        x.stride(0),
        vectors.channel_scale,
        *out,
        1 / 127,
        x.shape[0],
        **constants,
        num_warps=candidate.launch.num_warps,
    )


def run(candidate: Candidate, x: Tensor, vectors: Vectors, programs: int) -> tuple[Tensor, Tensor]:
    """x_q and x_scale; `programs` programs if persistent."""
    mode, tokens = MODES[candidate.mode], x.shape[0]
    if mode.of_lrq_kernels:
        usual, rq.row_launch = rq.row_launch, lambda *_: candidate.launch
        try:
            return _of_form(rq, candidate.form, candidate.block_size, x, vectors)
        finally:
            rq.row_launch = usual
    x_q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    x_scale = torch.empty(tokens, device=x.device)
    grid = min(tokens, programs) if mode.persistent else tokens
    launch_own(candidate, x, vectors, (x_q, x_scale), grid)
    return x_q, x_scale


# ---- check --------------------------------------------------------------------------------------


def check(candidate: Candidate) -> str | None:
    """What is wrong with its codes or scales, or None. The interpreter takes fp32 on the CPU."""
    device, dtype = ("cpu", torch.float32) if INTERPRETED else ("cuda", torch.bfloat16)
    # A multiple of 16 like the shapes timed, so that Triton compiles once; two rounds and more
    # for persistent programs.
    tokens, programs = (3, 2) if INTERPRETED else (672, 132)
    in_features, form = candidate.in_features, candidate.form
    try:
        x = torch.randn(tokens, in_features, device=device)
        x[:, :: in_features // 8] *= 20.0
        x[1] = 0.0
        x, vectors = x.to(dtype), Vectors.draw(in_features, device, dtype)
        x_q, x_scale = run(candidate, x, vectors, programs)
        wide_x = x.double()
        expected_q, expected_scale = _of_form(
            reference, form, candidate.block_size, wide_x, vectors.wide()
        )
    except Exception as error:  # the other candidates go on
        return f"{type(error).__name__}: {str(error)[:300]}"
    difference = (x_q.int() - expected_q.int()).abs()
    wrong, worst = int((difference > 0).sum()), int(difference.max())
    scale_error = (x_scale - expected_scale).abs() / expected_scale.clamp(min=1e-30)
    rate = TIE_RATE if form in ("plain", "concat") else FUSED_TIE_RATE
    right = worst <= 1 and wrong <= rate * x_q.numel() + SMALL_SAMPLE
    if right and bool((scale_error <= SCALE_ERROR).all()):
        return None
    columns = (difference > 1).any(0).nonzero().flatten()[:16].tolist()
    return (
        f"{wrong} of {x_q.numel()} codes differ, by up to {worst}; more than 1 in columns "
        f"{columns}; x_scale off by {float(scale_error.max()):.1e}"
    )


# ---- timing -------------------------------------------------------------------------------------


def programs_at_once(num_warps: int, registers: int) -> int:
    """Programs that the registers of one SM hold, of the 64 warps and 32 programs it takes."""
    registers_of_program = -(-registers // 8) * 8 * 32 * num_warps
    return max(1, min(65536 // registers_of_program, 64 // num_warps, 32))


def _time(calls: list[Call]) -> tuple[float, float]:
    calls[0]()
    bench = bench_us(calls[0])
    return bench, graph_us(calls, bench)


def _time_candidate(candidate: Candidate, xs: list[Tensor], vectors: Vectors) -> dict:
    programs = 0
    row: dict[str, Any] = {"registers": None, "spills": None, "programs_per_sm": None}
    if not MODES[candidate.mode].of_lrq_kernels:
        out = run(candidate, xs[0], vectors, 1)
        handle = launch_own(candidate, xs[0], vectors, out, 1)
        per_sm = programs_at_once(candidate.launch.num_warps, handle.n_regs)
        programs = per_sm * torch.cuda.get_device_properties(xs[0].device).multi_processor_count
        row |= {"registers": handle.n_regs, "spills": handle.n_spills, "programs_per_sm": per_sm}
    us, graph = _time([functools.partial(run, candidate, x, vectors, programs) for x in xs])
    return row | {"us": us, "graph_us": graph}


def time_shape(
    m: int, k: int, block_size: int, form: str, right: Iterable[Candidate]
) -> list[dict]:
    """Rows of the cast-only kernel, of lrq_kernels as it launches and of candidates, fastest first
    by the sum of both timers; printed."""
    xs = [
        torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        for _ in range(num_buffers(3 * m * k))
    ]
    vectors = Vectors.draw(k, "cuda", torch.bfloat16)
    committed = functools.partial(_of_form, rq, form, block_size, vectors=vectors)
    functions: dict[str, Callable] = {"cast": cast_only, "lrq_kernels": lambda x: committed(x=x)}
    _time([functools.partial(cast_only, x) for x in xs])  # clocks go up
    rows = []
    for name, function in functions.items():
        us, graph = _time([functools.partial(function, x) for x in xs])
        rows.append({"candidate": name, "us": us, "graph_us": graph})
    for candidate in right:
        try:
            times = _time_candidate(candidate, xs, vectors)
            rows.append({"candidate": str(candidate), **times})
        except Exception as error:  # too many registers to launch, say
            print(f"   {candidate}: {type(error).__name__}: {str(error)[:120]}", flush=True)
    rows[2:] = sorted(rows[2:], key=lambda row: row["us"] + row["graph_us"])
    print(f"\n{form} {m} x {k}: do_bench / graph us, ratios to cast", flush=True)
    for row in rows:
        row |= {"form": form, "m": m, "k": k, "block_size": block_size}
        print("   " + _line(row, rows[0]), flush=True)
    return rows


def _line(row: dict, cast: dict) -> str:
    text = f"{row['us']:7.1f} /{row['graph_us']:7.1f}  "
    text += f"{row['us'] / cast['us']:5.2f} /{row['graph_us'] / cast['graph_us']:5.2f}  "
    text += f"{row['candidate']:24}"
    if row.get("registers"):
        text += f" {row['registers']} registers, {row['programs_per_sm']} an SM"
        text += f", {row['spills']} spills" if row["spills"] else ""
    return text.rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--form", choices=FORMS, default="plain")
    parser.add_argument("--block", type=int, choices=(128, 256, 512, 1024), default=128)
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=SHAPES, metavar="MxK")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    start = time.perf_counter()
    form, block = arguments.form, arguments.block
    shapes = [(m, k) for m, k in arguments.shapes if k % block == 0]
    widths = dict.fromkeys(k for _, k in shapes)
    jobs = [candidate for k in widths for candidate in candidates(k, block, form)]
    # Each is compiled where it is checked; the process that times finds it in Triton's cache.
    failures = [check(job) for job in jobs] if INTERPRETED else in_parallel(check, jobs)
    right = [job for job, failure in zip(jobs, failures, strict=True) if failure is None]
    for job, failure in zip(jobs, failures, strict=True):
        if failure is not None:
            print(f"WRONG K {job.in_features} {job}: {failure}")
    seconds = time.perf_counter() - start
    print(f"{len(right)} of {len(jobs)} candidates right, {seconds:.0f} s", flush=True)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing timed")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    rows = []
    for m, k in shapes:
        of_width = [candidate for candidate in right if candidate.in_features == k]
        rows.append(time_shape(m, k, block, form, of_width))
        torch.cuda.empty_cache()
    if arguments.json:
        arguments.json.write_text(
            json.dumps([row for part in rows for row in part], indent=1) + "\n"
        )
    print("\nbest of each shape (cast, lrq_kernels, best)")
    for part in rows:
        for row in part[:3]:
            print(f"{row['m']:5d} x {row['k']:<5d} " + _line(row, part[0]))
    print(f"total {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

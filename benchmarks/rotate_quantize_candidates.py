"""Other forms of the Triton kernel behind lrq::rotate_quantize: checked, then timed.

    python -m benchmarks.rotate_quantize_candidates [--block 128] [--shapes 4608x3072 ...]
    TRITON_INTERPRET=1 python -m benchmarks.rotate_quantize_candidates      check only, no GPU

None of these has been measured on a GPU yet: each says what it tries, not what it brings. What wins
moves into lrq_kernels/rotate_quantize.py; what does not goes, with its figures written down.

A candidate is a launch, "warps x elements x chunks" (how a token lies in registers, see "A token in
registers" there; more chunks pad less, fewer warps reduce faster), and a mode:

    plain        the kernel of lrq_kernels at another launch: one token a program
    cg           x is loaded past L1, which cannot help a token that is read once
    exch         two lane butterflies become exchanges of half the values each: half the shuffles;
                 a lane ends with 32 neighbours, so codes leave in stores of 16 bytes, not 8
    hoist        persistent programs: channel_scale stays in registers over all their tokens
    hoist+pre    and the next token is loaded while this one is rotated
    hoist+exch   hoist and exch
    pre          persistent, next token loaded ahead, channel_scale from L1 for each token: fewer
                 registers than hoist+pre
    pre+exch     pre and exch

Persistent programs are as many as registers let run at once. Each candidate must give the codes of
reference.py before it is timed; failures are printed and left out. No run asserts anything.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.bench_rotate_quantize import SHAPES, cast_only, parse_shape
from benchmarks.timing import Call, bench_us, graph_us, in_parallel, num_buffers
from lrq_kernels import reference
from lrq_kernels import rotate_quantize as rq
from lrq_kernels.rotate_quantize import RowLaunch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# As in tests/test_rotate_quantize.py.
TIE_RATE, SMALL_SAMPLE, SCALE_ERROR = 20e-6, 2, 1e-6


@dataclass(frozen=True)
class Mode:
    persistent: bool = False
    hoisted: bool = False
    prefetched: bool = False
    cache_modifier: str = ""
    exchange: bool = False


MODES = {
    "plain": Mode(),
    "cg": Mode(cache_modifier=".cg"),
    "exch": Mode(exchange=True),
    "hoist": Mode(persistent=True, hoisted=True),
    "hoist+pre": Mode(persistent=True, hoisted=True, prefetched=True),
    "hoist+exch": Mode(persistent=True, hoisted=True, exchange=True),
    "pre": Mode(persistent=True, prefetched=True),
    "pre+exch": Mode(persistent=True, prefetched=True, exchange=True),
}
# Several chunks need registers for 64 to 96 values a thread: no room for a second vector.
MODES_OF_CHUNKS = ("plain", "exch", "pre")

# in_features -> (warps, elements, chunks)
LAUNCHES = {
    1152: ((2, 64, 1), (1, 64, 1), (1, 32, 2)),
    3072: ((4, 128, 1), (2, 128, 1), (2, 64, 2), (1, 32, 3)),
    4608: ((8, 256, 1), (4, 256, 1), (4, 128, 2), (2, 64, 3)),
    12288: ((16, 512, 1), (8, 512, 1), (8, 256, 2), (4, 128, 3)),
    15360: ((16, 512, 1), (8, 512, 1), (8, 256, 2)),
}


@dataclass(frozen=True)
class Candidate:
    in_features: int
    launch: RowLaunch
    mode: str
    block_size: int

    def __str__(self) -> str:
        launch = self.launch
        return f"{launch.num_warps:2d} x {launch.elements:3d} x {launch.chunks} {self.mode}"


def candidates(in_features: int, block_size: int) -> list[Candidate]:
    """All that are tried at this K."""
    found = []
    for num_warps, elements, chunks in LAUNCHES.get(in_features, ()):
        launch = RowLaunch(elements, chunks, num_warps)
        for mode in MODES if chunks == 1 else MODES_OF_CHUNKS:
            found.append(Candidate(in_features, launch, mode, block_size))
    return found


# ---- kernel -------------------------------------------------------------------------------------


@triton.jit
def _load_pieces(
    row_ptr, live, K: tl.constexpr, N: tl.constexpr, CHUNKS: tl.constexpr, CACHE: tl.constexpr
):
    """rq._load_pieces of a row that may lie past the last token: zeros unless live."""
    pieces = ()
    for group in tl.static_range(4 * CHUNKS):
        k, mask = rq._piece(group, N, K)
        piece = tl.load(row_ptr + k, mask=mask & live, other=0, cache_modifier=CACHE)
        pieces = pieces + (piece,)
    return pieces


@triton.jit
def _scaled(pieces, scale_pieces, CHUNKS: tl.constexpr):
    """Pieces of x times pieces of channel_scale, as a token of fp32."""
    v = ()
    for group in tl.static_range(4 * CHUNKS):
        columns = rq._columns(pieces[group].to(tl.float32))
        scales = rq._columns(scale_pieces[group])
        for c in tl.static_range(8):
            v = v + (columns[c] * scales[c],)
    return v


@triton.jit
def _exchange(v, STRIDE: tl.constexpr, LANE: tl.constexpr):
    """Butterflies over lane bit LANE, which trades places with tuple bit STRIDE.

                  lane bit 0   lane bit 1                lane bit 0   lane bit 1
    tuple bit 0       a            A           ->           a + A        b + B
    tuple bit 1       b            B                        a - A      -(b - B)

    A lane sends one of two values where _between_lanes sends both. The sign is left to whoever
    reads the values: see _factors.
    """
    N: tl.constexpr = v[0].shape[0]
    lane = tl.broadcast_to(tl.arange(0, 32)[None, :], (N // 32, 32))
    upper = (lane & LANE) != 0
    sums = ()
    differences = ()
    for i in tl.static_range(len(v)):
        if (i & STRIDE) == 0:
            a = tl.reshape(v[i], (N // 32, 32))
            b = tl.reshape(v[i + STRIDE], (N // 32, 32))
            received = tl.gather(tl.where(upper, a, b), lane ^ LANE, 1)
            kept = tl.where(upper, b, a)
            sums = sums + (tl.reshape(kept + received, (N,)),)
            differences = differences + (tl.reshape(kept - received, (N,)),)
    out = ()
    for i in tl.static_range(len(v)):
        # The how-manieth i is of those that have bit STRIDE like itself.
        if (i & STRIDE) == 0:
            out = out + (sums[i // (2 * STRIDE) * STRIDE + i % STRIDE],)
        else:
            out = out + (differences[i // (2 * STRIDE) * STRIDE + i % STRIDE],)
    return out


@triton.jit
def _rotated(v, BLOCK: tl.constexpr, EXCHANGE: tl.constexpr):
    """rq._block_hadamard; with EXCHANGE, BLOCK >= 128 and the two lowest lane bits, which select
    8 neighbours out of 32, have changed places with the quarter."""
    if EXCHANGE:
        v = rq._between_tiles(rq._between_tiles(rq._between_tiles(v, 1), 2), 4)
        v = rq._between_tiles(rq._between_tiles(v, 8), 16)
        v = _exchange(_exchange(v, 8, 1), 16, 2)
        if BLOCK >= 256:
            v = rq._between_lanes(v, 4)
        if BLOCK >= 512:
            v = rq._between_lanes(v, 8)
        if BLOCK >= 1024:
            v = rq._between_lanes(v, 16)
        return v
    else:
        return rq._block_hadamard(v, BLOCK)


@triton.jit
def _factors(factor, N: tl.constexpr):
    """`factor` with the signs that _exchange left, for each value of its tuple bits 8 and 16."""
    n = tl.arange(0, N)
    plus = factor + tl.zeros((N,), tl.float32)
    first = tl.where((n & 1) == 0, plus, -plus)
    return plus, first, tl.where((n & 2) == 0, plus, -plus), tl.where((n & 2) == 0, first, -first)


@triton.jit
def _codes(v, START: tl.constexpr, factor):
    """Eight tiles of v from START on -> codes [N, 8]."""
    columns = ()
    for c in tl.static_range(8):
        code = tl.fma(v[START + c], factor, rq._MAGIC)
        columns = columns + (code.to(tl.int32, bitcast=True).to(tl.int8),)
    return rq._to_piece(columns)


@triton.jit
def _store_token(
    v,
    out_row,
    x_scale_ptr,
    step_factor,
    K: tl.constexpr,
    N: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    EXCHANGE: tl.constexpr,
):
    """Step and codes of a token, as at the end of rq._row_kernel (absmax, no clamp)."""
    NORM: tl.constexpr = BLOCK**-0.5
    x_scale = rq._token_size(v, K, False) * NORM * step_factor
    tl.store(x_scale_ptr, x_scale)
    inverse = tl.div_rn(1.0, x_scale)
    if (inverse > 0) & (inverse < float("inf")):
        if EXCHANGE:
            n = tl.arange(0, N)[:, None]
            factors = _factors(inverse * NORM, N)
            for half in tl.static_range(2 * CHUNKS):
                # What was the quarter is now which 8 of a lane's 32 neighbours.
                left = _codes(v, 16 * half, factors[half % 2 * 2])
                right = _codes(v, 16 * half + 8, factors[half % 2 * 2 + 1])
                both = tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (N, 16))
                first = (half // 2) * 32 * N + n * 32 + (half % 2) * 16
                tl.store(out_row + first + tl.arange(0, 16)[None, :], both, mask=first < K)
        else:
            for group in tl.static_range(4 * CHUNKS):
                k, mask = rq._piece(group, N, K)
                tl.store(out_row + k, _codes(v, 8 * group, inverse * NORM), mask=mask)
    else:
        for group in tl.static_range(4 * CHUNKS):
            k, mask = rq._piece(group, N, K)
            tl.store(out_row + k, tl.zeros((N, 8), tl.int8), mask=mask)


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
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PERSISTENT: tl.constexpr,  # a program takes every num_programs-th token
    HOISTED: tl.constexpr,
    PREFETCHED: tl.constexpr,
    CACHE: tl.constexpr,
    EXCHANGE: tl.constexpr,
):
    """rq._row_kernel for absmax, without permutation, in one of MODES."""
    token = tl.program_id(0)
    if PERSISTENT:
        step = tl.num_programs(0)
        if HOISTED:
            scale_pieces = _load_pieces(channel_scale_ptr, True, K, N, CHUNKS, "")
        if PREFETCHED:
            x_row = x_ptr + token.to(tl.int64) * x_row_stride
            pieces = _load_pieces(x_row, token < tokens, K, N, CHUNKS, CACHE)
        for index in tl.range(token, tokens, step, num_stages=1):
            t = index + token * 0  # a tensor in the interpreter too
            if not HOISTED:
                scale_pieces = _load_pieces(channel_scale_ptr, True, K, N, CHUNKS, "")
            if not PREFETCHED:
                x_row = x_ptr + t.to(tl.int64) * x_row_stride
                pieces = _load_pieces(x_row, True, K, N, CHUNKS, CACHE)
            v = _scaled(pieces, scale_pieces, CHUNKS)
            if PREFETCHED:
                after = t + step
                x_row = x_ptr + after.to(tl.int64) * x_row_stride
                pieces = _load_pieces(x_row, after < tokens, K, N, CHUNKS, CACHE)
            v = _rotated(v, BLOCK, EXCHANGE)
            out_row = out_ptr + t.to(tl.int64) * K
            _store_token(v, out_row, x_scale_ptr + t, step_factor, K, N, CHUNKS, BLOCK, EXCHANGE)
    else:
        x_row = x_ptr + token.to(tl.int64) * x_row_stride
        pieces = _load_pieces(x_row, True, K, N, CHUNKS, CACHE)
        scale_pieces = _load_pieces(channel_scale_ptr, True, K, N, CHUNKS, "")
        v = _rotated(_scaled(pieces, scale_pieces, CHUNKS), BLOCK, EXCHANGE)
        out_row = out_ptr + token.to(tl.int64) * K
        _store_token(v, out_row, x_scale_ptr + token, step_factor, K, N, CHUNKS, BLOCK, EXCHANGE)


def kernel_constants(candidate: Candidate) -> dict[str, Any]:
    mode, launch = MODES[candidate.mode], candidate.launch
    return {
        "K": candidate.in_features,
        "N": launch.elements,
        "CHUNKS": launch.chunks,
        "BLOCK": candidate.block_size,
        "PERSISTENT": mode.persistent,
        "HOISTED": mode.hoisted,
        "PREFETCHED": mode.prefetched,
        "CACHE": mode.cache_modifier,
        "EXCHANGE": mode.exchange,
    }


def run(
    candidate: Candidate,
    x: Tensor,
    channel_scale: Tensor,
    out: tuple[Tensor, Tensor],
    programs: int,
) -> Any:
    """Write x_q and x_scale to `out`, with `programs` programs if persistent; Triton's handle."""
    tokens = x.shape[0]
    grid = min(tokens, programs) if MODES[candidate.mode].persistent else tokens
    return candidate_kernel[(grid,)](
        x,
        x.stride(0),
        channel_scale,
        *out,
        1 / 127,
        tokens,
        **kernel_constants(candidate),
        num_warps=candidate.launch.num_warps,
    )


# ---- check --------------------------------------------------------------------------------------


def check(candidate: Candidate) -> str | None:
    """What is wrong with its codes or scales, or None. The interpreter takes fp32 on the CPU."""
    device, dtype = ("cpu", torch.float32) if INTERPRETED else ("cuda", torch.bfloat16)
    # A multiple of 16 like the shapes timed, so that Triton compiles once; two rounds and more
    # for persistent programs.
    tokens, programs = (3, 2) if INTERPRETED else (672, 132)
    in_features, block_size = candidate.in_features, candidate.block_size
    try:
        x = torch.randn(tokens, in_features, device=device)
        x[:, :: in_features // 8] *= 20.0
        x[1] = 0.0
        x = x.to(dtype)
        signs = torch.randint(0, 2, (in_features,), device=device) * 2 - 1
        channel_scale = (torch.rand(in_features, device=device) + 0.5) * signs
        x_q = torch.full(x.shape, 99, dtype=torch.int8, device=device)
        x_scale = torch.full((tokens,), float("nan"), device=device)
        run(candidate, x, channel_scale, (x_q, x_scale), programs)
        expected_q, expected_scale = reference.rotate_quantize(
            x.double(), channel_scale, None, None, "hadamard", block_size, 8, "absmax", 1.0
        )
    except Exception as error:  # the other candidates go on
        return f"{type(error).__name__}: {str(error)[:300]}"
    difference = (x_q.int() - expected_q.int()).abs()
    wrong, worst = int((difference > 0).sum()), int(difference.max())
    scale_error = (x_scale - expected_scale).abs() / expected_scale.clamp(min=1e-30)
    budget = TIE_RATE * x_q.numel() + SMALL_SAMPLE
    if worst <= 1 and wrong <= budget and bool((scale_error <= SCALE_ERROR).all()):
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


def _time_candidate(candidate: Candidate, xs: list[Tensor], channel_scale: Tensor) -> dict:
    def outputs(x: Tensor) -> tuple[Tensor, Tensor]:
        x_scale = torch.empty(x.shape[0], device=x.device)
        return torch.empty(x.shape, dtype=torch.int8, device=x.device), x_scale

    handle = run(candidate, xs[0], channel_scale, outputs(xs[0]), 1)
    per_sm = programs_at_once(candidate.launch.num_warps, handle.n_regs)
    programs = per_sm * torch.cuda.get_device_properties(xs[0].device).multi_processor_count

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        out = outputs(x)
        run(candidate, x, channel_scale, out, programs)
        return out

    us, graph = _time([functools.partial(call, x) for x in xs])
    row = {"us": us, "graph_us": graph, "registers": handle.n_regs, "spills": handle.n_spills}
    return row | {"programs_per_sm": per_sm if MODES[candidate.mode].persistent else None}


def time_shape(m: int, k: int, block_size: int, right: Iterable[Candidate]) -> list[dict]:
    """Rows of the cast-only kernel, of the kernel of lrq_kernels and of candidates, fastest first
    by the sum of both timers; printed."""
    xs = [
        torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        for _ in range(num_buffers(3 * m * k))
    ]
    channel_scale = torch.rand(k, device="cuda") + 0.5

    def committed(x: Tensor) -> tuple[Tensor, Tensor]:
        arguments = ("hadamard", block_size, 8, "absmax", 1.0)
        return rq.rotate_quantize(x, channel_scale, None, None, *arguments)

    _time([functools.partial(cast_only, x) for x in xs])  # clocks go up
    rows = []
    for name, function in (("cast", cast_only), ("lrq_kernels", committed)):
        us, graph = _time([functools.partial(function, x) for x in xs])
        rows.append({"candidate": name, "us": us, "graph_us": graph})
    for candidate in right:
        try:
            times = _time_candidate(candidate, xs, channel_scale)
            rows.append({"candidate": str(candidate), **times})
        except Exception as error:  # too many registers to launch, say
            print(f"   {candidate}: {type(error).__name__}: {str(error)[:120]}", flush=True)
    rows[2:] = sorted(rows[2:], key=lambda row: row["us"] + row["graph_us"])
    print(f"\n{m} x {k}: do_bench / graph us, ratios to cast", flush=True)
    for row in rows:
        row |= {"m": m, "k": k, "block_size": block_size}
        print("   " + _line(row, rows[0]), flush=True)
    return rows


def _line(row: dict, cast: dict) -> str:
    text = f"{row['us']:7.1f} /{row['graph_us']:7.1f}  "
    text += f"{row['us'] / cast['us']:5.2f} /{row['graph_us'] / cast['graph_us']:5.2f}  "
    text += f"{row['candidate']:24}"
    if "registers" in row:
        text += f" {row['registers']} registers"
        text += f", {row['spills']} spills" if row["spills"] else ""
        text += f", {row['programs_per_sm']} an SM" if row["programs_per_sm"] else ""
    return text.rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--block", type=int, choices=(128, 256, 512, 1024), default=128)
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=SHAPES, metavar="MxK")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    start = time.perf_counter()
    shapes = [(m, k) for m, k in arguments.shapes if k % arguments.block == 0]
    widths = dict.fromkeys(k for _, k in shapes)
    jobs = [candidate for k in widths for candidate in candidates(k, arguments.block)]
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
        rows.append(time_shape(m, k, arguments.block, of_width))
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

"""lrq::qk_norm_rope against a copy of the same bytes, and against what it replaces.

    python -m benchmarks.bench_qk_norm_rope                       every problem
    python -m benchmarks.bench_qk_norm_rope --problems flux-joint flux-single
    python -m benchmarks.bench_qk_norm_rope --launches 8x8 16x8 8x4    heads x warps of a program
    python -m benchmarks.bench_qk_norm_rope --json rows.json

A row: problem, impl, us (do_bench), graph_us (CUDA graph over rotating buffers), copy_us and
copy_graph_us (the same of the copy), ratio = graph_us / copy_graph_us, tb_s (bytes that must move
/ graph_us). A figure that could not be had is null, and the reason is printed.

impl  copy      torch's clone of as many bytes as q and k (with a context v too): the yardstick
      triton    the op, with the launch that it selects
      GxW       the kernel, G heads a program in W warps (--launches)
      eager     the chain of diffusers' processors: norms, concatenations, rotation
      compile   torch.compile of that chain
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rows import Row, measure_problems
from benchmarks.timing import bench_us, graph_us, num_buffers

Streams = tuple[Tensor | None, ...]  # q, k, v and those of the context
Launch = tuple[int, int]

EPS = 1e-6


@dataclass(frozen=True)
class Problem:
    """One attention of a model, batch 1: tokens behind context_tokens (0: one stream, no v)."""

    tokens: int
    context_tokens: int
    heads: int
    head_dim: int
    norm: str = "rms"
    rope: bool = True

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def joint_tokens(self) -> int:
        return self.tokens + self.context_tokens

    @property
    def num_outputs(self) -> int:
        return 3 if self.context_tokens else 2

    @property
    def bytes_moved(self) -> int:
        """q and k, and v with a context, read and written; cos and sin, read."""
        angles = 8 * self.joint_tokens * self.head_dim if self.rope else 0
        return 4 * self.num_outputs * self.joint_tokens * self.channels + angles


# 1024 x 1024 pixels; Wan: 81 frames of 832 x 480.
PROBLEMS = {
    "flux-joint": Problem(4096, 512, 24, 128),
    "flux-single": Problem(4608, 0, 24, 128),
    "flux2-joint": Problem(4096, 512, 48, 128),
    "qwen-image": Problem(4096, 256, 24, 128, "rms_rounded"),
    "sd35-large": Problem(4096, 333, 38, 64, "rms_rounded", rope=False),
    "wan-14b": Problem(32760, 0, 40, 128, "rms_across_heads"),
    "flux-small": Problem(256, 512, 24, 128),
}


@dataclass(frozen=True)
class Parameters:
    """Weights bf16 [D], or [H*D] for a norm across heads; cos, sin fp32 [T, D]."""

    weights: tuple[Tensor, ...]
    cos: Tensor | None
    sin: Tensor | None

    @staticmethod
    def draw(problem: Problem, device: str = "cuda") -> Parameters:
        across = problem.norm == "rms_across_heads"
        size = problem.channels if across else problem.head_dim
        weights = tuple((torch.rand(size, device=device) + 0.5).bfloat16() for _ in range(4))
        if not problem.rope:
            return Parameters(weights, None, None)
        angles = torch.rand(problem.joint_tokens, problem.head_dim // 2, device=device) * 6.3
        angles = angles.repeat_interleave(2, dim=-1)
        return Parameters(weights, angles.cos(), angles.sin())


def draw_streams(problem: Problem, device: str = "cuda") -> Streams:
    """Parts of one fused projection for each stream."""
    streams: list[Tensor | None] = []
    for tokens in (problem.tokens, problem.context_tokens):
        shape = (1, tokens, 3 * problem.channels)
        fused = torch.randn(shape, device=device, dtype=torch.bfloat16)
        streams += fused.chunk(3, dim=-1) if tokens else (None, None, None)
    return tuple(streams)


# ---- what is timed ------------------------------------------------------------------------------


def _rms_norm(x: Tensor, weight: Tensor, heads: int, norm: str) -> Tensor:
    """[B, S, H*D] -> [B, S, H, D], as the model's processor writes it."""
    if norm == "rms_across_heads":
        return F.rms_norm(x, x.shape[-1:], weight, EPS).unflatten(-1, (heads, -1))
    x = x.unflatten(-1, (heads, -1))
    if norm == "rms":
        return F.rms_norm(x, x.shape[-1:], weight, EPS)
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + EPS)).to(weight.dtype) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cos[:, None] + turned.float() * sin[:, None]).to(x.dtype)


def chain(streams: Streams, p: Parameters, problem: Problem) -> list[Tensor]:
    """What diffusers' processors do between the projections and attention."""
    heads, norm = problem.heads, problem.norm
    parts: list[list[Tensor]] = [[], [], []]
    for first in (3, 0):  # the context comes first
        q, k, v = streams[first : first + 3]
        if q is None or k is None or v is None:
            continue
        weights = p.weights[2:] if first else p.weights[:2]
        parts[0].append(_rms_norm(q, weights[0], heads, norm))
        parts[1].append(_rms_norm(k, weights[1], heads, norm))
        parts[2].append(v.unflatten(-1, (heads, -1)))
    out = [torch.cat(part, dim=1) if len(part) > 1 else part[0] for part in parts]
    if p.cos is not None and p.sin is not None:
        out[:2] = (_rotate(x, p.cos, p.sin) for x in out[:2])
    return out


def op_arguments(streams: Streams, p: Parameters, problem: Problem) -> tuple[Any, ...]:
    """The arguments of the op: without a context the caller keeps v."""
    q, k, v, *context = streams
    joint = problem.context_tokens > 0
    weights = p.weights if joint else (*p.weights[:2], None, None)
    numbers = (problem.heads, EPS, problem.norm, "interleaved")
    return (q, k, v if joint else None, *context, *weights, p.cos, p.sin, *numbers)


def make_function(impl: str | Launch, p: Parameters, problem: Problem) -> Callable[[Streams], Any]:
    """An implementation, of `draw_streams`; outputs are new tensors."""
    if impl == "triton":
        from lrq_kernels import ops

        return lambda streams: ops.qk_norm_rope(*op_arguments(streams, p, problem))
    if isinstance(impl, tuple):
        from lrq_kernels import qk_norm_rope as kernels

        launch = kernels.Launch(*impl)
        return lambda streams: kernels.qk_norm_rope(*op_arguments(streams, p, problem), launch)
    eager = functools.partial(chain, p=p, problem=problem)
    return eager if impl == "eager" else torch.compile(eager, dynamic=False)


def copied(problem: Problem, device: str = "cuda") -> Tensor:
    """As many bytes as the op must read; a clone of them writes as many."""
    size = problem.num_outputs * problem.joint_tokens * problem.channels
    return torch.zeros(size, dtype=torch.bfloat16, device=device)


# ---- measuring ----------------------------------------------------------------------------------


def _name(impl: str | Launch) -> str:
    return impl if isinstance(impl, str) else f"{impl[0]}x{impl[1]}"


def _measure(name: str, impl: str, calls: list[Callable[[], Any]]) -> Row:
    row: Row = {"problem": name, "impl": impl, "us": None, "graph_us": None}
    try:
        calls[0]()  # compiles
        row["us"] = bench_us(calls[0])
        row["graph_us"] = graph_us(calls, row["us"])
    except Exception as error:  # one implementation must not cost the figures of the others
        print(f"{name} {impl}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    return row


def time_problem(name: str, launches: list[Launch]) -> list[Row]:
    """Rows of one problem; "copy" first."""
    problem = PROBLEMS[name]
    # Without this torch.compile falls back to eager when it has seen too many shapes.
    torch.compiler.reset()
    p = Parameters.draw(problem)
    buffers = num_buffers(problem.bytes_moved // 2)
    sources = [copied(problem) for _ in range(buffers)]
    copies = [functools.partial(torch.clone, source) for source in sources]
    copy = _measure(name, "copy", copies)
    streams = [draw_streams(problem) for _ in range(buffers)]
    rows = [copy]
    for impl in ("triton", *launches, "eager", "compile"):
        function = make_function(impl, p, problem)
        rows.append(_measure(name, _name(impl), [functools.partial(function, x) for x in streams]))
    # Again: clocks that were still low at first would flatter everything measured after it.
    again = _measure(name, "copy", copies)
    for key in ("us", "graph_us"):
        copy[key] = min((row[key] for row in (copy, again) if row[key] is not None), default=None)
    for row in rows:
        row["copy_us"], row["copy_graph_us"] = copy["us"], copy["graph_us"]
        graph, of_copy = row["graph_us"], copy["graph_us"]
        row["ratio"] = graph / of_copy if graph and of_copy else None
        row["tb_s"] = problem.bytes_moved / graph * 1e-6 if graph else None
    return rows


def table(rows: list[Row]) -> str:
    """A line for each row."""

    def figure(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    lines = [f"{'problem':14}{'impl':10}{'us':>9}{'graph us':>10}{'/ copy':>8}{'TB/s':>7}"]
    for row in rows:
        line = f"{row['problem']:14}{row['impl']:10}{figure(row['us'], 1):>9}"
        line += f"{figure(row['graph_us'], 1):>10}{figure(row['ratio'], 2):>8}"
        lines.append(line + f"{figure(row['tb_s'], 2):>7}")
    return "\n".join(lines)


def parse_launch(text: str) -> Launch:
    group, _, warps = text.partition("x")
    powers = [value.isdigit() and int(value).bit_count() == 1 for value in (group, warps)]
    if not all(powers) or int(warps) > 32:
        expected = "expected HEADSxWARPS, powers of two, at most 32 warps"
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
    return int(group), int(warps)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--launches", nargs="+", type=parse_launch, default=[], metavar="GxW")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    measure = functools.partial(time_problem, launches=arguments.launches)
    rows = measure_problems(arguments.problems, measure, arguments.json)
    print(table(rows))


if __name__ == "__main__":
    main()

"""Attention of diffusion transformers by every backend that runs here: which one to set.

    python -m benchmarks.bench_attention                              every problem
    python -m benchmarks.bench_attention --problems pixart-self --pad 80 96 128
    python -m benchmarks.bench_attention --json rows.json

A row: problem, backend, pad (width that heads are padded to with zeros, which changes nothing in
the result; the padding itself is not timed, since the projection can write it), us, tflops (of the
unpadded product), error (relative, against float64, on a few queries of one head). A backend that
does not take a problem has us null, and the reason is printed.

backend  default       torch's own choice
         cudnn, flash, efficient                       torch's kernels, each alone
         flash_attn    FlashAttention-2 of the package flash_attn
         flash_attn_3  of flash_attn_interface
         sage          int8 products by the package sageattention

`transformer.set_attention_backend(name)` of diffusers sets one: native, _native_cudnn,
_native_flash, _native_efficient, flash, _flash_3, sage.
"""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.rows import Row, measure_problems
from benchmarks.timing import bench_us

Attention = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]

_CHECKED_QUERIES = 64


@dataclass(frozen=True)
class Problem:
    """q [batch, tokens, heads, head_dim], k and v [batch, keys, ...]; mask: added, [B, 1, 1, S]."""

    batch: int
    tokens: int
    keys: int
    heads: int
    head_dim: int
    mask: bool = False

    @property
    def flops(self) -> int:
        return 4 * self.batch * self.heads * self.tokens * self.keys * self.head_dim


# 1024 x 1024 pixels; PixArt with guidance; Wan: 81 frames of 832 x 480.
PROBLEMS = {
    "flux": Problem(1, 4608, 4608, 24, 128),
    "flux-batch4": Problem(4, 4608, 4608, 24, 128),
    "pixart-self": Problem(2, 4096, 4096, 16, 72),
    "pixart-cross": Problem(2, 4096, 300, 16, 72, mask=True),
    "sd35-large": Problem(2, 4429, 4429, 38, 64),
    "wan-14b": Problem(1, 32760, 32760, 40, 128),
}


def _torch_kernel(*backends: SDPBackend) -> Attention:
    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = None if mask is None else mask.expand(-1, q.shape[1], q.shape[2], -1)
        if not backends:
            return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
        with sdpa_kernel(list(backends)):
            return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    return call


def _package(module: str, function: str, **options: Any) -> Attention:
    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            raise ValueError("takes no mask")
        out = getattr(importlib.import_module(module), function)(q, k, v, **options)
        return out[0] if isinstance(out, tuple) else out

    return call


BACKENDS: dict[str, Attention] = {
    "default": _torch_kernel(),
    "cudnn": _torch_kernel(SDPBackend.CUDNN_ATTENTION),
    "flash": _torch_kernel(SDPBackend.FLASH_ATTENTION),
    "efficient": _torch_kernel(SDPBackend.EFFICIENT_ATTENTION),
    "flash_attn": _package("flash_attn", "flash_attn_func"),
    "flash_attn_3": _package("flash_attn_interface", "flash_attn_func"),
    "sage": _package("sageattention", "sageattn", tensor_layout="NHD"),
}


def draw(problem: Problem, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q and k as a norm of queries and keys leaves them: of unit variance."""

    def values(tokens: int) -> Tensor:
        shape = (problem.batch, tokens, problem.heads, problem.head_dim)
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    mask = None
    if problem.mask:  # captions of several lengths
        lengths = torch.randint(1, problem.keys + 1, (problem.batch, 1, 1, 1), device=device)
        padded = torch.arange(problem.keys, device=device) >= lengths
        mask = padded.to(torch.bfloat16) * -10000.0
    return values(problem.tokens), values(problem.keys), values(problem.keys), mask


def padded_call(attention: Attention, head_dim: int, pad: int) -> Attention:
    """`attention` of heads that are `pad` wide, of which `head_dim` hold values."""

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attention(q, k, v, mask)[..., :head_dim]

    return attention if pad == head_dim else call


def pad_heads(q: Tensor, k: Tensor, v: Tensor, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """With zeros. Attention then divides by sqrt(pad) where it should by sqrt(width): q makes up
    for it."""
    width = q.shape[-1]
    if pad == width:
        return q, k, v
    q = (q.float() * (pad / width) ** 0.5).to(q.dtype)
    return tuple(F.pad(x, (0, pad - width)) for x in (q, k, v))  # type: ignore[return-value]


def relative_error(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, head_dim: int
) -> float:
    """Of the first queries of the first head of the last sample, against float64."""
    last = [x[-1, :, 0].double() for x in (q[:, :_CHECKED_QUERIES], k, v)]
    scores = last[0] @ last[1].T / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask[-1, 0].double()
    expected = (scores.softmax(dim=-1) @ last[2])[:, :head_dim]
    got = out[-1, :_CHECKED_QUERIES, 0].double()
    return float((got - expected).norm() / expected.norm())


def time_problem(name: str, pads: list[int]) -> list[Row]:
    """Rows of one problem: each backend at the width of the heads and at those of `pads` above."""
    problem = PROBLEMS[name]
    q, k, v, mask = draw(problem)
    rows: list[Row] = []
    for pad in [problem.head_dim, *(pad for pad in pads if pad > problem.head_dim)]:
        wide = pad_heads(q, k, v, pad)
        for backend, attention in BACKENDS.items():
            row: Row = {"problem": name, "backend": backend, "pad": pad}
            row |= {"us": None, "tflops": None, "error": None}
            rows.append(row)
            call = padded_call(attention, problem.head_dim, pad)
            try:
                out = call(*wide, mask)
                row["error"] = relative_error(out, *wide, mask, problem.head_dim)
                row["us"] = bench_us(lambda call=call, wide=wide: call(*wide, mask), 25, 100)
                row["tflops"] = problem.flops / row["us"] * 1e-6
            except Exception as error:  # one backend must not cost the figures of the others
                reason = str(error).strip().split("\n")[0][:120]
                print(f"{name} {backend} {pad}: {type(error).__name__}: {reason}", flush=True)
    return rows


def table(rows: list[Row]) -> str:
    """A line for each row that has a time, the quickest of a problem first."""
    lines = [f"{'problem':14}{'backend':14}{'heads':>6}{'us':>10}{'TFLOPS':>8}{'error':>10}"]
    timed = [row for row in rows if row["us"] is not None]
    order = {name: i for i, name in enumerate(PROBLEMS)}
    for row in sorted(timed, key=lambda row: (order[row["problem"]], row["us"])):
        line = f"{row['problem']:14}{row['backend']:14}{row['pad']:>6}{row['us']:>10.1f}"
        lines.append(line + f"{row['tflops']:>8.0f}{row['error']:>10.1e}")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--pad", nargs="+", type=int, default=[80, 96, 128], metavar="WIDTH")
    parser.add_argument("--batch", type=int, help="instead of the problem's own")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    if arguments.batch:
        for name in arguments.problems:
            PROBLEMS[name] = replace(PROBLEMS[name], batch=arguments.batch)
    measure = functools.partial(time_problem, pads=arguments.pad)
    rows = measure_problems(arguments.problems, measure, arguments.json)
    print(table(rows))


if __name__ == "__main__":
    main()

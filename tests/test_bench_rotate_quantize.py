"""What the benchmark of rotate_quantize compares is comparable: peers compute the same chain, the
candidate kernels are right and compile, rows come out where a reader looks for them."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from compiled_kernels import assert_nothing_moves, compile_kernel, lane_shuffles
from packaging.version import Version
from rotate_cases import not_interpreted

from benchmarks import bench_rotate_quantize as bench
from benchmarks import timing
from lrq_kernels import reference

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["plain-128", "none", "norm-modulate-128", "gelu-128"])
def test_compiled_chain_is_the_form(name: str) -> None:
    """Its product is in bf16 on the GPU; in fp32 the codes must be those of the reference."""
    form, p = bench.FORMS[name], bench.Parameters.draw(384, "cpu")
    p = dataclasses.replace(p, scale=p.scale.float(), shift=p.shift.float())
    x, arguments = torch.randn(5, 384), (p.channel_scale, None, None, *form.quantize_arguments)
    hadamard = p.hadamard.float() if "128" in name else None
    x_q, x_scale = bench.chain(bench.before(x, form.source, p), p.channel_scale, hadamard)
    y = x.double()
    if form.source == "norm":
        y = reference.norm_modulate(y, None, None, p.scale, p.shift, "layer", bench.EPS)
    elif form.source == "gelu":
        y = reference.activate(y, None, "gelu_tanh")
    expected_q, expected_scale = reference.rotate_quantize(y, *arguments)
    torch.testing.assert_close(x_scale.double(), expected_scale, rtol=1e-6, atol=0)
    difference = (x_q.int() - expected_q.int()).abs()
    assert int(difference.max()) <= 1 and int(difference.sum()) <= 2


def test_sources_of_a_concatenation_fill_the_buffer() -> None:
    x = torch.randn(3, 15360)
    first, second = bench.two_sources(x)
    assert first.shape == (3, 3072) and first.is_contiguous() and second.is_contiguous()
    assert torch.equal(torch.cat([first.flatten(), second.flatten()]), x.flatten())
    assert torch.equal(bench.before(x, "concat", None)[:, :3072], first)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_row_quantization_restores_x(dtype: torch.dtype) -> None:
    x = torch.randn(5, 384).bfloat16()
    x_q, x_scale = bench.row_quantize(x, dtype)
    assert x_q.dtype == dtype
    error = (x_q.float() * x_scale[:, None] - x.float()).abs()
    step = x_scale[:, None] * 0.51 if dtype is torch.int8 else x.float().abs() / 15 + 1e-3
    assert bool((error <= step).all())


def test_graphs_stay_short_and_run_every_call() -> None:
    for calls, estimate in [(1, 2000.0), (2, 400.0), (7, 300.0), (40, 6.0), (136, 20.0)]:
        plan = timing.graph_plan(calls, estimate)
        run = [i % calls for indices in plan for i in indices]
        assert set(run) == set(range(calls)) and len(run) % calls == 0
        assert all(len(indices) * estimate <= max(timing.GRAPH_US, estimate) for indices in plan)


def test_table_has_a_cell_for_each_row() -> None:
    def row(form: str, k: int, us: float | None) -> bench.Row:
        ratio = us / 10 if us else None
        return {"form": form, "impl": "triton", "m": 4608, "k": k, "ratio": ratio} | {
            "us": us,
            "graph_us": us,
        }

    rows = [row("cast", 1152, 10.0), row("none", 1152, 11.5), row("cast", 3072, 10.0)]
    lines = bench.table([*rows, row("plain-256", 3072, 120.4), row("none", 3072, None)]).split("\n")
    assert lines[0].split()[-6:] == ["4608", "x", "1152", "4608", "x", "3072"]
    assert [line.split() for line in lines[1:]] == [
        ["cast", "triton", "10.0/10.0", "1.00", "10.0/10.0", "1.00"],
        ["plain-256", "triton", "-", "120/120", "12.04"],
        ["none", "triton", "11.5/11.5", "1.15", "-"],
    ]


# Triton 3.6 turns arrays of one element into bounds of a range, which numpy refuses from 2.4 on.
RANGES_ARE_INTERPRETED = Version(triton.__version__) >= Version("3.7") or Version(
    np.__version__
) < Version("2.4")


def test_candidates_in_interpreter() -> None:
    forms = ["plain", "norm", "gelu", "concat"] if RANGES_ARE_INTERPRETED else ["gelu", "concat"]
    program = "import sys\nfrom benchmarks.rotate_quantize_candidates import main\n"
    program += f"for form in {forms}:\n"
    program += "    sys.argv[1:] = ['--shapes', '4096x1152', '--form', form]\n    main()\n"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    found = re.findall(r"^(\d+) of (\d+) candidates right", result.stdout, re.MULTILINE)
    assert len(found) == len(forms), result.stdout + result.stderr
    assert all(int(right) == int(made) > 3 for right, made in found), result.stdout
    if len(forms) == 2:
        pytest.skip("plain and norm: this Triton interprets no range of values with this numpy")


@not_interpreted
@pytest.mark.parametrize("mode", ["cg", "hoist+pre", "pre"])
def test_candidates_compile(mode: str) -> None:
    """The interpreter takes Python that the compiler does not."""
    from benchmarks import rotate_quantize_candidates as module

    candidate = next(c for c in module.candidates(1152, 128) if c.mode == mode)
    arguments = {
        "x_ptr": "*bf16",
        "x_row_stride": "i32",
        "channel_scale_ptr": "*fp32",
        "out_ptr": "*i8",
        "x_scale_ptr": "*fp32",
        "step_factor": "fp32",
        "tokens": "i32",
        **module.kernel_constants(candidate),
    }
    compiled = compile_kernel(module.candidate_kernel, arguments, candidate.launch.num_warps, 90)
    shuffles = lane_shuffles(candidate.launch.values, 128)
    assert_nothing_moves(compiled, candidate.launch.num_warps, shuffles)


@not_interpreted
def test_hoisted_norm_compiles() -> None:
    from benchmarks import rotate_quantize_candidates as module

    found = [c for c in module.candidates(3072, 128, "norm") if c.mode == "hoist+pre"]
    assert [c.launch.num_warps for c in found] == [2, 4, 8]
    constants = module.kernel_constants(found[0])
    arguments = {
        "x_ptr": "*bf16",
        "x_row_stride": "i32",
        "scale_ptr": "*bf16",
        "shift_ptr": "*bf16",
        "channel_scale_ptr": "*fp32",
        "out_ptr": "*i8",
        "x_scale_ptr": "*fp32",
        "eps": "fp32",
        "step_factor": "fp32",
        "tokens": "i32",
        **{name: constants[name] for name in ("K", "N", "VALUES", "BLOCK", "PREFETCHED")},
    }
    compiled = compile_kernel(module.norm_candidate_kernel, arguments, 2, 90)
    assert_nothing_moves(compiled, 2, lane_shuffles(48, 128), 3)

"""What the benchmark of qk_norm_rope compares is comparable, and its rows can be read."""

from __future__ import annotations

import argparse
import dataclasses

import pytest
import torch

from benchmarks import bench_qk_norm_rope as bench
from lrq_kernels import ops


@pytest.mark.parametrize("name", bench.PROBLEMS)
def test_chain_is_the_op(name: str) -> None:
    problem = bench.PROBLEMS[name]
    few = 3 if problem.context_tokens else 0
    problem = dataclasses.replace(problem, tokens=5, context_tokens=few, heads=3)
    p, streams = bench.Parameters.draw(problem, "cpu"), bench.draw_streams(problem, "cpu")
    got = ops.qk_norm_rope(*bench.op_arguments(streams, p, problem))
    expected = bench.chain(streams, p, problem)
    assert all(map(torch.equal, got[: problem.num_outputs], expected))


def test_copy_moves_what_the_op_must() -> None:
    problem = bench.PROBLEMS["flux-joint"]
    size = 3 * 4608 * 3072 * 2
    assert bench.copied(problem, "meta").nbytes == size
    assert problem.bytes_moved == 2 * size + 2 * 4608 * 128 * 4
    assert bench.PROBLEMS["flux-single"].bytes_moved < problem.bytes_moved


def test_table_has_a_line_for_each_row() -> None:
    row = {"problem": "flux-joint", "impl": "8x8", "us": 12.5, "graph_us": None}
    lines = bench.table([{**row, "ratio": None, "tb_s": 2.75}]).split("\n")
    assert lines[1].split() == ["flux-joint", "8x8", "12.5", "-", "-", "2.75"]


def test_launches_are_powers_of_two() -> None:
    assert bench.parse_launch("8x4") == (8, 4)
    for text in ("8", "6x4", "8x0", "8x64", "x4"):
        with pytest.raises(argparse.ArgumentTypeError, match="HEADSxWARPS"):
            bench.parse_launch(text)

"""What the benchmark of attention compares is the same product, and its rows can be read."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import bench_attention as bench


@pytest.mark.parametrize("name", bench.PROBLEMS)
@pytest.mark.parametrize("pad", [0, 24])
def test_padding_changes_nothing(name: str, pad: int) -> None:
    problem = bench.PROBLEMS[name]
    problem = dataclasses.replace(problem, tokens=70, keys=37, heads=3)
    q, k, v, mask = bench.draw(problem, "cpu")
    pad += problem.head_dim
    wide = bench.pad_heads(q, k, v, pad)
    call = bench.padded_call(bench.BACKENDS["default"], problem.head_dim, pad)
    out = call(*wide, mask)
    assert out.shape == q.shape
    assert bench.relative_error(out, *wide, mask, problem.head_dim) < 0.01
    # The same scores as without padding, but for the rounding of q.
    assert bench.relative_error(out, q, k, v, mask, problem.head_dim) < 0.03


def test_error_sees_a_wrong_scale_and_a_lost_mask() -> None:
    problem = bench.Problem(2, 70, 37, 2, 16, mask=True)
    q, k, v, mask = bench.draw(problem, "cpu")
    assert mask is not None
    mask[-1, ..., 20:] = -10000.0
    attention = bench.BACKENDS["default"]
    assert bench.relative_error(attention(q * 2, k, v, mask), q, k, v, mask, 16) > 0.1
    assert bench.relative_error(attention(q, k, v, None), q, k, v, mask, 16) > 0.1


def test_a_package_that_is_missing_is_an_error_of_its_own_row() -> None:
    q, k, v, mask = bench.draw(bench.Problem(1, 4, 4, 1, 16), "cpu")
    with pytest.raises(ImportError):
        bench.BACKENDS["flash_attn_3"](q, k, v, mask)
    with pytest.raises(ValueError, match="no mask"):
        bench.BACKENDS["sage"](q, k, v, torch.zeros(1))


def test_table_is_sorted_by_time_and_leaves_out_what_did_not_run() -> None:
    row = {"problem": "flux", "backend": "cudnn", "pad": 128, "us": 412.25, "tflops": 633.2}
    row["error"] = 0.002
    slower = {**row, "backend": "flash", "us": 700.0}
    absent = {**row, "backend": "sage", "us": None}
    lines = bench.table([slower, absent, row]).split("\n")[1:]
    assert [line.split()[1] for line in lines] == ["cudnn", "flash"]
    assert lines[0].split() == ["flux", "cudnn", "128", "412.2", "633", "2.0e-03"]

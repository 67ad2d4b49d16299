"""bench_parallel under torchrun with two processes on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import bench_parallel as bench

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    module = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    options = ["--model", "tiny-flux", "--size", "64", "--device", "cpu", "--json", str(file)]
    command = [sys.executable, *module, "benchmarks.bench_parallel", *options]
    command += ["--variants", "w4a8-eager"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    (row,) = json.loads(file.read_text())
    assert row["fused_blocks"] == "4 of 4" and row["gpus"] == 2
    assert row["speedup"] == row["one_ms"] / row["ms"]
    # In bf16, whose roundings differ by the order of sums.
    assert row["output_sqnr_db"] is None or row["output_sqnr_db"] > 25
    assert result.stdout.count("ulysses") == 1


def test_table_shows_errors_and_figures() -> None:
    row = {"variant": "w4a8-eager", "way": "ring", "gpus": 2}
    figures = {"one_ms": 84.0, "ms": 50.0, "speedup": 1.68, "output_sqnr_db": None}
    figures |= {"weights_gb": 6.125, "peak_gb": 7.0}
    lines = [
        bench.TITLE,
        *map(bench.line, [{**row, "error": "ValueError: no ring"}, {**row, **figures}]),
    ]
    assert lines[1].endswith("failed: ValueError: no ring")
    assert lines[2].split() == [
        *("w4a8-eager", "ring", "2", "84.00", "50.00", "1.680", "-", "6.12", "7.00")
    ]

"""bench_load: its rows on a tiny model on the CPU, where nothing is timed and all must run."""

from __future__ import annotations

import pytest
from tiny_models import BF16, flux_inputs, model_class, shared_folder

from benchmarks import bench_load


@pytest.mark.parametrize("row", [row for row in bench_load.ROWS if row != "compile"])
def test_rows_run(row: str):
    folder = shared_folder("flux")

    def inputs() -> dict:
        return {name: x for name, x in flux_inputs(BF16).items() if name != "return_dict"}

    facts = bench_load.measure(row, model_class("flux"), folder, "cpu", inputs)
    assert facts["row"] == row and facts["load_s"] > 0 and facts["host_gb"] >= 0
    assert facts["file_gb"] == pytest.approx(
        (folder / "diffusion_pytorch_model.safetensors").stat().st_size / 1e9
    )
    assert ("first_s" in facts) != row.startswith("load")

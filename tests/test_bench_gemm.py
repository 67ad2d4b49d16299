"""Bookkeeping of the GEMM benchmark: what a row says, which ceiling is whose, what is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lrq_kernels._planner")
from benchmarks import bench_gemm as bench  # noqa: E402
from benchmarks import peers  # noqa: E402

CEILINGS = bench.Ceilings(copy_gbps=3000.0, tops={8: 1500.0, 16: 750.0})


def timed(name: str, bytes_per_call: int, **samples: list[float]) -> bench.Variant:
    return bench.Variant(name, [], bytes_per_call, samples)


def test_a_row_compares_medians_within_its_regime():
    ours = timed("w4a8", 30_000_000, burst=[10.0, 20.0, 90.0], sustained=[40.0])
    bf16 = timed("bf16", 60_000_000, burst=[50.0])
    rows = bench.rows_of(
        [ours, bf16, timed("fp8_row", 1, burst=[30.0]), timed("fp8_tensor", 1, burst=[25.0])],
        (1000, 2000, 3000),
        "bias",
        CEILINGS,
    )
    sustained, burst = (row for row in rows if row["variant"] == "w4a8")
    assert (burst["us"], burst["vs_bf16"], burst["vs_fp8"]) == (20.0, 2.5, 1.25)
    assert sustained["vs_bf16"] is None and sustained["vs_fp8"] is None
    assert burst["tops"] == pytest.approx(600.0) and burst["gbps"] == pytest.approx(1500.0)
    assert burst["roof"] == pytest.approx(0.5)  # of the copy, above 600 of 1500 TOPS
    (dense,) = (row for row in rows if row["variant"] == "bf16")
    assert dense["tops"] == pytest.approx(240.0) and dense["ceiling_tops"] == 750.0
    assert (burst["epilogue"], dense["epilogue"]) == ("bias", "none")


def test_each_variant_has_the_ceiling_of_what_it_multiplies():
    sixteen = {"w4a16", "w3a16", "w2a16", "w4a16:m128", "bf16", "tinygemm", "nf4"}
    names = {*bench.NAMES, *bench.LRQ_A16_BITS, "w4a16:m128", "w4a8:128x256"}
    assert {name for name in names if CEILINGS.tops_of(name) == 750.0} == sixteen


def test_the_ceiling_of_a_width_is_its_best_peer(monkeypatch):
    us = {"fp8_tensor": 1000.0, "int_mm": 4000.0}

    def make_variants(shape, names, *_):  # type: ignore[no-untyped-def]
        return [timed(name, 1) for name in names if name in us]  # no bf16 here

    monkeypatch.setattr(bench, "make_variants", make_variants)
    monkeypatch.setattr(bench, "prepare", lambda variant: 1.0)
    monkeypatch.setattr(bench, "burst", lambda variant, _: [us[variant.name]])
    monkeypatch.setattr(bench, "copy_gbps", lambda: 3000.0)
    ceilings = bench.measure_ceilings()
    assert ceilings.tops[8] == pytest.approx(2 * 8192**3 / 1e-3 / 1e12)
    assert ceilings.tops[16] == float("inf")


@pytest.mark.parametrize("name", ["sdnq", "gemlite", "nf4"])
def test_a_peer_that_is_not_installed_says_so(name: str, monkeypatch):
    def absent(module: str) -> None:
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(peers.importlib, "import_module", absent)
    with pytest.raises(peers.PeerMissing, match="is not installed"):
        peers.FUNCTIONS[name](torch.zeros(1, 64), torch.zeros(32, 64))


def test_every_peer_with_a_function_has_the_bits_of_its_weight():
    assert peers.WEIGHT_BITS.keys() == peers.FUNCTIONS.keys()
    assert set(peers.FUNCTIONS) < set(bench.NAMES)


def rows() -> list[dict]:
    variants = [timed("w4a8", 30_000_000, burst=[20.0]), timed("bf16", 60_000_000, burst=[50.0])]
    return bench.rows_of(variants, (1000, 2000, 3000), "none", CEILINGS)


def test_rows_are_json():
    assert json.loads(json.dumps(rows())) == rows()


def test_plot_writes_a_picture(tmp_path: Path):
    pytest.importorskip("matplotlib")
    bench.plot(rows(), tmp_path / "roof.png")
    assert (tmp_path / "roof.png").stat().st_size > 10_000


def test_plot_without_matplotlib_is_a_word(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    bench.plot(rows(), tmp_path / "roof.png")
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "roof.png").exists()

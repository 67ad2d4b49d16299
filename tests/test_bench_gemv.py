"""Bookkeeping of the benchmark of few rows: what a row says, which words are taken."""

from __future__ import annotations

import pytest

from benchmarks import bench_gemv as bench


def test_a_row_counts_each_byte_once_and_compares_medians():
    samples = {"w4a16": [9.0, 10.0, 14.0], "bf16": [40.0, 40.0, 41.0]}
    ours, bf16 = bench.rows_of(samples, 2, 1024, 256, ceiling=100.0)
    assert (ours["us"], ours["spread"]) == (10.0, 0.5)
    # Codes, sixteen levels and a scale of every channel, x and y.
    size = 1024 * 256 // 2 + 1024 * 20 + 2 * 2 * (1024 + 256)
    assert ours["gbps"] == pytest.approx(size / 10e-6 / 1e9)
    assert ours["copy"] == pytest.approx(ours["gbps"] / 100)
    assert ours["tops"] == pytest.approx(2 * 2 * 1024 * 256 / 10e-6 / 1e12)
    assert (ours["vs_bf16"], ours["vs_tinygemm"]) == (4.0, None)
    assert bf16["gbps"] == pytest.approx((2 * 1024 * 256 + 4 * (1024 + 256)) / 40e-6 / 1e9)
    text = bench.line(ours)
    assert "1024 x 256" in text and "50.0%" in text and text.split()[-2:] == ["4.00", "-"]
    assert bench.HEADER.split()[-1] == "xtinygemm"


@pytest.mark.parametrize("variant", bench.VARIANTS)
def test_every_variant_has_its_bytes(variant: str):
    """Between two bits a weight and bf16, codes and scales together."""
    size = bench.weight_bytes(variant, 4096, 1024)
    assert 4096 * 1024 // 4 < size <= 4096 * 1024 * 2


def test_words_of_the_command_line(capsys: pytest.CaptureFixture):
    arguments = bench.parse_arguments(["--shapes", "64x128", "--rows", "1", "4"])
    assert (arguments.shapes, arguments.rows) == ([(64, 128)], [1, 4])
    assert bench.parse_arguments([]).shapes == [*bench.SHAPES]
    for bad in (["--shapes", "64,128"], ["--rows", "17"], ["--variants", "w5a16"]):
        with pytest.raises(SystemExit):
            bench.parse_arguments(bad)
    assert "expected NxK, got '64,128'" in capsys.readouterr().err


def test_a_variant_that_cannot_run_is_named_and_left_out(monkeypatch, capsys):
    def time_variant(variant: str, *_: int) -> float:
        if variant == "nf4":
            raise bench.PeerMissing("bitsandbytes is not installed")
        return 5.0

    monkeypatch.setattr(bench, "time_variant", time_variant)
    assert bench.measure(1, (64, 128), ["bf16", "nf4"], 2) == {"bf16": [5.0, 5.0]}
    assert "nf4 skipped: bitsandbytes is not installed" in capsys.readouterr().out

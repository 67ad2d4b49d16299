"""benchmarks.bench_codebook: what is compared costs as much, and the table of a file."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import bench_codebook as bench
from benchmarks.baselines.method import FLOAT_BITS
from lrq_quant.shared_tables import fit_shared_tables
from lrq_quant.twin_log import fit_twin_log


@pytest.mark.parametrize("tables", [0, 2])
@pytest.mark.parametrize("columns", [128, 384, 1152, 3072, 15360])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_groups_cost_no_fewer_bits_than_tables(columns, bits, tables, generator):
    weight = torch.randn(6, columns, generator=generator)
    made = fit_shared_tables(weight, bits, tables) if tables else fit_twin_log(weight, bits)
    beside = bench.row_bits(made)
    # Rows may agree on one of the tables.
    expected = 40 + len(made.levels) * 8 * 2**bits / 6 if tables else 32 + 8 * 2**bits
    assert beside == pytest.approx(expected)
    for group_bits in (FLOAT_BITS, FLOAT_BITS + bits):
        group = bench.group_of(columns, group_bits, beside)
        assert columns % group == 0 and group_bits * columns // group >= beside
        wider = next((g for g in range(group + 1, columns + 1) if columns % g == 0), None)
        assert wider is None or group_bits * columns // wider < beside


@pytest.mark.parametrize("bits,distortion", [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_lloyd_max_is_the_optimum_of_a_normal_distribution(bits, distortion, generator):
    """Against the published distortions (Max, 1960): 1 - E[level^2], as levels are means."""
    levels = bench.lloyd_max_levels(bits).double()
    below = torch.distributions.Normal(0.0, 1.0).cdf((levels[1:] + levels[:-1]) / 2)
    share = torch.cat([torch.zeros(1), below, torch.ones(1)]).diff()
    assert float(1 - (share * levels.square()).sum()) == pytest.approx(distortion, rel=1e-3)
    # Scales of their own can only help groups.
    weight = torch.randn(16, 2048, generator=generator) * torch.rand(16, 1, generator=generator)
    fitted = bench.scaled_table(weight, levels.float(), 128)
    rms = weight.square().mean(1, keepdim=True).sqrt()
    index = torch.searchsorted((levels[1:] + levels[:-1]) / 2, (weight / rms).double())
    plain = levels[index].float() * rms
    assert (fitted - weight).square().sum() < (plain - weight).square().sum()
    assert len(fitted[0, :128].unique()) <= 2**bits


def test_rows_and_table_of_a_file(tmp_path, generator, capsys):
    # Wide and long-tailed: one step for a group wastes its codes on the tails.
    heavy = torch.randn(24, 3072, generator=generator).mul_(
        torch.rand(24, 3072, generator=generator).clamp_min(1e-4).pow(-0.3)
    )
    file, out = tmp_path / "model.safetensors", tmp_path / "rows.json"
    tensors = {
        "a.weight": heavy,
        "embeddings.word.weight": heavy + 1,
        "norm.weight": heavy[0].clone(),
    }
    save_file({**tensors, "narrow.weight": heavy[:, :64].contiguous()}, file)
    options = ["--bits", "3", "--shared-tables", "0", "4", "64", "--json", str(out)]
    bench.main([str(file), *options])
    rows = json.loads(out.read_text())
    # 24 rows share one table.
    real = {0: 3 + 96 / 3072, 1: 3 + (40 + 64 / 24) / 3072}
    expected = [(kind, t) for kind in ("as trained", "rotated") for t in (0, 1, 1)]
    assert [(r["weight"], r["tables"]) for r in rows] == expected
    for row in rows:
        assert row["twin-log"] > max(row[n] for n in ("symmetric", "asymmetric", "nf"))
        assert row["real_bits"] == pytest.approx(real[row["tables"]])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 7 and printed[1].split().count("of") == 2
    save_file({"norm.weight": heavy[0].contiguous()}, file)
    with pytest.raises(ValueError, match=f"{file} has no matrix of 128 columns"):
        bench.main([str(file)])

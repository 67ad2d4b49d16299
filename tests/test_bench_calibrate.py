"""benchmarks.bench_calibrate: prompts that differ, and what a row says of a run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_families import TINY_FAMILIES

from benchmarks import bench_calibrate
from lrq_quant import QuantRecipe, SearchOptions
from lrq_quant.model_inputs import model_inputs
from lrq_quant.model_shapes import make_model


@pytest.mark.parametrize("name", ["tiny-flux", "tiny-pixart"])
def test_prompts_draw_latents_of_their_own(name):
    model = make_model(name, "cpu")
    called = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: called.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    first, again, other = (bench_calibrate.draw(model, [p], 64, 4) for p in ("3", "3", "4"))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert bench_calibrate.draw(model, ["3", "4"], 64, 1).shape[0] == 2
    # From noise to a picture: the schedule of the class, 1000 or 1 at its begin.
    assert [t / called[0] for t in called[:4]] == pytest.approx([1, 0.75, 0.5, 0.25], rel=0.01)
    assert called[0] in (1.0, 1000.0)


@pytest.mark.parametrize("family", ["z-image", "hidream", "cogvideox"])
def test_classes_that_name_their_arguments_otherwise_draw_too(family):
    model = TINY_FAMILIES[family].make().requires_grad_(False)
    inputs = model_inputs(type(model).__name__, model.config, size=64, batch=2, device="cpu")
    shape = inputs["x"][0].shape if family == "z-image" else inputs["hidden_states"].shape[1:]
    drawn = bench_calibrate.draw(model, ["3", "4"], 64, 2)
    assert drawn.shape == (2, *shape) and drawn.isfinite().all()


def test_channels_beside_the_latents_stay():
    """16 of the 36 of a video that starts from a picture; PixArt gives variances behind them."""
    read, given = torch.randn(1, 36, 2, 4, 4), torch.randn(1, 16, 2, 4, 4)
    stepped = bench_calibrate.less(read, given, 4)
    assert torch.equal(stepped[:, :16], read[:, :16] - given / 4)
    assert torch.equal(stepped[:, 16:], read[:, 16:])
    latents, doubled = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 8, 8)
    assert torch.equal(bench_calibrate.less(latents, doubled, 2), latents - doubled[:, :4] / 2)


def test_the_phases_are_those_of_quantize_model(tmp_path, monkeypatch):
    search = SearchOptions(rotations=("none",), alphas=(), sample_rows=32, weight_rows=16)
    small = QuantRecipe.from_name("w4a8", search=search)
    monkeypatch.setattr(bench_calibrate.QuantRecipe, "from_name", lambda name: small)
    file = tmp_path / "rows.json"
    options = "--model tiny-pixart --device cpu --size 64 --steps 1 --prompts 1".split()
    bench_calibrate.main([*options, "--json", str(file)])
    (row,) = json.loads(file.read_text())
    phases = [row[name] for name in ("calibration", "second moments", "quantization")]
    assert min(phases) > 0 and sum(phases) <= row["seconds"] and not row["resumed"]
    assert 4 < row["weight_bits"] < 6


def test_a_row_has_the_time_of_each_phase(tmp_path, monkeypatch, capsys):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(bench_calibrate.time, "perf_counter", lambda: clock.now)

    def quantize_model(model, recipe, *, run, prompts, work_folder, progress):
        assert recipe.calibration.gram_bytes == 2 * 10**9 and prompts == ["0", "1"]
        assert torch.isfinite(run(prompts[:1])).all()
        for what, seconds in (("calibration", 2), ("second moments", 30), ("quantization", 5)):
            for done in (1, 2):
                clock.now += seconds
                progress(what, done, 2)
        (work_folder / "finished").touch()
        return SimpleNamespace(report=SimpleNamespace(weight_bits=4.25))

    monkeypatch.setattr(bench_calibrate, "quantize_model", quantize_model)
    work, file = tmp_path / "work", tmp_path / "rows.json"
    work.mkdir()
    options = "--model tiny-flux --device cpu --size 64 --steps 1 --prompts 2 --gram-gb 2".split()
    for resumed in (False, True):
        bench_calibrate.main([*options, "--work", str(work), "--json", str(file)])
        (row,) = json.loads(file.read_text())
        assert row["resumed"] is resumed and row["weight_bits"] == 4.25
        phases = {name: row[name] for name in ("calibration", "second moments", "quantization")}
        assert phases == {"calibration": 4, "second moments": 60, "quantization": 10}
        assert row["seconds"] == 74
    assert "second moments 100.0%" in capsys.readouterr().out

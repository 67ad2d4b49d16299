"""What bench_generate counts: every step of the transformer, the VAE, and all of a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_generate as bench
from benchmarks.model_variants import Models, Variant
from lrq_quant.model_shapes import make_model


@pytest.mark.parametrize("name", ["tiny-flux", "tiny-pixart"])
def test_a_picture_of_every_pipeline(name: str) -> None:
    request = bench.Request(size=64, steps=3, batch=1)
    model = make_model(name, "cpu")
    pipeline, call = bench.make_call(model, request, "cpu")
    with torch.no_grad():
        row = bench.time_pictures(call, pipeline, 2, on_gpu=False)
        first, again = call(), call()
    assert first.shape == (1, 3, 64, 64) and torch.equal(first, again)
    assert len(row["images_s"]) == 2
    assert row["transformer_s"] >= 3 * 0.5 * row["step_ms"] / 1e3 > 0 and row["vae_s"] > 0
    assert row["transformer_s"] + row["vae_s"] + row["other_s"] == pytest.approx(
        sum(row["images_s"]) / 2
    )
    assert row["other_s"] > 0
    # The hooks are gone.
    assert not model._forward_hooks and not pipeline.vae.decoder._forward_pre_hooks


def test_calls_are_marked_one_by_one() -> None:
    linear = torch.nn.Linear(2, 2)
    with bench.Calls(linear, on_gpu=False) as calls:
        for _ in range(3):
            linear(torch.zeros(1, 2))
    linear(torch.zeros(1, 2))
    assert len(calls.milliseconds()) == 3


def test_rows_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "rows.json"
    arguments = "--model tiny-flux --size 64 --steps 2 --pictures 2 --device cpu --variants"
    variants = ["bf16-eager", "w4a8-graph", "w4a8-eager"]
    assert bench.main([*arguments.split(), *variants, "--json", str(file)]) == 1
    dense, graph, fused = json.loads(file.read_text())
    assert "CUDA" in graph["error"] and "failed" in capsys.readouterr().out
    assert dense["speedup_image"] == 1.0 and fused["fused_blocks"].startswith("4 of 4")
    assert fused["speedup_step"] == pytest.approx(dense["step_ms"] / fused["step_ms"])


def test_a_class_without_a_pipeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no pipeline for SD3Transformer2DModel"):
        bench.make_call(make_model("sd3.5-medium", "meta"), bench.Request(64, 2, 1), "cpu")
    models = Models("tiny-flux", "cpu", tmp_path)
    with pytest.raises(RuntimeError, match="CUDA"):
        bench.measure(models, Variant.parse("w4a8-graph"), bench.Request(64, 2, 1), 1, "cpu")

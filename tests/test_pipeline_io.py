"""Quantized pipeline folders: written whole or not at all, and read as they were written."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_models import flux_inputs, linears, tiny_flux, tiny_pipeline, tiny_pixart

from lrq_kernels.checkpoint import CheckpointError
from lrq_quant import QuantRecipe, check, pipeline_io, quantize_model
from lrq_quant.demo.pipeline import ShapesPipeline, prompt_generators
from lrq_quant.model_stats import strided_sample
from lrq_quant.pipeline_io import (
    _run_key,
    check_writable,
    load_pipeline,
    load_report,
    load_transformer,
    quantize_pipeline,
    save_transformer,
    transformer_names,
)

WEIGHTS_ONLY = QuantRecipe.from_name("w4a8")


def test_pipeline_folder_round_trip(tmp_path: Path) -> None:
    """quantize -> save -> load -> generate: the same pictures as the model that was quantized."""
    pipeline = tiny_pipeline()
    out = tmp_path / "quantized"
    stages = []
    report = quantize_pipeline(
        pipeline,
        QuantRecipe.from_name("w4a8"),
        ["a red circle left of a blue square", "a green square above a red circle"],
        out,
        call_options={"num_inference_steps": 2},
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    assert report.calibrated and stages[-1][1] == stages[-1][2]
    assert not (tmp_path / "quantized.partial").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["quantized"]
    assert load_report(out).to_dict() == report.to_dict()
    prompts = ["a red circle left of a blue square", "a blue circle above a red square"]

    def pictures() -> torch.Tensor:
        loaded = load_pipeline(out, dtype=torch.float32)
        loaded.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "output_type": "pt"}
        return loaded(prompts, generator=prompt_generators(2), **options).images

    assert torch.equal(pictures(), pictures())
    config = json.loads((out / "transformer" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "lrq"


def test_a_taken_or_unwritable_folder_is_refused_before_calibration(tmp_path: Path) -> None:
    class Untouchable:
        def __getattr__(self, name: str) -> None:
            raise RuntimeError(f"the pipeline was used: {name}")

    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="taken exists already"):
        quantize_pipeline(Untouchable(), WEIGHTS_ONLY, None, taken)
    assert (taken / "precious.txt").read_text() == "keep me"
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match="cannot write"):
        quantize_pipeline(Untouchable(), WEIGHTS_ONLY, None, file / "out")


def test_check_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    assert check_writable(tmp_path / "new") == tmp_path / "new"
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_no_folder(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.transformer.transformer_blocks[0].ff.net[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.ff\.net\.2\.weight"):
        quantize_pipeline(pipeline, WEIGHTS_ONLY, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    model = tiny_pixart()
    save_transformer(model, quantize_model(model, WEIGHTS_ONLY), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="missing"):
        load_transformer(tmp_path)
    config["_class_name"] = "NoSuchTransformer"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="NoSuchTransformer"):
        load_transformer(tmp_path)


@pytest.mark.gpu
@torch.no_grad()
def test_cpu_and_gpu_load_the_same_model(tmp_path: Path) -> None:
    model = tiny_flux()
    save_transformer(model, quantize_model(model, WEIGHTS_ONLY), tmp_path)
    on_cpu = load_transformer(tmp_path)
    on_gpu = load_transformer(tmp_path, device="cuda")
    tensors = dict(on_cpu.named_buffers())
    for name, tensor in on_gpu.named_buffers():
        assert tensor.is_cuda and torch.equal(tensor.cpu(), tensors[name]), name
    inputs = flux_inputs(torch.bfloat16)
    moved = {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
    expected, got = on_cpu(**inputs)[0].float(), on_gpu(**moved)[0].float().cpu()
    assert float((expected - got).norm() / expected.norm()) < 0.05


class TwoTransformers(ShapesPipeline):
    """Draws with one transformer, then with the other, as Wan 2.2 does."""

    def __init__(self, transformer, transformer_2, text_encoder, scheduler) -> None:
        DiffusionPipeline.__init__(self)
        self.register_modules(
            transformer=transformer,
            transformer_2=transformer_2,
            text_encoder=text_encoder,
            scheduler=scheduler,
        )

    def __call__(self, *args, **kwargs):
        first, second = self.transformer, self.transformer_2
        drawn = [ShapesPipeline.__call__(self, *args, **kwargs)]
        try:
            self.transformer = second
            drawn.append(ShapesPipeline.__call__(self, *args, **kwargs))
        finally:
            self.transformer = first
        return drawn[1]


def test_a_second_transformer_is_quantized_too(tmp_path: Path) -> None:
    parts = tiny_pipeline().components
    pipeline = TwoTransformers(**parts, transformer_2=tiny_pixart())
    assert transformer_names(pipeline) == ["transformer", "transformer_2"]
    options = {"num_inference_steps": 1}
    out = tmp_path / "q"
    quantize_pipeline(pipeline, WEIGHTS_ONLY, ["a red circle"], out, call_options=options)
    assert not list(tmp_path.glob("*.partial"))
    one, two = (load_report(out / name) for name in ("transformer", "transformer_2"))
    assert one.calibrated and two.calibrated
    assert [a.weight_sqnr_db for a in one.linears] != [b.weight_sqnr_db for b in two.linears]
    loaded = TwoTransformers.from_pretrained(out)
    assert len(linears(loaded.transformer)) == len(linears(loaded.transformer_2)) == 21
    assert check(loaded).problems == ()


def test_places_that_a_finished_folder_cannot_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before any work: a mount point cannot be replaced, nor the current folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="is the current folder, .* name a new folder"):
        check_writable(".")
    with pytest.raises(OSError, match="is a mount point"):
        check_writable("/proc")
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert check_writable("link") == tmp_path / "target"


def test_a_pipeline_without_a_transformer_is_refused(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.transformer = None
    with pytest.raises(ValueError, match="ShapesPipeline must have a component 'transformer', got"):
        quantize_pipeline(pipeline, WEIGHTS_ONLY, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_pipeline_is_refused_before_it_draws(tmp_path: Path) -> None:
    quantize_pipeline(tiny_pipeline(), WEIGHTS_ONLY, None, tmp_path / "once")
    pipeline = load_pipeline(tmp_path / "once")
    with patch.object(type(pipeline), "__call__", side_effect=AssertionError("it drew")):
        with pytest.raises(ValueError, match="^transformer must be dense, got PixArt.* already"):
            quantize_pipeline(pipeline, WEIGHTS_ONLY, ["a red circle"], tmp_path / "twice")
    with pytest.raises(ValueError, match="^model must be dense, got PixArt"):
        quantize_model(pipeline.transformer, WEIGHTS_ONLY)
    assert [path.name for path in tmp_path.iterdir()] == ["once"]


def test_an_offloaded_pipeline_is_quantized_where_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception): ...

    def stop(*_: object, device: object, **__: object) -> None:
        raise Stopped(device)

    pipeline = tiny_pipeline()
    gpu = property(lambda self: torch.device("cuda:1"))
    monkeypatch.setattr(type(pipeline), "_execution_device", gpu)
    monkeypatch.setattr(pipeline_io, "quantize_model", stop)
    with pytest.raises(Stopped, match="cuda:1"):
        quantize_pipeline(pipeline, WEIGHTS_ONLY, None, tmp_path / "out")


def test_what_a_killed_save_left_goes_with_the_next(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    with (
        patch.object(type(pipeline), "save_config", side_effect=KeyboardInterrupt),
        patch("shutil.rmtree"),
        pytest.raises(KeyboardInterrupt),
    ):  # as a kill: nothing is cleaned up
        quantize_pipeline(pipeline, WEIGHTS_ONLY, None, tmp_path / "out")
    assert len(list(tmp_path.iterdir())) == 2  # with the work folder
    quantize_pipeline(pipeline, WEIGHTS_ONLY, None, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_statistics_of_another_text_encoder_are_not_continued_from() -> None:
    pipeline = tiny_pipeline()
    names = transformer_names(pipeline)
    key = _run_key(pipeline, names, {"num_inference_steps": 2})
    assert key == _run_key(pipeline, names, {"num_inference_steps": 2})
    assert key != _run_key(pipeline, names, {"num_inference_steps": 3})
    for parameter in pipeline.transformer.parameters():
        parameter.data.mul_(2)  # is in another key
    assert key == _run_key(pipeline, names, {"num_inference_steps": 2})
    next(pipeline.text_encoder.parameters()).data.mul_(2)
    changed = _run_key(pipeline, names, {"num_inference_steps": 2})
    assert key != changed
    pipeline.scheduler = type(pipeline.scheduler)(shift=5.0)
    assert changed != _run_key(pipeline, names, {"num_inference_steps": 2})


@pytest.mark.parametrize("shape", [(3072, 3072), (4608, 1152), (96, 40), (7, 3), (5000,), (0, 8)])
def test_a_sample_sees_every_part_of_a_weight(shape: tuple[int, ...]) -> None:
    columns = torch.arange(shape[-1]).expand(shape)
    rows = torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)).expand(shape)
    for index in (columns, rows):
        sample = strided_sample(index)
        assert len(sample) <= 1024
        assert len(sample.unique()) >= min(index.unique().numel(), 400)

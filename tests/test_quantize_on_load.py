"""quantization_config=LRQConfig(...): a dense checkpoint is quantized while it loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from tiny_models import (
    BF16,
    TINY,
    all_tensors,
    linears,
    load,
    model_class,
    pixart_inputs,
    rewrite,
    run,
    tiny_flux,
    tiny_pipeline,
    tiny_pixart,
)
from torch import nn

from lrq_kernels import CheckpointError, LRQLinear
from lrq_kernels.checkpoint import FILE_NAME
from lrq_quant import LRQConfig, QuantRecipe, quantize_model
from lrq_quant.demo.pipeline import ShapesPipeline, prompt_generators
from lrq_quant.diffusers_backend import LRQQuantizer
from lrq_quant.pipeline_io import quantize_pipeline

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("kind", "shard_size"),
    [*((kind, None) for kind in TINY), ("flux", "100KB"), ("pixart", "100KB")],
)
def test_on_the_fly_equals_quantizing_first(kind: str, shard_size: str | None, tmp_path: Path):
    dense = TINY[kind][0]().to(BF16)
    dense.save_pretrained(tmp_path, **({"max_shard_size": shard_size} if shard_size else {}))
    model = load(kind, tmp_path, quantization_config=LRQConfig("w4a8"))
    expected = quantize_model(dense, QuantRecipe.from_name("w4a8"))
    found = linears(model)
    assert found.keys() == expected.states.keys()
    for name, linear in found.items():
        state, other = linear.to_state(), expected.states[name]
        for field in ("codes", "levels", "weight_scale", "bias"):
            assert torch.equal(getattr(state, field), getattr(other, field)), (name, field)
        assert state.scheme == other.scheme
        assert (state.rotation.signs is None) == (other.rotation.signs is None)
    assert not [name for name, tensor in all_tensors(model).items() if tensor.is_meta]
    again = tmp_path / "again"
    model.save_pretrained(again)
    assert torch.equal(run(load(kind, again), kind), run(model, kind))


def test_on_the_fly_shares_inputs_and_keeps_what_it_is_told(tmp_path: Path):
    tiny_flux().to(BF16).save_pretrained(tmp_path)
    config = LRQConfig(
        "w4a8",
        modulation=None,
        modules_to_not_convert=["transformer_blocks.0"],
        overrides={"*.ff.net.2": "w3a8"},
    )
    model = load("flux", tmp_path, quantization_config=config)
    found = linears(model)
    assert found.keys() == {linear.name for linear in config.plan(tiny_flux()).linears}
    assert not any("norm" in n or n.startswith("transformer_blocks.0.") for n in found)
    assert found["transformer_blocks.1.ff.net.2"].scheme.weight_bits == 3
    attention = model.transformer_blocks[1].attn
    assert attention.to_q.input_quantizer.shared is attention.to_v.input_quantizer.shared
    assert isinstance(model.transformer_blocks[0].attn.to_q, nn.Linear)
    assert not isinstance(model.transformer_blocks[0].attn.to_q, LRQLinear)
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["quantization_config"] == config.to_dict()


def test_a_dense_model_never_waits_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Remedy: nn.Linear stays until its own tensors are read; then it is replaced."""
    model = tiny_pixart().to(BF16)
    model.save_pretrained(tmp_path)
    most = max(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    waiting: list[int] = []
    real = LRQQuantizer.create_quantized_param

    def watched(self: LRQQuantizer, *arguments: object, **options: object) -> None:
        real(self, *arguments, **options)
        on_device = [
            m.weight.numel()
            for m in arguments[0].modules()
            if isinstance(m, nn.Linear) and not isinstance(m, LRQLinear) and not m.weight.is_meta
        ]
        planned = sum(t.numel() for t in self._arrived.values())
        waiting.append(planned)
        assert len(on_device) <= 6  # embedders and the last projection, which stay dense

    monkeypatch.setattr(LRQQuantizer, "create_quantized_param", watched)
    load("pixart", tmp_path, quantization_config=LRQConfig("w4a8"))
    assert waiting and max(waiting) <= most


def test_an_incomplete_dense_checkpoint_is_refused(tmp_path: Path):
    """Remedy: update_missing_keys. diffusers warns, and the layer stays on meta."""
    tiny_pixart().save_pretrained(tmp_path)
    name = "transformer_blocks.1.attn1.to_k.weight"
    rewrite(tmp_path / FILE_NAME, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match="attn1.to_k.weight"):
        load("pixart", tmp_path, quantization_config=LRQConfig("w4a8"))


def test_a_bad_weight_is_named(tmp_path: Path):
    model = tiny_pixart()
    with torch.no_grad():
        model.transformer_blocks[1].attn2.to_k.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.attn2\.to_k"):
        load("pixart", tmp_path, quantization_config=LRQConfig("w4a8"))


@pytest.mark.parametrize("kind", TINY)
def test_modules_kept_in_fp32_stay_so_and_dense(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Remedy: use_keep_in_fp32_modules, and the list is copied into the exclusions."""
    cls = model_class(kind)
    names = ["proj_out", "ff", "ffn", *(cls._keep_in_fp32_modules or ())]
    asked = [*names]
    monkeypatch.setattr(cls, "_keep_in_fp32_modules", names)
    TINY[kind][0]().save_pretrained(tmp_path)
    model = load(kind, tmp_path, quantization_config=LRQConfig("w4a8"))
    again = tmp_path / "again"
    model.save_pretrained(again)
    for found in (model, load(kind, again)):
        assert names == asked and linears(found)
        dense = {n: p for n, p in found.named_parameters() if {*names} & {*n.split(".")}}
        assert {"proj_out.weight"} < {*dense} and any(".ff" in name for name in dense)
        assert {parameter.dtype for parameter in dense.values()} == {torch.float32}
        assert not any({*names} & {*name.split(".")} for name in linears(found))
        others = {p.dtype for n, p in found.named_parameters() if n not in dense}
        assert others == {BF16}


@pytest.mark.parametrize("kind", TINY)
def test_modules_to_not_convert_stay(kind: str, tmp_path: Path):
    TINY[kind][0]().to(BF16).save_pretrained(tmp_path)
    patterns = ["*blocks.0", "*.to_v"]
    whole = load(kind, tmp_path, quantization_config=LRQConfig("w4a8"))
    config = LRQConfig("w4a8", modules_to_not_convert=patterns)
    model = load(kind, tmp_path, quantization_config=config)
    stay = {n for n in linears(whole) if n.endswith(".to_v") or "blocks.0." in n}
    assert stay and linears(model).keys() == linears(whole).keys() - stay
    again = tmp_path / "again"
    model.save_pretrained(again)
    assert torch.equal(run(load(kind, again), kind), run(model, kind))


def test_a_single_file(tmp_path: Path):
    """Remedy: pre_quantized is found out, since from_single_file does not say it."""
    dense = tiny_flux().to(BF16)
    dense.save_pretrained(tmp_path)
    options = {"config": str(tmp_path), "quantization_config": LRQConfig("w4a8")}
    model = type(dense).from_single_file(str(tmp_path / FILE_NAME), torch_dtype=BF16, **options)
    expected = load("flux", tmp_path, quantization_config=LRQConfig("w4a8"))
    assert linears(model).keys() == linears(expected).keys()
    assert torch.equal(run(model, "flux"), run(expected, "flux"))


def pictures(pipeline: DiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a red circle left of a blue square", "a blue circle above a red square"]
    options = {"num_inference_steps": 2, "output_type": "pt"}
    return pipeline(prompts, generator=prompt_generators(2), **options).images


def test_pipeline_quantization_config(tmp_path: Path):
    tiny_pipeline().save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(quant_mapping={"transformer": LRQConfig("w3a8")})
    loaded = ShapesPipeline.from_pretrained(tmp_path, quantization_config=config, torch_dtype=BF16)
    bits = {
        m.scheme.weight_bits for n, m in linears(loaded.transformer).items() if "adaln" not in n
    }
    assert bits == {3}
    assert torch.isfinite(pictures(loaded)).all()


@torch.no_grad()
def test_inference_is_close_to_the_dense_model(tmp_path: Path):
    dense = tiny_pixart()
    dense.save_pretrained(tmp_path)
    model = load(
        "pixart", tmp_path, quantization_config=LRQConfig("w4a8"), torch_dtype=torch.float32
    )
    inputs = pixart_inputs(torch.float32)
    expected, got = dense(**inputs)[0], model(**inputs)[0]
    assert float((got - expected).norm() / expected.norm()) < 0.25


def test_statistics_of_other_call_options_are_not_continued_from(tmp_path: Path) -> None:
    """A run killed with 1 step and started again with 2 must calibrate again."""
    pipeline, recipe = tiny_pipeline(), QuantRecipe.from_name("w4a8")
    prompts = ["a red circle left of a blue square"]
    steps: list[int] = []

    class Killed(Exception):
        pass

    def run(number: int, kill: bool) -> None:
        def progress(stage: str, done: int, total: int) -> None:
            if stage == "calibration":
                steps.append(number)
            elif kill:
                raise Killed

        options = {"num_inference_steps": number}
        quantize_pipeline(
            pipeline, recipe, prompts, tmp_path / "out", call_options=options, progress=progress
        )

    with pytest.raises(Killed):
        run(1, kill=True)
    with pytest.raises(Killed):
        run(1, kill=True)
    assert steps == [1]  # continued
    run(2, kill=False)
    assert steps == [1, 2]

"""Quantized pipeline folders and fused projections, on tiny random instances of real classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
)

from lrq_kernels import LRQLinear, checkpoint, model_states
from lrq_kernels.checkpoint import CheckpointError
from lrq_quant import QuantRecipe, quantize_model
from lrq_quant.demo.pipeline import ShapesPipeline, prompt_generators
from lrq_quant.demo.text import CaptionEncoder
from lrq_quant.diffusers_backend import (
    check_writable,
    fused_projections,
    load_pipeline,
    load_report,
    load_transformer,
    quantize_pipeline,
    save_transformer,
)

WEIGHTS_ONLY = QuantRecipe.from_name("w4a8")


def tiny_pixart() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        cross_attention_dim=128,
        sample_size=32,
        patch_size=8,
        norm_type="ada_norm_single",
        interpolation_scale=1,
        use_additional_conditions=False,
        caption_channels=64,
    ).eval()


def tiny_flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    ).eval()


def flux_inputs(dtype: torch.dtype) -> dict:
    return {
        "hidden_states": torch.randn(1, 9, 16, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 5, 64, dtype=dtype),
        "pooled_projections": torch.randn(1, 32, dtype=dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "guidance": torch.tensor([3.5], dtype=dtype),
        "img_ids": torch.randint(0, 3, (9, 3)).to(dtype),
        "txt_ids": torch.zeros(5, 3, dtype=dtype),
        "return_dict": False,
    }


def pixart_inputs(dtype: torch.dtype) -> dict:
    return {
        "hidden_states": torch.randn(2, 3, 32, 32, dtype=dtype),
        "encoder_hidden_states": torch.randn(2, 7, 64, dtype=dtype),
        "encoder_attention_mask": torch.tensor([[1.0] * 7, [1.0] * 4 + [0.0] * 3], dtype=dtype),
        "timestep": torch.tensor([500.0, 500.0]),
        "return_dict": False,
    }


def tiny_pipeline() -> ShapesPipeline:
    encoder = CaptionEncoder(embed_dim=64)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    return ShapesPipeline(tiny_pixart(), encoder, scheduler)


def sharing(states: dict[str, checkpoint.LinearState]) -> set[frozenset[str]]:
    """Which linears share an input, whichever of them stores it."""
    groups: dict[str, set[str]] = {}
    for name, state in states.items():
        groups.setdefault(state.shared_input or name, set()).add(name)
    return {frozenset(group) for group in groups.values()}


@pytest.mark.parametrize("make, inputs", [(tiny_pixart, pixart_inputs), (tiny_flux, flux_inputs)])
@torch.no_grad()
def test_fused_projections_are_lossless(make, inputs, tmp_path: Path) -> None:
    model = make()
    save_transformer(model, quantize_model(model, WEIGHTS_ONLY), tmp_path)
    fused = load_transformer(tmp_path, dtype=torch.float32)
    separate = load_transformer(tmp_path, dtype=torch.float32, fuse=False)
    arguments = inputs(torch.float32)
    assert torch.equal(fused(**arguments)[0], separate(**arguments)[0])
    # Every self-attention is fused, and what was fused is held only once.
    names = fused_projections(fused)
    self_attentions = {n for n, m in model.named_modules() if n.endswith((".attn1", ".attn"))}
    assert self_attentions and self_attentions == {
        name.removesuffix(".to_qkv") for name in names if name.endswith(".to_qkv")
    }
    weights = {id(m.packed_weight) for m in fused.modules() if isinstance(m, LRQLinear)}
    assert len(weights) < sum(isinstance(m, LRQLinear) for m in separate.modules())
    assert not any(
        name.endswith((".attn.to_k", ".attn1.to_k")) for name, _ in fused.named_modules()
    )


@torch.no_grad()
def test_cross_attention_fuses_keys_and_values_only(tmp_path: Path) -> None:
    """Queries read the picture, keys and values the caption."""
    model = tiny_pixart()
    save_transformer(model, quantize_model(model, WEIGHTS_ONLY), tmp_path)
    fused = fused_projections(load_transformer(tmp_path))
    assert fused["transformer_blocks.1.attn2.to_kv"] == [
        "transformer_blocks.1.attn2.to_k",
        "transformer_blocks.1.attn2.to_v",
    ]
    assert "transformer_blocks.1.attn2.to_qkv" not in fused


@torch.no_grad()
def test_a_fused_model_saves_the_checkpoint_it_was_loaded_from(tmp_path: Path) -> None:
    model = tiny_flux()
    quantized = quantize_model(model, WEIGHTS_ONLY)
    save_transformer(model, quantized, tmp_path)
    states, dense = model_states(load_transformer(tmp_path, dtype=torch.float32))
    assert set(states) == set(quantized.states)
    again = checkpoint.save(tmp_path / "again.safetensors", states, dense, type(model).__name__)
    first, second = checkpoint.load(tmp_path), checkpoint.load(again)
    for name, state in first.states.items():
        other = second.states[name]
        assert torch.equal(state.codes, other.codes), name
        assert torch.equal(state.levels, other.levels), name
        assert torch.equal(state.weight_scale, other.weight_scale), name
        x = torch.randn(3, state.in_features)
        assert torch.equal(state.rotation.apply(x), other.rotation.apply(x)), name
    assert sharing(first.states) == sharing(second.states)
    assert all(torch.equal(first.dense[name], second.dense[name]) for name in first.dense)


@torch.no_grad()
def test_mixed_bits_of_q_k_v_are_not_fused(tmp_path: Path) -> None:
    """A fused GEMM has one code width; the linears still share one quantized input."""
    model = tiny_pixart()
    other = QuantRecipe.from_name("w3a8").block
    recipe = QuantRecipe.from_name("w4a8", overrides=(("*.0.attn1.to_v", other),))
    save_transformer(model, quantize_model(model, recipe), tmp_path)
    loaded = load_transformer(tmp_path, dtype=torch.float32)
    assert "transformer_blocks.0.attn1.to_qkv" not in fused_projections(loaded)
    assert "transformer_blocks.1.attn1.to_qkv" in fused_projections(loaded)
    attention = loaded.transformer_blocks[0].attn1
    assert attention.to_q.input_quantizer is attention.to_v.input_quantizer
    assert torch.isfinite(loaded(**pixart_inputs(torch.float32))[0]).all()


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

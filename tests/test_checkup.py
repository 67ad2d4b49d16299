"""check: silent on a model that is in order, and naming everything that only seems to work."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from peft import LoKrConfig, LoraConfig, inject_adapter_in_model
from test_lora import lora_of
from tiny_families import TINY_FAMILIES
from tiny_models import BF16, TINY, load, shared_folder, tiny_pipeline, tiny_pixart
from torch import nn

import lrq_kernels
from lrq_kernels import LRQLinear
from lrq_quant import LRQConfig, QuantRecipe, check, fuse_projections, quantize_model
from lrq_quant.checkup import kernels_of
from lrq_quant.demo.pipeline import ShapesPipeline
from lrq_quant.pipeline_io import quantize_pipeline, save_transformer


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return load(request.param, shared_folder(request.param))


@pytest.fixture
def flux() -> nn.Module:
    return load("flux", shared_folder("flux"))


def test_a_model_in_order(model: nn.Module):
    found = check(model)
    text = str(found)
    assert found.problems == () and "nothing is silently out of effect" in text
    assert "w4a8" in text and "w4a16" in text and "torch.bfloat16" in text
    assert "on cpu: reference kernels" in text
    assert "dense linears: last projection" in text and "yet dense" not in text
    # The class of SD3's attention has a fused forward that skips its norms, so it is not used.
    can_fuse = not isinstance(model, SD3Transformer2DModel)
    assert "0 fused projections" in text and ("could be fused" in text) == can_fuse
    fuse_projections(model)
    text = str(check(model))
    assert ("0 fused projections" in text) != can_fuse and "could be fused" not in text


def test_smoothing_that_the_fast_kernel_does_not_take_is_said(flux: nn.Module):
    assert "bf16 does not hold" not in str(check(flux))
    linear = flux.get_submodule("transformer_blocks.0.ff.net.2")
    state = linear.to_state()
    scale = torch.full((state.in_features,), 1.001)
    twin = LRQLinear.from_state(dataclasses.replace(state, smooth_scale=scale))
    flux.set_submodule("transformer_blocks.0.ff.net.2", twin)
    found = check(flux)
    assert found.problems == () and "1 inputs have smoothing that bf16 does not hold" in str(found)


def test_a_pipeline_lists_its_components(tmp_path: Path):
    quantize_pipeline(tiny_pipeline(), QuantRecipe.from_name("w4a8"), None, tmp_path / "q")
    pipeline: DiffusionPipeline = ShapesPipeline.from_pretrained(tmp_path / "q", dtype=BF16)
    found = check(pipeline)
    assert found.problems == ()
    assert "text_encoder (CaptionEncoder): not quantized" in str(found)
    assert "transformer (PixArtTransformer2DModel):" in str(found)


def test_why_linears_are_dense(tmp_path: Path):
    tiny_pixart().save_pretrained(tmp_path)
    config = LRQConfig("w4a8", modulation=None, modules_to_not_convert=["transformer_blocks.0"])
    model = load("pixart", tmp_path, quantization_config=config)
    found = check(model)
    assert "excluded by the quantization config" in str(found) and not found.problems
    model.transformer_blocks[1].attn1.to_q = nn.Linear(128, 128)
    found = check(model)
    assert "1 dense linears: part of the family's recipe, yet dense" in str(found)
    assert found.problems == (
        "model: dense, which the configuration does not say: transformer_blocks.1.attn1.to_q",
    )


def test_what_a_recipe_leaves_out_is_excluded(tmp_path: Path):
    model = tiny_pixart()
    recipe = QuantRecipe(include=("transformer_blocks.1",), exclude=("*.to_v",))
    save_transformer(model, quantize_model(model, recipe), tmp_path)
    found = check(load("pixart", tmp_path))
    assert found.problems == () and "excluded by the quantization config" in str(found)


@pytest.mark.parametrize("family", ["qwen-image", "chroma", "flux2", "z-image", "wan", "ltx-video"])
def test_modulation_that_was_to_stay_is_excluded(family: str, tmp_path: Path):
    model = TINY_FAMILIES[family].make()
    model.save_pretrained(tmp_path)
    config = LRQConfig("w4a8", modulation=None)
    found = check(type(model).from_pretrained(tmp_path, quantization_config=config))
    assert found.problems == () and "yet dense" not in str(found)


def test_nothing_quantized_is_a_problem():
    found = check(tiny_pixart())
    assert found.problems == ("no component holds a quantized linear",)
    with pytest.raises(TypeError, match="expected a pipeline or a model, got int"):
        check(3)


def test_a_lora_that_acts_is_none(flux: nn.Module):
    flux.load_lora_adapter(lora_of(flux), prefix=None, adapter_name="style")
    found = check(flux)
    assert found.problems == () and "adapter 'style': active on 18 of 18" in str(found)


def test_adapters_of_other_kinds(flux: nn.Module):
    flux.add_adapter(LoKrConfig(r=4, target_modules=["to_q", "to_k"], init_weights=False), "kron")
    found = check(flux)
    assert found.problems == () and "adapter 'kron': active on 8 of 8" in str(found)
    flux.set_adapters(["kron"], [0.0])
    assert check(flux).problems


def test_a_lora_that_does_nothing_is_a_problem(flux: nn.Module):
    flux.load_lora_adapter(lora_of(flux), prefix=None, adapter_name="style")
    flux.set_adapters(["style"], [0.0])
    assert "adapter 'style' is active with scale 0" in check(flux).problems[0]
    flux.set_adapters(["style"], [1.0])
    flux.disable_lora()
    assert "adapter 'style' is loaded and not active" in check(flux).problems[0]
    flux.enable_lora()
    flux.load_lora_adapter(lora_of(flux, 1), prefix=None, adapter_name="other")
    flux.set_adapters(["other"])
    assert [p for p in check(flux).problems if "'style' is loaded and not active" in p]
    flux.unload_lora()
    flux.peft_config = {"ghost": None}
    assert "adapter 'ghost' is loaded and on no linear" in check(flux).problems[0]


def test_adapters_beside_fused_projections_are_a_problem(flux: nn.Module):
    """PEFT by itself, without the model's methods, passes over what it does not find."""
    model = fuse_projections(flux)
    inject_adapter_in_model(LoraConfig(target_modules=["to_q", "to_out.0"]), model)
    assert any("to q, k and v is lost" in problem for problem in check(model).problems)


def test_a_tensor_on_meta_is_a_problem(model: nn.Module):
    model.proj_out.weight = nn.Parameter(model.proj_out.weight.to("meta"))
    assert "without values: ['proj_out.weight']" in check(model).problems[0]
    assert check(model).problems[0].startswith("model: ")


def test_a_dense_projection_beside_quantized_ones_is_a_problem(flux: nn.Module):
    flux.transformer_blocks[0].attn.to_qkv = nn.Linear(128, 384)
    assert "transformer_blocks.0.attn runs a dense fused" in check(flux).problems[0]


def test_missing_kernels_are_a_problem(monkeypatch: pytest.MonkeyPatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "sm_75, below sm_80" in str(kernels_of(device)[1])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(lrq_kernels, "cuda_library_status", lambda: "not loaded yet")
    assert "the CUDA kernels are not there: not loaded yet" in str(kernels_of(device)[1])
    monkeypatch.setattr(lrq_kernels, "cuda_library_status", lambda: "loaded from x.so")
    assert kernels_of(device)[1] is None
    assert kernels_of(torch.device("mps"))[1] is not None

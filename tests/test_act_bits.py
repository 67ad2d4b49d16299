"""Activation bits while a model runs: A8 or A16 from the same codes, per model and per step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import ModelMixin
from test_lora import add, lora_of
from tiny_models import TINY, assert_same_tensors, linears, load, run, shared_folder
from tiny_models import tiny_pipeline as dense_pipeline
from torch import nn

from lrq_kernels import InputQuantizer, LRQLinear, QuantScheme, get_act_bits, set_act_bits
from lrq_kernels.testing import make_state, relative_error
from lrq_quant import LRQConfig, QuantRecipe, act_bits_by_step, check, fuse_projections
from lrq_quant.demo.pipeline import ShapesPipeline, prompt_generators
from lrq_quant.pipeline_io import quantize_pipeline

F32 = torch.float32
every_model = pytest.mark.parametrize("kind", TINY)


@pytest.fixture(scope="module")
def loaded() -> Callable[[str], nn.Module]:
    done: dict[str, nn.Module] = {}

    def get(kind: str) -> nn.Module:
        if kind not in done:
            done[kind] = load(kind, shared_folder(kind, F32), torch_dtype=F32)
        return copy.deepcopy(done[kind])

    return get


# ---- one linear ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", ["none", "hadamard", "dual"])
@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("rows", [3, 20])  # gemv, and the dequantized weight
def test_a16_has_no_rounding_of_activations(rotation: str, act_bits: int, rows: int):
    scheme = QuantScheme(4, act_bits, rotation, scale_mode="rms", scale_factor=0.3545)
    linear = LRQLinear.from_state(make_state(48, 128, scheme))
    x = torch.randn(rows, 128, dtype=F32)
    exact = nn.functional.linear(x, linear.dense_weight(), linear.bias)
    at_scheme = linear(x)
    set_act_bits(linear, 16)
    assert relative_error(linear(x), exact) < 1e-5 < 1e-3 < relative_error(at_scheme, exact)
    set_act_bits(linear, None)
    assert torch.equal(linear(x), at_scheme)


def test_a4_codes_run_at_8_by_their_absmax():
    """The scale rule of the checkpoint is fitted to 7 levels; at 127 it would waste them."""
    scheme = QuantScheme(4, 4, "hadamard", scale_mode="rms", scale_factor=0.3545)
    linear = LRQLinear.from_state(make_state(48, 128, scheme))
    x = torch.randn(20, 128)
    exact = nn.functional.linear(x, linear.dense_weight(), linear.bias)
    at_4 = relative_error(linear(x), exact)
    set_act_bits(linear, 8)
    assert relative_error(linear(x), exact) < at_4 / 8


def test_a_change_between_two_readers_is_seen():
    """Sharers of an input read one kept result, which must not outlive the change."""
    scheme = QuantScheme(4, 8)
    first = make_state(16, 128, scheme)
    states = [first, make_state(16, 128, scheme, shared_with=("q", first))]
    shared = InputQuantizer(128, scheme, first.smooth_scale, first.rotation)
    block = nn.ModuleList(LRQLinear.from_state(state, shared) for state in states)
    x = torch.randn(20, 128)
    block[0](x)
    set_act_bits(block, 16)
    exact = nn.functional.linear(x, block[1].dense_weight(), block[1].bias)
    assert relative_error(block[1](x), exact) < 1e-5


@pytest.mark.parametrize("bits", [4, 32, "8"])
def test_other_widths_are_refused(bits: object, loaded: Callable):
    with pytest.raises(ValueError, match="act_bits must be 8, 16 or None"):
        set_act_bits(loaded("pixart"), bits)  # type: ignore[arg-type]


def test_a_model_that_has_none_is_refused():
    with pytest.raises(ValueError, match="Linear holds no linear with quantized activations"):
        set_act_bits(nn.Linear(2, 2), 16)
    weight_only = LRQLinear.from_state(make_state(16, 128, QuantScheme(4, 16)))
    with pytest.raises(ValueError, match="holds no linear"):
        set_act_bits(weight_only, 8)


# ---- a model ------------------------------------------------------------------------------------


@every_model
@torch.no_grad()
def test_lrq_act_bits_of_a_transformer(kind: str, loaded: Callable, tmp_path: Path):
    model = loaded(kind)
    at_8, dense = run(model, kind, F32), run(copy.deepcopy(model).dequantize(), kind, F32)
    assert model.lrq_act_bits is None
    model.lrq_act_bits = 16
    assert model.lrq_act_bits == 16 and get_act_bits(model) == 16
    at_16 = run(model, kind, F32)
    # What A16 computes is the dequantized model, up to the order of its sums.
    assert relative_error(at_16, dense) < relative_error(at_8, dense) / 20
    assert "activations run at 16 bits" in str(check(model))
    fuse_projections(model)
    assert relative_error(run(model, kind, F32), at_16) < 1e-4
    # It is no part of the checkpoint.
    model.save_pretrained(tmp_path)
    again = load(kind, tmp_path, torch_dtype=F32)
    assert again.lrq_act_bits is None and torch.equal(run(again, kind, F32), at_8)
    model.lrq_act_bits = None
    assert torch.equal(run(model, kind, F32), at_8)
    assert "activations run at" not in str(check(model))


def test_dense_models_have_no_act_bits():
    model = TINY["pixart"][0]()
    assert isinstance(model, ModelMixin) and model.lrq_act_bits is None
    with pytest.raises(ValueError, match="holds no linear with quantized activations"):
        model.lrq_act_bits = 16


def test_weight_only_linears_stay_so(loaded: Callable):
    model = loaded("flux")
    model.lrq_act_bits = 8
    kinds = {m.input_quantizer.act_bits for n, m in linears(model).items() if "norm" in n}
    assert kinds == {16} and model.lrq_act_bits is None  # 8 is what the scheme says


@torch.no_grad()
def test_under_a_lora(loaded: Callable):
    model = loaded("flux")
    add(model, lora_of(model))
    at_8 = run(model, "flux", F32)
    model.lrq_act_bits = 16
    dense = copy.deepcopy(model)
    dense.unload_lora()
    dense = dense.dequantize()
    add(dense, lora_of(dense))
    expected = run(dense, "flux", F32)
    assert relative_error(run(model, "flux", F32), expected) < 1e-4
    assert relative_error(at_8, expected) > 1e-3
    model.lrq_act_bits = None
    assert torch.equal(run(model, "flux", F32), at_8)


def test_the_state_dict_and_the_codes_do_not_change(loaded: Callable):
    model = loaded("pixart")
    twin = copy.deepcopy(model)
    model.lrq_act_bits = 16
    assert_same_tensors(model, twin)
    assert model.state_dict().keys() == twin.state_dict().keys()


# ---- by step ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> ShapesPipeline:
    folder = tmp_path_factory.mktemp("pipeline") / "q"
    quantize_pipeline(dense_pipeline(), QuantRecipe.from_name("w4a8"), None, folder)
    loaded = ShapesPipeline.from_pretrained(folder, dtype=F32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipeline: ShapesPipeline, **options: object) -> torch.Tensor:
    options = {"num_inference_steps": 3, "output_type": "pt", **options}
    return pipeline(["a red circle"], generator=prompt_generators(1), **options).images


def widths_of_steps(pipeline: ShapesPipeline, **options: object) -> list[int]:
    seen: list[int] = []
    linear = next(m for m in linears(pipeline.transformer).values() if m.scheme.act_bits == 8)
    handle = linear.register_forward_hook(
        lambda module, *_: seen.append(module.input_quantizer.act_bits)
    )
    draw(pipeline, **options)
    handle.remove()
    return seen


def test_every_step_has_its_bits(pipeline: ShapesPipeline):
    assert widths_of_steps(pipeline) == [8, 8, 8]
    with act_bits_by_step(pipeline.transformer, [16, None, 16]) as callback:
        for _ in range(2):  # the second call starts with the first entry again
            assert widths_of_steps(pipeline, callback_on_step_end=callback) == [16, 8, 16]
    assert pipeline.transformer.lrq_act_bits is None
    assert widths_of_steps(pipeline) == [8, 8, 8]


def test_the_picture_follows(pipeline: ShapesPipeline):
    plain = draw(pipeline)
    pipeline.transformer.lrq_act_bits = 16
    at_16 = draw(pipeline)
    with act_bits_by_step(pipeline.transformer, [None] * 3) as callback:
        assert torch.equal(draw(pipeline, callback_on_step_end=callback), plain)
    assert torch.equal(draw(pipeline), at_16)  # as before the with statement
    pipeline.transformer.lrq_act_bits = None
    with act_bits_by_step(pipeline.transformer, [16] * 3) as callback:
        assert torch.equal(draw(pipeline, callback_on_step_end=callback), at_16)
    with act_bits_by_step(pipeline.transformer, [16, 8, 8]) as callback:
        mixed = draw(pipeline, callback_on_step_end=callback)
    assert not torch.equal(mixed, plain) and not torch.equal(mixed, at_16)


def test_an_interrupted_pipeline_leaves_the_model_as_it_was(pipeline: ShapesPipeline):
    with pytest.raises(KeyboardInterrupt):
        with act_bits_by_step(pipeline.transformer, [16, 16]):
            raise KeyboardInterrupt
    assert pipeline.transformer.lrq_act_bits is None


def test_both_signatures_of_callbacks(pipeline: ShapesPipeline):
    """PixArt's pipelines call callback(step, timestep, latents)."""
    model, latents = pipeline.transformer, torch.zeros(1)
    with act_bits_by_step(model, [8, 16]) as callback:
        assert callback(0, torch.tensor(999), latents) is None
        assert model.lrq_act_bits == 16
        assert callback(1, torch.tensor(500), latents) is None
        assert model.lrq_act_bits is None
        assert callback(pipeline, 0, 999, {"latents": latents}) == {"latents": latents}
        assert model.lrq_act_bits == 16


def test_bad_steps_are_named(pipeline: ShapesPipeline):
    for bits in ([], [8, 12]):
        with pytest.raises(ValueError, match="8, 16 or None for every step"):
            act_bits_by_step(pipeline.transformer, bits)
    with act_bits_by_step(pipeline.transformer, [16, 16]) as callback:
        with pytest.raises(ValueError, match="got 2; the pipeline is at step 2"):
            draw(pipeline, callback_on_step_end=callback)


def test_while_loading_too(tmp_path: Path):
    dense = TINY["pixart"][0]()
    dense.save_pretrained(tmp_path)
    model = load("pixart", tmp_path, quantization_config=LRQConfig("w4a8"), torch_dtype=F32)
    model.lrq_act_bits = 16
    assert model.lrq_act_bits == 16

"""LoRA through PEFT on quantized models: it acts as on the dense model, and leaves no trace."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlPipeline, FluxPipeline
from peft import (
    LoraConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from tiny_models import TINY, asks_for_an_accelerator
from torch import Tensor, nn

from lrq_kernels import LRQLinear
from lrq_kernels.testing import relative_error
from lrq_quant import LRQConfig, fuse_projections, fused_projections, unfuse_projections

every_model = pytest.mark.parametrize("kind", TINY)
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "net.2")
RANK = 4
SIZE = 2.5  # of a LoRA's output against its input: more than 30 % of the output of a tiny model
Pair = tuple[nn.Module, nn.Module]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    done: dict[str, Pair] = {}

    def make(kind: str) -> Pair:
        if kind not in done:
            dense, folder = TINY[kind][0](), tmp_path_factory.mktemp(kind)
            dense.save_pretrained(folder)
            options = {"quantization_config": LRQConfig("w4a8"), "torch_dtype": torch.float32}
            done[kind] = (dense, type(dense).from_pretrained(folder, **options))
        return done[kind]

    return make


@pytest.fixture
def pair(kind: str, made: Callable[[str], Pair]) -> Pair:
    """(dense, quantized) with the same weights."""
    return copy.deepcopy(made(kind))


@pytest.fixture
def flux(made: Callable[[str], Pair]) -> Pair:
    return copy.deepcopy(made("flux"))


def lora_of(model: nn.Module, seed: int = 0, prefix: str = "", size: float = SIZE) -> dict:
    """A LoRA on the attention and feed-forward linears of every block, as a file holds it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(TARGETS) and "blocks" in name:
            down = torch.randn(RANK, module.in_features, generator=generator)
            up = torch.randn(module.out_features, RANK, generator=generator)
            tensors[f"{prefix}{name}.lora_A.weight"] = down / module.in_features**0.5
            tensors[f"{prefix}{name}.lora_B.weight"] = up * (size / RANK**0.5)
    return tensors


@torch.no_grad()
def run(model: nn.Module, kind: str) -> Tensor:
    """Outputs for several inputs: one alone leaves the ratio of norms to chance."""
    torch.manual_seed(0)
    return torch.stack([model(**TINY[kind][1](torch.float32))[0].double() for _ in range(8)])


def add(model: nn.Module, tensors: dict[str, Tensor], name: str = "style") -> None:
    if hasattr(model, "load_lora_adapter"):
        model.load_lora_adapter(dict(tensors), prefix=None, adapter_name=name)
        return
    # The class of PixArt has no adapter methods: PEFT alone.
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS))
    inject_adapter_in_model(config, model, adapter_name=name)
    result = set_peft_model_state_dict(model, tensors, adapter_name=name)
    assert not result.unexpected_keys


def assert_acts_alike(pair: Pair, kind: str, change: Callable[[nn.Module], None]) -> None:
    """`change` does to the quantized model's output what it does to the dense one's."""
    before = [run(model, kind) for model in pair]
    for model in pair:
        change(model)
    dense, quantized = (run(m, kind) - b for m, b in zip(pair, before, strict=True))
    assert dense.norm() >= 0.3 * before[0].norm()
    assert abs(float(quantized.norm() / dense.norm()) - 1) <= 0.03
    assert float((quantized * dense).sum() / (quantized.norm() * dense.norm())) >= 0.99


# ---- it acts ------------------------------------------------------------------------------------


@every_model
def test_a_lora_acts_as_on_the_dense_model(kind: str, pair: Pair):
    """Remedy: LRQLinear is an nn.Linear with a weight that has a dtype and a device."""
    tensors = lora_of(pair[0])
    assert_acts_alike(pair, kind, lambda model: add(model, tensors))
    adapted = [m for m in pair[1].modules() if isinstance(m, LoraLayer)]
    assert len(adapted) == len(tensors) // 2
    assert all(isinstance(layer.base_layer, LRQLinear) for layer in adapted)


def test_peft_takes_it_for_a_plain_linear(flux: Pair):
    """Remedy: no buffer is called qweight, by which PEFT would take it for a GPTQ layer."""
    model = flux[1]
    add(model, lora_of(model))
    kinds = {type(m) for m in model.modules() if isinstance(m, LoraLayer)}
    assert kinds == {PeftLinear}
    assert not any("qweight" in name for name, _ in model.named_buffers())


@asks_for_an_accelerator
def test_a_control_lora_widens_the_input(flux: Pair):
    """It asks every linear for the shape of its weight, and doubles that of x_embedder."""
    tensors = lora_of(flux[0], prefix="transformer.")
    embedder = flux[0].x_embedder
    down = torch.randn(RANK, 2 * embedder.in_features) / embedder.in_features**0.5
    tensors["transformer.x_embedder.lora_A.weight"] = down
    tensors["transformer.x_embedder.lora_B.weight"] = torch.randn(embedder.out_features, RANK)

    outputs = []
    for model in flux:
        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        scheduler = FlowMatchEulerDiscreteScheduler()
        pipeline = FluxControlPipeline(scheduler=scheduler, transformer=model, **parts)
        pipeline.load_lora_weights(dict(tensors), adapter_name="control")
        assert model.x_embedder.in_features == 2 * embedder.in_features
        torch.manual_seed(0)
        inputs = TINY["flux"][1](torch.float32)
        inputs["hidden_states"] = torch.cat([inputs["hidden_states"]] * 2, dim=-1)
        with torch.no_grad():
            outputs.append(model(**inputs)[0])
    assert relative_error(outputs[1], outputs[0]) < 0.15


def test_scale_of_a_lora(flux: Pair):
    tensors = lora_of(flux[0], size=2 * SIZE)

    def half(model: nn.Module) -> None:
        add(model, tensors)
        model.set_adapters(["style"], [0.8])

    assert_acts_alike(flux, "flux", half)
    at_half = run(flux[1], "flux")
    flux[1].set_adapters(["style"], [0.0])
    without = run(flux[1], "flux")
    flux[1].set_adapters(["style"], [0.8])
    assert torch.equal(run(flux[1], "flux"), at_half) and not torch.equal(without, at_half)


def test_several_loras_at_once(flux: Pair):
    one, two = lora_of(flux[0], 1, size=2.0), lora_of(flux[0], 2, size=2.0)

    def both(model: nn.Module) -> None:
        add(model, one, "one")
        add(model, two, "two")
        model.set_adapters(["one", "two"], [1.0, 0.7])

    assert_acts_alike(flux, "flux", both)


def test_hot_swap(flux: Pair):
    _, model = flux
    first, second = lora_of(model, 1), lora_of(model, 2)
    add(model, second)
    expected = run(model, "flux")
    model.unload_lora()
    add(model, first)
    model.load_lora_adapter(dict(second), prefix=None, adapter_name="style", hotswap=True)
    assert torch.equal(run(model, "flux"), expected)


@every_model
def test_a_lora_takes_the_dtype_of_the_model(kind: str, made: Callable, tmp_path: Path):
    """Remedy: the dtype of the placeholder. An integer weight would leave the adapter in fp32."""
    dense = made(kind)[0]
    dense.save_pretrained(tmp_path)
    options = {"quantization_config": LRQConfig("w4a8"), "torch_dtype": torch.bfloat16}
    model = type(dense).from_pretrained(tmp_path, **options)
    add(model, lora_of(model))
    adapters = {p.dtype for n, p in model.named_parameters() if "lora_" in n}
    assert adapters == {torch.bfloat16}
    with torch.no_grad():
        assert torch.isfinite(model(**TINY[kind][1](torch.bfloat16))[0]).all()


def test_lora_weights_of_a_flux_pipeline(flux: Pair):
    """Remedy: "weight" in the state dict, where the pipeline's loader looks every target up."""
    tensors = lora_of(flux[0], prefix="transformer.")

    def load(model: nn.Module) -> None:
        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        scheduler = FlowMatchEulerDiscreteScheduler()
        pipeline = FluxPipeline(scheduler=scheduler, transformer=model, **parts)
        pipeline.load_lora_weights(dict(tensors), adapter_name="style")

    assert_acts_alike(flux, "flux", load)


# ---- it leaves ----------------------------------------------------------------------------------


def test_unloading_restores_the_output(flux: Pair):
    model = flux[1]
    before, tensors = run(model, "flux"), {n: b.clone() for n, b in model.named_buffers()}
    add(model, lora_of(model))
    assert not torch.equal(run(model, "flux"), before)
    model.disable_lora()
    assert torch.equal(run(model, "flux"), before)
    model.enable_lora()
    assert not torch.equal(run(model, "flux"), before)
    model.unload_lora()
    assert torch.equal(run(model, "flux"), before)
    after = dict(model.named_buffers())
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[name], tensors[name]) for name in tensors)
    assert not any(isinstance(m, LoraLayer) for m in model.modules())


@pytest.mark.parametrize("safe", [False, True])
def test_fuse_lora_refuses_and_nothing_is_lost(flux: Pair, safe: bool):
    """Remedy: WeightPlaceholder. With a dequantized copy for a weight, merging is dropped without a
    word; with zero strides, safe merging is."""
    model = flux[1]
    before = run(model, "flux")
    add(model, lora_of(model))
    adapted = run(model, "flux")
    with pytest.raises(RuntimeError, match="this linear holds codes.*do not fuse it"):
        model.fuse_lora(safe_fusing=safe)
    model.unfuse_lora()
    assert torch.equal(run(model, "flux"), adapted)
    model.unload_lora()
    assert torch.equal(run(model, "flux"), before)


def test_dora_refuses(flux: Pair):
    """It needs the norm of the weight."""
    config = LoraConfig(r=RANK, target_modules=["to_q"], use_dora=True)
    with pytest.raises(RuntimeError, match="this linear holds codes"):
        flux[1].add_adapter(config)


def test_saving_asks_to_unload_first(flux: Pair, tmp_path: Path):
    model = flux[1]
    add(model, lora_of(model))
    with pytest.raises(ValueError, match=r"unload the adapters \['style'\] before saving"):
        model.save_pretrained(tmp_path)
    layers = get_peft_model_state_dict(model, adapter_name="style")
    FluxPipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers)
    expected = run(model, "flux")
    model.unload_lora()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, torch_dtype=torch.float32)
    again.load_lora_adapter(
        tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors", adapter_name="style"
    )
    assert torch.equal(run(again, "flux"), expected)


# ---- fused projections --------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [False, True])
def test_loading_a_lora_splits_fused_projections(
    flux: Pair, copied: bool, caplog: pytest.LogCaptureFixture
):
    """Remedy: fuse_projections puts a load_lora_adapter on the model that unfuses first. PEFT
    passes over to_q, to_k and to_v, which a fused model does not have."""
    model = flux[1]
    tensors = lora_of(model)
    before = run(model, "flux")
    add(model, tensors)
    expected = run(model, "flux")
    model.unload_lora()
    fuse_projections(model)
    assert fused_projections(model)
    if copied:
        model = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING):
        add(model, tensors)
    assert "separate linears again" in caplog.text and not fused_projections(model)
    assert torch.equal(run(model, "flux"), expected)
    assert bool(fused_projections(flux[1])) == copied
    fuse_projections(model)  # adapters are in the way
    assert torch.equal(run(model, "flux"), expected)
    model.unload_lora()
    fuse_projections(model)
    assert fused_projections(model)
    assert torch.equal(run(model, "flux"), before)


def test_adding_an_adapter_splits_fused_projections(flux: Pair):
    model = fuse_projections(flux[1])
    model.add_adapter(LoraConfig(r=RANK, target_modules=["to_q", "to_k", "to_v"]))
    assert not fused_projections(model)
    names = [name for name, m in model.named_modules() if isinstance(m, LoraLayer)]
    assert sum(name.endswith("to_v") for name in names) == 4  # of every block


def test_a_dense_model_keeps_its_own_methods(flux: Pair):
    dense, model = flux
    fuse_projections(dense)
    assert "load_lora_adapter" not in dense.__dict__
    unfuse_projections(fuse_projections(model))
    assert "load_lora_adapter" not in model.__dict__

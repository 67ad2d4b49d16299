"""Fused projections: lossless, complete, reversible, and never in the way of an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from packaging.version import Version
from tiny_families import TINY_FAMILIES, forward, quantized_family
from tiny_models import (
    DIFFUSERS,
    TINY,
    flux_inputs,
    linears,
    pixart_inputs,
    shared_dense,
    shared_folder,
    tiny_flux,
    tiny_pixart,
)

from lrq_kernels import LRQLinear, checkpoint, load_quantized, model_states
from lrq_quant import (
    QuantRecipe,
    fuse_projections,
    fused_projections,
    quantize_model,
    unfuse_projections,
)
from lrq_quant.pipeline_io import load_transformer, save_transformer

WEIGHTS_ONLY = QuantRecipe.from_name("w4a8")


def sharing(states: dict[str, checkpoint.LinearState]) -> set[frozenset[str]]:
    """Which linears share an input, whichever of them stores it."""
    groups: dict[str, set[str]] = {}
    for name, state in states.items():
        groups.setdefault(state.shared_input or name, set()).add(name)
    return {frozenset(group) for group in groups.values()}


def reader_counts(model: torch.nn.Module) -> dict[str, int]:
    return {name: len(m.input_quantizer.shared.readers) for name, m in linears(model).items()}


# SD3's attention has no fused forward that normalizes queries and keys.
WITH_FUSED = [kind for kind in TINY if kind != "sd3"]


@pytest.mark.parametrize("kind", WITH_FUSED)
@torch.no_grad()
def test_fused_projections_are_lossless(kind: str) -> None:
    model, folder = shared_dense(kind, torch.float32), shared_folder(kind, torch.float32)
    fused = load_transformer(folder, dtype=torch.float32)
    separate = load_transformer(folder, dtype=torch.float32, fuse=False)
    arguments = TINY[kind][1](torch.float32)
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


# Attentions of these have a fused forward; of Wan I2V those that look at add_k_proj have none.
FUSED = {"pixart": 4, "flux": 6, "flux2": 4, "chroma": 4, "wan": 2, "hunyuan-video": 1}
FUSED |= {"wan-vace": 10, "wan-animate": 3}
if DIFFUSERS < Version("0.37"):  # their cross-attention has no such forward yet
    FUSED |= {"wan-vace": 8, "wan-animate": 2}


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_is_fused_only_where_its_processors_use_it(family: str, tmp_path: Path):
    """Remedy: the processor's own code is asked. LTX's attention has the flag and no such code."""
    (model, quantized), given = quantized_family(family), TINY_FAMILIES[family].inputs()
    model = load_quantized(model, quantized.save(tmp_path))
    expected = forward(model, given)
    fuse_projections(model)
    assert len(fused_projections(model)) == FUSED.get(family, 0)
    assert torch.equal(forward(model, given), expected)
    unfuse_projections(model)
    assert torch.equal(forward(model, given), expected)


@torch.no_grad()
def test_cross_attention_fuses_keys_and_values_only() -> None:
    """Queries read the picture, keys and values the caption."""
    fused = fused_projections(load_transformer(shared_folder("pixart", torch.float32)))
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
    assert attention.to_q.input_quantizer.shared is attention.to_v.input_quantizer.shared
    assert torch.isfinite(loaded(**pixart_inputs(torch.float32))[0]).all()


@pytest.mark.parametrize("kind", TINY)
@torch.no_grad()
def test_unfusing_restores_every_linear(kind: str) -> None:
    folder = shared_folder(kind, torch.float32)
    separate = load_transformer(folder, dtype=torch.float32, fuse=False)
    model = load_transformer(folder, dtype=torch.float32, fuse=True)
    for _ in range(2):
        unfuse_projections(model)
        assert not fused_projections(model)
        expected, found = dict(separate.named_buffers()), dict(model.named_buffers())
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        kinds = [type(getattr(m, "processor", None)) for m in separate.modules()]
        order = dict(zip([n for n, _ in separate.named_modules()], kinds, strict=True))
        assert all(
            type(getattr(m, "processor", None)) is order[n] for n, m in model.named_modules()
        )
        assert reader_counts(model) == reader_counts(separate)
        arguments = TINY[kind][1](torch.float32)
        assert torch.equal(model(**arguments)[0], separate(**arguments)[0])
        fuse_projections(model)
    unfuse_projections(separate)  # what is not fused stays


@pytest.mark.parametrize("kind", ["flux", "pixart"])
def test_diffusers_own_fusing_refuses(kind: str) -> None:
    """Remedy: WeightPlaceholder. diffusers would build a dense layer, of zeros or dequantized."""
    loaded = load_transformer(shared_folder(kind, torch.float32), fuse=False)
    with pytest.raises(RuntimeError, match="lrq_quant.fuse_projections"):
        loaded.fuse_qkv_projections()


@torch.no_grad()
def test_diffusers_own_unfusing_does_no_harm() -> None:
    """Remedy: _supports_qkv_fusion False on what is fused. diffusers would delete to_qkv, the only
    holder of the weights."""
    fused = load_transformer(shared_folder("flux", torch.float32), dtype=torch.float32, fuse=True)
    arguments = flux_inputs(torch.float32)
    expected, names = fused(**arguments)[0], fused_projections(fused)
    fused.unfuse_qkv_projections()
    for module in fused.modules():
        if hasattr(module, "unfuse_projections"):
            module.unfuse_projections()
    assert fused_projections(fused) == names
    assert torch.equal(fused(**arguments)[0], expected)
    assert torch.equal(unfuse_projections(fused)(**arguments)[0], expected)

"""lrq inside transformers: text encoders quantized while they load, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, PipelineQuantizationConfig
from tiny_models import assert_same_tensors, linears, rewrite, tiny_flux
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2Config,
    Qwen2Model,
    T5Config,
    T5EncoderModel,
)
from transformers.quantizers import auto

from lrq_kernels import CheckpointError, checkpoint
from lrq_kernels.testing import relative_error
from lrq_quant import LRQConfig, QuantRecipe, check, quantize_model
from lrq_quant.transformers_backend import LRQHfQuantizer

BF16, F32 = torch.bfloat16, torch.float32
SIZES = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 128}


def t5() -> nn.Module:
    return T5EncoderModel(
        T5Config(
            vocab_size=50,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


def with_biases(model: nn.Module) -> nn.Module:
    """They start at zero, where one that was lost does not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def qwen() -> nn.Module:
    """Biases on q, k and v; two heads of keys; a rotary buffer that no checkpoint holds."""
    return with_biases(
        Qwen2Model(
            Qwen2Config(**SIZES, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
        )
    )


def clip() -> nn.Module:
    tokens = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    return with_biases(
        CLIPTextModel(
            CLIPTextConfig(
                **SIZES,
                **tokens,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=16,
            )
        )
    )


ENCODERS: dict[str, Callable[[], nn.Module]] = {"t5": t5, "qwen": qwen, "clip": clip}
every_encoder = pytest.mark.parametrize("kind", ENCODERS)


@torch.no_grad()
def encode(model: nn.Module) -> Tensor:
    torch.manual_seed(0)
    return model(torch.randint(3, 50, (2, 9)))[0]


def saved(kind: str, folder: Path, dtype: torch.dtype = BF16, **options: object) -> nn.Module:
    model = ENCODERS[kind]().eval().to(dtype)
    model.save_pretrained(folder, **options)
    return model


def test_both_tables_of_transformers_know_it():
    assert auto.AUTO_QUANTIZER_MAPPING["lrq"] is LRQHfQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["lrq"] is LRQConfig


@every_encoder
@pytest.mark.parametrize("shard_size", [None, "40KB"])
def test_on_the_fly_equals_quantizing_first(kind: str, shard_size: str | None, tmp_path: Path):
    """transformers would initialize modules that it takes for missing: biases to zero."""
    sharded = {"max_shard_size": shard_size} if shard_size else {}
    dense = saved(kind, tmp_path, **sharded)
    model = type(dense).from_pretrained(tmp_path, quantization_config=LRQConfig("w4a8"), dtype=BF16)
    expected, found = quantize_model(dense, QuantRecipe.from_name("w4a8")), linears(model)
    assert found.keys() == expected.states.keys() and len(found) >= 12
    for name, linear in found.items():
        state, other = linear.to_state(), expected.states[name]
        for field in ("codes", "levels", "weight_scale"):
            assert torch.equal(getattr(state, field), getattr(other, field)), (name, field)
        assert (state.bias is None) == (other.bias is None)
        assert state.bias is None or torch.equal(state.bias, other.bias), name
    assert 0 < relative_error(encode(model), encode(dense)) < 0.3
    assert not [n for n, t in model.state_dict().items() if t.is_meta]


@every_encoder
@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32])
@pytest.mark.parametrize("shard_size", [None, "40KB"])
def test_save_and_reload_is_bit_identical(
    kind: str, dtype: torch.dtype, shard_size: str | None, tmp_path: Path
):
    dense = saved(kind, tmp_path / "dense", dtype)
    config = LRQConfig("w4a8")
    model = type(dense).from_pretrained(tmp_path / "dense", quantization_config=config, dtype=dtype)
    sharded = {"max_shard_size": shard_size} if shard_size else {}
    model.save_pretrained(tmp_path / "q", **sharded)
    stored = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert stored == config.to_dict()
    again = type(dense).from_pretrained(tmp_path / "q", dtype=dtype)
    assert_same_tensors(again, model)
    assert torch.equal(encode(again), encode(model))
    assert again.is_quantized and not again.training


def test_float_data_survives_another_dtype(tmp_path: Path):
    """Remedy: int32 views of fp32."""
    dense = saved("qwen", tmp_path / "dense", F32)
    config = LRQConfig("w4a8")
    model = type(dense).from_pretrained(tmp_path / "dense", quantization_config=config, dtype=F32)
    model.save_pretrained(tmp_path / "q")
    half = linears(type(dense).from_pretrained(tmp_path / "q", dtype=BF16))
    for name, linear in linears(model).items():
        assert torch.equal(linear.weight_scale, half[name].weight_scale)
        assert linear.bias is None or torch.equal(linear.bias, half[name].bias)
        assert half[name].weight.dtype == BF16


def test_what_is_tied_is_stored_once(tmp_path: Path):
    saved("t5", tmp_path / "dense")
    options = {"quantization_config": LRQConfig("w4a8"), "dtype": BF16}
    model = T5EncoderModel.from_pretrained(tmp_path / "dense", **options)
    model.save_pretrained(tmp_path / "q")
    header = checkpoint.read_header([tmp_path / "q" / "model.safetensors"])
    assert {"shared.weight", "encoder.embed_tokens.weight"} & header.dense() == {"shared.weight"}
    again = T5EncoderModel.from_pretrained(tmp_path / "q", dtype=BF16)
    assert again.encoder.embed_tokens.weight is again.shared.weight


def test_config_decides_what_is_converted(tmp_path: Path):
    saved("t5", tmp_path)
    config = LRQConfig(
        "w4a16",
        modules_to_not_convert=["encoder.block.0"],
        overrides={"*.wo": "w3a8", "*.SelfAttention.o": None},
    )
    plan = config.plan(t5())
    model = T5EncoderModel.from_pretrained(tmp_path, quantization_config=config, dtype=BF16)
    found = linears(model)
    assert found.keys() == {linear.name for linear in plan.linears}
    assert {m.scheme.name for n, m in found.items() if n.endswith("wo")} == {"w3a8"}
    assert {m.scheme.name for n, m in found.items() if n.endswith("SelfAttention.q")} == {"w4a16"}
    assert not any("block.0." in n or n.endswith(".o") for n in found)
    attention = model.encoder.block[1].layer[0].SelfAttention
    assert attention.q.input_quantizer.shared is attention.v.input_quantizer.shared


def test_what_overflows_fp16_stays_in_fp32(tmp_path: Path):
    """T5 keeps wo in fp32 under fp16."""
    saved("t5", tmp_path / "dense", F32)
    options = {"quantization_config": LRQConfig("w4a8"), "dtype": torch.float16}
    model = T5EncoderModel.from_pretrained(tmp_path / "dense", **options)
    assert not any(name.endswith("wo") for name in linears(model))
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert wo.weight.dtype == F32
    model.save_pretrained(tmp_path / "q")
    again = T5EncoderModel.from_pretrained(tmp_path / "q", dtype=torch.float16)
    assert torch.equal(encode(again), encode(model))


def test_a_model_without_such_linears_is_refused(tmp_path: Path):
    sizes = {**SIZES, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nothing to quantize in BertModel"):
        BertModel.from_pretrained(tmp_path, quantization_config=LRQConfig("w4a8"))


@every_encoder
def test_dequantize(kind: str, tmp_path: Path):
    dense = saved(kind, tmp_path, F32)
    model = type(dense).from_pretrained(tmp_path, quantization_config=LRQConfig("w4a8"), dtype=F32)
    before = encode(model)
    after = model.dequantize()
    assert not linears(after) and not after.is_quantized
    assert relative_error(encode(after), before) < 0.05


# ---- damaged folders ----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved("t5", tmp_path / "dense")
    options = {"quantization_config": LRQConfig("w4a8"), "dtype": BF16}
    model = T5EncoderModel.from_pretrained(tmp_path / "dense", **options)
    model.save_pretrained(tmp_path / "q")
    return tmp_path / "q"


def load_t5(folder: Path) -> nn.Module:
    return T5EncoderModel.from_pretrained(folder, dtype=BF16)


def test_a_missing_tensor_is_named_with_its_file(folder: Path):
    file, lost = folder / "model.safetensors", []
    rewrite(file, lambda tensors: lost.append(tensors.popitem()[0]))
    with pytest.raises(CheckpointError, match=rf"{file.name}.*{lost[0]}"):
        load_t5(folder)


def test_a_changed_tensor_is_named_with_its_file(folder: Path):
    name = "encoder.final_layer_norm.weight"

    def change(tensors: dict) -> None:
        tensors[name] = tensors[name] + 1

    rewrite(folder / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=f"model.safetensors: {name} was altered"):
        load_t5(folder)


def test_a_truncated_file_and_a_newer_version_are_named(folder: Path):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises((CheckpointError, OSError), match=r"model\.safetensors"):
        load_t5(folder)
    file.write_bytes(whole)
    rewrite(file, version="7")
    with pytest.raises(CheckpointError, match=r"model.safetensors has format version 7;"):
        load_t5(folder)


def test_a_foreign_checkpoint_is_named(folder: Path):
    config = (folder / "config.json").read_text()
    t5().save_pretrained(folder)
    (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="model.safetensors: format must be 'lrq', got 'pt'"):
        load_t5(folder)


def test_renamed_tensors_are_not_saved(folder: Path, tmp_path: Path):
    """transformers writes some classes under older names, which the header would not know."""
    model = load_t5(folder)
    model._weight_conversions = ["a renaming"]
    with pytest.raises(ValueError, match="T5EncoderModel cannot be saved"):
        model.save_pretrained(tmp_path / "again")


# ---- in a pipeline ------------------------------------------------------------------------------


MAPPING = {"transformer": LRQConfig("w4a8"), "text_encoder_2": LRQConfig("w4a16")}


@pytest.mark.parametrize("by_name", [False, True])
def test_transformer_and_text_encoder_of_a_pipeline(by_name: bool, tmp_path: Path):
    """By backend name too: both libraries know one class, so the signatures that diffusers compares
    are equal."""
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "tokenizer_2"))
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=tiny_flux(),
        text_encoder_2=t5(),
        **parts,
    )
    pipeline.save_pretrained(tmp_path / "dense")
    config = PipelineQuantizationConfig(quant_mapping=MAPPING)
    if by_name:
        config = PipelineQuantizationConfig(
            quant_backend="lrq",
            quant_kwargs={"scheme": "w4a16"},
            components_to_quantize=list(MAPPING),
        )
    parts |= dict.fromkeys(("feature_extractor", "image_encoder"))
    loaded = FluxPipeline.from_pretrained(
        tmp_path / "dense", quantization_config=config, torch_dtype=BF16, **parts
    )
    assert {m.scheme.name for m in linears(loaded.text_encoder_2).values()} == {"w4a16"}
    assert linears(loaded.transformer)
    found = check(loaded)
    assert found.problems == () and "text_encoder_2 (T5EncoderModel): 14 quantized" in str(found)
    loaded.save_pretrained(tmp_path / "q")
    again = FluxPipeline.from_pretrained(tmp_path / "q", torch_dtype=BF16, **parts)
    assert torch.equal(encode(again.text_encoder_2), encode(loaded.text_encoder_2))
    assert_same_tensors(again.transformer, loaded.transformer)

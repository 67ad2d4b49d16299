"""lrq inside diffusers: what from_pretrained and save_pretrained do with a quantized model.

In the shape of diffusers' own quantization tests, on tiny random instances of real classes. A test
of a known trap names its remedy.
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.quantizers import auto
from safetensors import safe_open
from tiny_models import (
    BF16,
    TINY,
    all_tensors,
    assert_same_tensors,
    linears,
    load,
    model_class,
    rewrite,
    run,
    shared_folder,
    tiny_pipeline,
    tiny_pixart,
)
from torch import nn

import lrq_kernels
from lrq_kernels import CheckpointError, QuantScheme, checkpoint
from lrq_kernels.checkpoint import FILE_NAME, INDEX_NAME
from lrq_kernels.testing import relative_error
from lrq_quant import LRQConfig, QuantRecipe, fuse_projections
from lrq_quant.demo.pipeline import ShapesPipeline, prompt_generators
from lrq_quant.diffusers_backend import LRQQuantizer
from lrq_quant.pipeline_io import quantize_pipeline

ROOT = Path(__file__).resolve().parents[1]
every_model = pytest.mark.parametrize("kind", TINY)


@pytest.fixture
def folders() -> dict[str, Path]:
    """Quantized folders that tests only read."""
    return {kind: shared_folder(kind) for kind in TINY}


# ---- registration -------------------------------------------------------------------------------


def test_both_tables_of_diffusers_know_it():
    assert auto.AUTO_QUANTIZER_MAPPING["lrq"] is LRQQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["lrq"] is LRQConfig


# ---- configuration ------------------------------------------------------------------------------


CONFIGS = (
    LRQConfig(),
    LRQConfig("w3a4", modulation=None, modules_to_not_convert=["proj_out", "*.ff.*"]),
    LRQConfig(
        QuantScheme(2, 8, "hadamard", 256),
        modulation=QuantScheme(4, 16),
        overrides={"a.*": "w4a16", "b": None, "c": QuantScheme(4, 8, "none")},
    ),
)


@pytest.mark.parametrize("config", CONFIGS)
def test_config_round_trips_through_json(config: LRQConfig):
    text = json.dumps(config.to_dict())
    again = LRQConfig.from_dict(json.loads(text))
    assert again.__dict__ == config.__dict__
    assert auto.DiffusersAutoQuantizer.from_dict(json.loads(text)).__dict__ == config.__dict__
    assert json.loads(config.to_json_string(use_diff=False)) == json.loads(text)


def test_config_has_a_repr_and_an_enum_member():
    """Remedy: to_diff_dict, which the base class calls and lacks; a str-Enum, for .value."""
    assert "w3a4" in repr(LRQConfig("w3a4")) and "scheme" not in repr(LRQConfig())
    assert LRQConfig().quant_method.value == LRQConfig().quant_method == "lrq"


def test_config_of_another_version_is_refused_with_both():
    with pytest.raises(CheckpointError, match="version 99; this package reads versions 1, 2, 3"):
        LRQConfig.from_dict({"quant_method": "lrq", "format_version": 99})


def test_unknown_keys_warn_and_unknown_arguments_raise(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        config = LRQConfig.from_dict({"scheme": "w3a8", "invented_later": 1})
    assert config.scheme.weight_bits == 3 and "invented_later" in caplog.text
    with pytest.raises(TypeError, match="modulos"):
        LRQConfig("w4a8", modulos=[])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scheme": "w5a8"}, ValueError, "weight_bits must be one of"),
        ({"scheme": None}, ValueError, "must be a scheme"),
        ({"scheme": 4}, TypeError, "must be a name, a QuantScheme or a dict, got 4"),
        ({"modules_to_not_convert": "proj_out"}, TypeError, "must be a list of patterns"),
        ({"quant_method": "gguf"}, ValueError, "quant_method must be 'lrq', got 'gguf'"),
    ],
)
def test_bad_configs_are_refused(arguments: dict, error: type, message: str):
    with pytest.raises(error, match=message):
        LRQConfig(**arguments)


def test_plan_is_printable_before_anything_is_loaded():
    with torch.device("meta"):
        model = tiny_pixart()
    config = LRQConfig(
        "w4a8",
        modules_to_not_convert=["transformer_blocks.0", "*.attn2.to_q"],
        overrides={"transformer_blocks.1.ff": "w3a8", "*.ff.net.2": None},
    )
    plan = config.plan(model)
    schemes = {linear.name: linear.scheme.name for linear in plan.linears}
    kept = {k.name for k in plan.kept}
    assert schemes["transformer_blocks.1.attn1.to_q"] == "w4a8"
    # The first override that matches wins, and a module's name holds for what is in it.
    assert schemes["transformer_blocks.1.ff.net.0.proj"] == "w3a8"
    assert schemes["transformer_blocks.1.ff.net.2"] == "w3a8"
    assert not any(name.startswith("transformer_blocks.0.") for name in schemes)
    assert "transformer_blocks.1.attn2.to_q" in kept
    assert "w3a8" in plan.summary() and "excluded by the recipe" in plan.summary()


@pytest.mark.parametrize("argument", ["modules_to_not_convert", "overrides"])
def test_a_pattern_that_matches_nothing_is_named(argument: str):
    patterns = {"modules_to_not_convert": ["typo.*"], "overrides": {"typo.*": None}}[argument]
    with pytest.raises(ValueError, match=rf"{argument}: pattern 'typo\.\*' matches no linear"):
        LRQConfig(**{argument: patterns}).plan(tiny_pixart())


def test_a_diffusers_that_was_not_tried_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_pixart().save_pretrained(tmp_path)
    monkeypatch.setattr(diffusers, "__version__", "0.35.2")
    with pytest.raises(ImportError, match="diffusers must be 0.36 or newer, got 0.35.2"):
        load("pixart", tmp_path, quantization_config=LRQConfig("w4a8"))


# ---- a quantized folder -------------------------------------------------------------------------


@every_model
def test_from_pretrained_equals_load_quantized(kind: str, folders: dict[str, Path]):
    model = load(kind, folders[kind])
    by_hand = lrq_kernels.load_quantized(TINY[kind][0](), folders[kind], dtype=BF16)
    assert len(linears(model)) == len(linears(by_hand)) > 10
    assert_same_tensors(model, by_hand)
    assert torch.equal(run(model, kind), run(by_hand, kind))
    assert model.is_quantized and model.quantization_method == "lrq" and not model.training


@every_model
@pytest.mark.parametrize("shard_size", [None, "50KB"])
@pytest.mark.parametrize("fused", [False, True])
def test_save_and_reload_is_bit_identical(
    kind: str, shard_size: str | None, fused: bool, folders: dict[str, Path], tmp_path: Path
):
    model = load(kind, folders[kind])
    expected = run(model, kind)
    if fused:
        fuse_projections(model)
    model.save_pretrained(tmp_path, **({"max_shard_size": shard_size} if shard_size else {}))
    assert (tmp_path / INDEX_NAME).exists() == (shard_size is not None)
    again = load(kind, tmp_path)
    assert_same_tensors(again, load(kind, folders[kind]))
    assert torch.equal(run(again, kind), expected)
    # One format: what diffusers wrote is what lrq_kernels reads.
    by_hand = lrq_kernels.load_quantized(TINY[kind][0](), tmp_path, dtype=BF16)
    assert torch.equal(run(by_hand, kind), expected)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config == LRQConfig("w4a8").to_dict()


@every_model
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32, None])
def test_float_data_survives_any_dtype(
    kind: str, dtype: torch.dtype | None, folders: dict[str, Path]
):
    """Remedy: int32 views of fp32. The loader casts every floating tensor to torch_dtype."""
    model = load(kind, folders[kind], torch_dtype=dtype)
    states = checkpoint.load(folders[kind]).states
    for name, linear in linears(model).items():
        state = linear.to_state()
        assert torch.equal(state.weight_scale, states[name].weight_scale), name
        assert state.bias is None or torch.equal(state.bias, states[name].bias), name
    wanted = dtype or torch.float32
    assert model.dtype == wanted
    assert {linear.weight.dtype for linear in linears(model).values()} == {wanted}
    kept = set(model._keep_in_fp32_modules or ())  # Wan's norms and tables
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    assert all(
        dtype == (torch.float32 if kept & set(name.split(".")) else wanted)
        for name, dtype in dtypes.items()
    )
    assert torch.isfinite(run(model, kind, wanted)).all()


@every_model
def test_nothing_is_left_on_meta(kind: str, folders: dict[str, Path], tmp_path: Path):
    """Remedy: PendingLinear has the names of the checkpoint; the loader skips names that the model
    does not have, without a word."""
    load(kind, folders[kind]).save_pretrained(tmp_path, max_shard_size="50KB")
    for folder in (folders[kind], tmp_path):
        model = load(kind, folder)
        assert not [name for name, tensor in all_tensors(model).items() if tensor.is_meta]


def test_sharing_of_inputs_survives(folders: dict[str, Path]):
    block = load("flux", folders["flux"]).single_transformer_blocks[0]
    readers = (block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp)
    assert len({id(linear.input_quantizer.shared) for linear in readers}) == 1
    assert len(readers[0].input_quantizer.shared.readers) == 4


def test_users_config_is_ignored_for_a_quantized_folder(folders: dict[str, Path]):
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = load("pixart", folders["pixart"], quantization_config=LRQConfig("w2a8"))
    assert {m.scheme.weight_bits for m in linears(model).values()} == {4}


@every_model
def test_casting_a_quantized_model_is_refused(kind: str, folders: dict[str, Path]):
    model = load(kind, folders[kind])
    for cast in (lambda: model.to(torch.float16), model.half, model.float):
        with pytest.raises(ValueError):
            cast()
    model.to("cpu")


@every_model
@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_map(kind: str, device_map: object, folders: dict[str, Path]):
    if device_map == "auto" and not torch.cuda.is_available():
        device_map = "balanced"
    model = load(kind, folders[kind], device_map=device_map)
    expected = run(load(kind, folders[kind]), kind)
    assert torch.equal(run(model, kind), expected)


def test_device_map_to_disk_is_refused(folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(ValueError, match="device_map must not put"):
        load("pixart", folders["pixart"], device_map={"": "disk"}, offload_folder=tmp_path)


def test_low_cpu_mem_usage_and_float8_are_refused(folders: dict[str, Path]):
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        load("pixart", folders["pixart"], low_cpu_mem_usage=False)
    with pytest.raises(ValueError, match="lrq: torch_dtype must be one of"):
        load("pixart", folders["pixart"], torch_dtype=torch.float8_e4m3fn)


@every_model
def test_memory_footprint_and_parameters(kind: str, folders: dict[str, Path]):
    model, dense = load(kind, folders[kind]), TINY[kind][0]().to(BF16)
    plan = LRQConfig("w4a8").plan(dense)
    kept = sum(p.numel() for p in dense.parameters()) - sum(
        linear.out_features * linear.in_features + linear.out_features for linear in plan.linears
    )
    assert model.num_parameters() == kept
    assert model.get_memory_footprint() < 0.75 * dense.get_memory_footprint()


def test_a_copied_model_saves_itself(folders: dict[str, Path], tmp_path: Path):
    """Remedy: the quantizer of a copy points at the copy."""
    model = load("pixart", folders["pixart"])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.proj_out.weight.zero_()
    twin.save_pretrained(tmp_path)
    assert not load("pixart", tmp_path).proj_out.weight.any()
    assert load("pixart", folders["pixart"]).proj_out.weight.any()


def test_saving_over_the_folder_it_came_from(folders: dict[str, Path], tmp_path: Path):
    """Remedy: dense tensors are copied. As views of the file they would change with it."""
    load("pixart", folders["pixart"]).save_pretrained(tmp_path)
    model = load("pixart", tmp_path)
    expected = run(model, "pixart")
    with torch.no_grad():
        other = copy.deepcopy(model)
        other.proj_out.weight.zero_()
    other.save_pretrained(tmp_path)
    assert torch.equal(run(model, "pixart"), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(load("pixart", tmp_path), "pixart"), expected)


@every_model
def test_reload_is_bit_identical_in_fp32_on_any_address(
    kind: str, folders: dict[str, Path], tmp_path: Path
):
    """Remedy: the same copy. MKL rounds by the alignment of its operands."""
    model = load(kind, folders[kind], torch_dtype=torch.float32)
    expected = run(model, kind, torch.float32)
    for pad in range(0, 64, 8):
        folder = tmp_path / str(pad)
        model.save_pretrained(folder)
        rewrite(folder / FILE_NAME, padding="x" * pad)
        again = load(kind, folder, torch_dtype=torch.float32)
        assert torch.equal(run(again, kind, torch.float32), expected), pad


def test_saving_as_pickle_is_refused(folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(ValueError, match="safetensors alone"):
        load("pixart", folders["pixart"]).save_pretrained(tmp_path, safe_serialization=False)


# ---- damaged folders ----------------------------------------------------------------------------


@pytest.fixture
def sharded(folders: dict[str, Path], tmp_path: Path) -> Path:
    load("pixart", folders["pixart"]).save_pretrained(tmp_path, max_shard_size="50KB")
    return tmp_path


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-of-*.safetensors"))


def test_a_truncated_shard_is_named_with_its_tensor(sharded: Path):
    file = shards(sharded)[1]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{file.name} is truncated at [\w.]+:"):
        load("pixart", sharded)


def test_a_truncated_single_file_is_named(folders: dict[str, Path], tmp_path: Path):
    load("pixart", folders["pixart"]).save_pretrained(tmp_path)
    file = tmp_path / FILE_NAME
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises((OSError, CheckpointError), match=FILE_NAME):
        load("pixart", tmp_path)


def test_a_missing_key_is_named_with_its_file(sharded: Path):
    lost: list[str] = []
    rewrite(shards(sharded)[0], lambda tensors: lost.append(tensors.popitem()[0]))
    with pytest.raises(CheckpointError, match=rf"{shards(sharded)[0].name}.*{lost[0]}"):
        load("pixart", sharded)


def test_a_changed_tensor_is_named_with_its_file(sharded: Path):
    """Remedy: checked before the loader casts dense tensors."""
    for name in ("proj_out.weight", "transformer_blocks.1.attn1.to_k.levels"):
        (file,) = [f for f in shards(sharded) if name in safe_open(f, "pt").keys()]  # noqa: SIM118
        before = file.read_bytes()

        def change(tensors: dict, name: str = name) -> None:
            tensors[name] = tensors[name].clone()
            tensors[name].view(-1)[0] = 100

        rewrite(file, change)
        with pytest.raises(CheckpointError, match=f"{file.name}: {name} was altered"):
            load("pixart", sharded)
        file.write_bytes(before)


def test_a_foreign_checkpoint_is_named(folders: dict[str, Path], tmp_path: Path):
    tiny_pixart().save_pretrained(tmp_path)
    config = (folders["pixart"] / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=f"{FILE_NAME}: format must be 'lrq', got 'pt'"):
        load("pixart", tmp_path)


def test_a_newer_version_is_named(sharded: Path):
    rewrite(shards(sharded)[0], version="7")
    with pytest.raises(CheckpointError, match=f"{shards(sharded)[0].name} has format version 7;"):
        load("pixart", sharded)


def test_a_checkpoint_of_another_model_is_refused(folders: dict[str, Path], tmp_path: Path):
    load("pixart", folders["pixart"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    with pytest.raises(CheckpointError, match="missing"):
        load("pixart", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 8}))
    with pytest.raises(CheckpointError, match=r"to_q: \(out_features, in_features, bias\) must"):
        load("pixart", tmp_path)


# ---- the way back, and pipelines ----------------------------------------------------------------


@every_model
@torch.no_grad()
def test_dequantize_gives_a_dense_model(kind: str, folders: dict[str, Path], tmp_path: Path):
    model = load(kind, folders[kind], torch_dtype=torch.float32)
    before = run(model, kind, torch.float32)
    fuse_projections(model)
    dense = model.dequantize()
    assert not linears(dense) and not dense.is_quantized
    assert {m.weight.dtype for m in dense.modules() if isinstance(m, nn.Linear)} == {torch.float32}
    after = run(dense, kind, torch.float32)
    # What is left is the rounding of activations.
    assert float((after - before).norm() / before.norm()) < 0.05
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = model_class(kind).from_pretrained(tmp_path)
    assert_same_tensors(again, dense)
    # Views of the file lie on odd addresses, by which matrix products on the CPU round.
    assert relative_error(run(again, kind, torch.float32), after) < 1e-5


def pictures(pipeline: DiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a red circle left of a blue square", "a blue circle above a red square"]
    options = {"num_inference_steps": 2, "output_type": "pt"}
    return pipeline(prompts, generator=prompt_generators(2), **options).images


def test_pipeline_folder_through_plain_diffusers(tmp_path: Path):
    pipeline = tiny_pipeline()
    quantize_pipeline(pipeline, QuantRecipe.from_name("w4a8"), None, tmp_path / "q")
    loaded = ShapesPipeline.from_pretrained(tmp_path / "q", torch_dtype=BF16)
    assert linears(loaded.transformer) and loaded.transformer.dtype == BF16
    drawn = pictures(loaded)
    loaded.save_pretrained(tmp_path / "again")
    again = ShapesPipeline.from_pretrained(tmp_path / "again", torch_dtype=BF16)
    assert torch.equal(pictures(again), drawn)
    both = {"transformer": again.transformer}
    assert torch.equal(
        pictures(ShapesPipeline.from_pretrained(tmp_path / "q", torch_dtype=BF16, **both)), drawn
    )

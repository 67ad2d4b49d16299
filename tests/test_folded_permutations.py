"""Permutations folded into what makes an input: the same bits and checkpoint, and the way back."""

from __future__ import annotations

import copy
import json
import pickle
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from test_lora import lora_of
from tiny_families import TINY_FAMILIES, forward, quantized_family
from tiny_models import TINY, linears, load
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lrq_quant
from lrq_kernels import (
    LRQLinear,
    QuantScheme,
    checkpoint,
    load_quantized,
    model_states,
    set_act_bits,
)
from lrq_kernels.rotation import Rotation
from lrq_kernels.row_order import order_rows, restore_order, restore_rows
from lrq_kernels.testing import make_state, sqnr_db
from lrq_quant import (
    CalibrationOptions,
    QuantRecipe,
    SearchOptions,
    fold_permutations,
    folded_permutations,
    fuse_blocks,
    fused_blocks,
    quantize_model,
    unfold_permutations,
    unfuse_blocks,
)
from lrq_quant.input_makers import MOVES_HEADS, OF_ATTENTION, OF_STREAM, makers_by_name
from lrq_quant.pipeline_io import save_transformer

KINDS = ("flux", "pixart")
every_kind = pytest.mark.parametrize("kind", KINDS)
# Every rotation permuted; of those that are possible, the one that can be folded.
PERMUTED = SearchOptions(
    rotations=("permuted",), alphas=(0.5,), tolerance=1e9, sample_rows=64, weight_rows=32
)
FOLDED = {
    "flux": {
        **{
            f"transformer_blocks.{i}.{ff}.net.2": (f"transformer_blocks.{i}.{ff}.net.0.proj",)
            for i in range(2)
            for ff in ("ff", "ff_context")
        },
        **{
            f"single_transformer_blocks.{i}.proj_out": (f"single_transformer_blocks.{i}.proj_mlp",)
            for i in range(2)
        },
    },
    "pixart": {
        f"transformer_blocks.{i}.ff.net.2": (f"transformer_blocks.{i}.ff.net.0.proj",)
        for i in range(2)
    },
}


def calibrated(model: nn.Module, inputs: Callable[[], dict], scheme: str) -> Any:
    """`model` quantized by what it does on random inputs, which follow the prompts."""

    def run(prompts: list[str]) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(repr(prompts).encode()))
            forward(model, inputs())

    recipe = QuantRecipe.from_name(
        scheme, search=PERMUTED, calibration=CalibrationOptions(sample_rows=64)
    )
    return quantize_model(model, recipe, run=run, prompts=["a", "b"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., nn.Module]:
    folders: dict[tuple[str, str], Path] = {}

    def get(kind: str, scheme: str = "w4a8", dtype: torch.dtype = torch.float32) -> nn.Module:
        key = (kind, scheme)
        if key not in folders:
            model, inputs = TINY[kind]
            dense, folder = model(), tmp_path_factory.mktemp(f"{kind}-{scheme}")
            quantized = calibrated(dense, lambda: inputs(torch.float32), scheme)
            save_transformer(dense, quantized, folder)
            folders[key] = folder
        return load(kind, folders[key], torch_dtype=dtype).eval()

    return get


def inputs_of(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return TINY[kind][1](dtype)


def folded_into(model: nn.Module) -> dict[str, tuple[str, ...]]:
    return {name: place.into for name, place in folded_permutations(model).items() if place.into}


def reasons(model: nn.Module) -> dict[str, str | None]:
    return {name: place.why for name, place in folded_permutations(model).items()}


class Gathers(TorchDispatchMode):
    """Counts the calls of ours that permute their input."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "lrq":
            names = [argument.name for argument in func._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            self.count += given.get("permutation") is not None
        return func(*args, **(kwargs or {}))


def gathers(model: nn.Module, given: dict[str, Any]) -> tuple[torch.Tensor, int]:
    with Gathers() as seen:
        out = forward(model, given)
    return out, seen.count


# ---- the same bits ------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        ("w4a8", torch.float32),
        ("w4a4", torch.bfloat16),
        ("w3a16", torch.bfloat16),
    ],
)
def test_the_folded_model_computes_the_same(
    kind: str, scheme: str, dtype: torch.dtype, made: Callable
):
    model, given = made(kind, scheme, dtype), inputs_of(kind, dtype)
    expected, before = gathers(model, given)
    assert not folded_into(model)
    fold_permutations(model)
    out, after = gathers(model, given)
    assert torch.equal(out, expected)
    assert folded_into(model) == FOLDED[kind]
    assert after == before - len(FOLDED[kind])
    fold_permutations(model)  # twice is once
    assert torch.equal(forward(model, given), expected)


@every_kind
@pytest.mark.parametrize("scheme", ["w4a8", "w4a4"])
def test_fused_blocks_fold_and_compute_the_same(kind: str, scheme: str, made: Callable):
    model, given = fuse_blocks(made(kind, scheme)), inputs_of(kind)
    assert set(fused_blocks(model).values()) == {None}
    assert folded_into(model) == FOLDED[kind]
    folded, few = gathers(model, given)
    unfold_permutations(model)
    assert not folded_into(model)
    gathered, many = gathers(model, given)
    assert many == few + len(FOLDED[kind])
    assert torch.equal(folded, gathered)
    fuse_blocks(model)  # of blocks that run fused already
    assert folded_into(model) == FOLDED[kind]
    assert torch.equal(forward(model, given), gathered)
    unfuse_blocks(model)
    assert not folded_into(model)


@every_kind
def test_other_widths_of_activations(kind: str, made: Callable):
    model, given = made(kind), inputs_of(kind)
    set_act_bits(model, 16)
    wide = forward(model, given)
    fold_permutations(model)
    assert torch.equal(forward(model, given), wide)


def test_compiled(made: Callable):
    model, given = made("pixart"), inputs_of("pixart")
    expected = forward(model, given)
    fold_permutations(model)
    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(forward(fast, given), expected)
    unfold_permutations(model)
    assert torch.equal(forward(fast, given), expected)


# Linears whose permutation is folded.
FAMILIES = {
    "flux2": 2 * 2,
    "chroma": 2 + 2,
    "sd3.5": 3 + 2,
    "wan": 2,
    "hunyuan-video": 2 + 2 + 1,
    "cogvideox": 2,
    "ltx-video": 2,
    "qwen-image": 2 * 2,
    "z-image": 4,
    "sana": 0,
    "lumina2": 4,
    "hidream": 7,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path):
    """GELU, gates in one linear and in two, experts."""
    # Any permutation of the channels that are made will do: the search of calibration takes long.
    model, quantized = quantized_family(family)
    rows = {name: state.out_features for name, state in quantized.states.items()}
    for name, state in quantized.states.items():
        first = makers_by_name(name, rows, state.in_features)[1]
        if state.rotation.kind == "hadamard" and state.shared_input is None:
            moved = torch.randperm(state.in_features - first) + first
            permutation = torch.cat([torch.arange(first), moved]).int()
            rotation = replace(state.rotation, permutation=permutation)
            for other, reader in quantized.states.items():
                if (reader.shared_input or other) == name:
                    quantized.states[other] = replace(reader, rotation=rotation)
    given = TINY_FAMILIES[family].inputs()
    model = load_quantized(model, quantized.save(tmp_path / "model.safetensors"))
    expected, before = gathers(model, given)
    fold_permutations(model)
    out, after = gathers(model, given)
    assert torch.equal(out, expected)
    assert len(folded_into(model)) == FAMILIES[family]
    assert before > after or FAMILIES[family] == 0
    unfold_permutations(model)
    assert torch.equal(forward(model, given), expected)


# ---- the way back -------------------------------------------------------------------------------


@every_kind
def test_unfolding_restores_every_buffer(kind: str, made: Callable):
    model = made(kind)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    fold_permutations(model)
    changed = {n for n, b in model.named_buffers() if n in before and not torch.equal(b, before[n])}
    assert any(name.endswith("packed_weight") for name in changed)
    unfold_permutations(model)
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert unfold_permutations not in model.__dict__.get("_lrq_undo_before_adapters", [])


def stored(file: Path) -> tuple[dict, bytes]:
    """Header and tensors of a safetensors file: the header's keys are written in any order."""
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:end]), whole[end:]


@every_kind
def test_a_folded_model_is_saved_as_it_was_loaded(kind: str, made: Callable, tmp_path: Path):
    model, given = made(kind), inputs_of(kind)
    files = []
    for name in ("loaded", "folded", "fused"):
        if name == "folded":
            fold_permutations(model)
        if name == "fused":
            fuse_blocks(model)
            assert folded_into(model)
        states, dense = model_states(model)
        model_class = type(model).__name__
        files.append(checkpoint.save(tmp_path / f"{name}.safetensors", states, dense, model_class))
        if name != "fused":  # fused projections store what is shared under another name
            model.save_pretrained(tmp_path / name)
    assert stored(files[0]) == stored(files[1])
    name = "diffusion_pytorch_model.safetensors"
    assert stored(tmp_path / "loaded" / name) == stored(tmp_path / "folded" / name)
    first, fused = checkpoint.load(files[0]).states, checkpoint.load(files[2]).states
    for name, state in first.items():
        assert torch.equal(state.codes, fused[name].codes)
        assert torch.equal(state.weight_scale, fused[name].weight_scale)
    again = load(kind, tmp_path / "folded", torch_dtype=torch.float32).eval()
    assert torch.equal(forward(again, given), forward(made(kind), given))


@every_kind
def test_copies_and_pickles(kind: str, made: Callable):
    model, given = fold_permutations(made(kind)), inputs_of(kind)
    expected = forward(model, given)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    unfold_permutations(model)
    for twin in twins:
        assert folded_into(twin) == FOLDED[kind]
        assert torch.equal(forward(twin, given), expected)
        unfold_permutations(twin)
        assert torch.equal(forward(twin, given), expected)


def test_the_dense_weights_are_in_order(made: Callable):
    """dequantize() of diffusers makes dense linears of them."""
    model = made("flux")
    expected = {name: linear.dense_weight() for name, linear in linears(model).items()}
    biases = {name: linear.bias for name, linear in linears(model).items()}
    for name, linear in linears(fold_permutations(model)).items():
        assert torch.equal(linear.dense_weight(), expected[name])
        assert torch.equal(linear.bias, biases[name])


# ---- adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prepare", [fold_permutations, fuse_blocks])
def test_an_adapter_undoes_it(prepare: Callable, made: Callable):
    model, plain, given = made("flux"), made("flux"), inputs_of("flux")
    adapter = lora_of(model)
    folded = forward(prepare(model), given)
    for each in (model, plain):
        each.load_lora_adapter(adapter, prefix=None, adapter_name="style")
    assert not folded_into(model)
    assert torch.equal(forward(model, given), forward(plain, given))
    prepare(model)  # what carries the adapter stays as it is
    assert not set(folded_into(model)) & {n for n in FOLDED["flux"] if n.endswith("net.2")}
    assert torch.equal(forward(model, given), forward(plain, given))
    model.unload_lora()
    assert torch.equal(forward(prepare(model), given), folded)
    assert folded_into(model) == FOLDED["flux"]


def inject(model: nn.Module) -> None:
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["net.0.proj", "net.2"], init_lora_weights=False)
    inject_adapter_in_model(config, model, adapter_name="style")


def test_an_adapter_that_is_put_on_by_peft_alone(made: Callable):
    """PixArt has no methods to load one: a fused block sees it in its next call, and check does."""
    model, plain, given = fuse_blocks(made("pixart")), made("pixart"), inputs_of("pixart")
    alone = fold_permutations(made("pixart"))
    for each in (model, plain, alone):
        inject(each)
    assert any("comes permuted" in problem for problem in lrq_quant.check(alone).problems)
    unfold_permutations(alone)
    expected = forward(plain, given)
    assert torch.equal(forward(alone, given), expected)
    assert torch.equal(forward(model, given), expected)
    assert not folded_into(model)


# ---- what keeps an input gathered ---------------------------------------------------------------


def test_why_the_others_are_gathered(made: Callable):
    model = fold_permutations(made("flux"))
    why = reasons(model)
    assert why["transformer_blocks.0.attn.to_q"] == OF_STREAM
    assert why["transformer_blocks.0.ff.net.0.proj"] == OF_STREAM
    assert why["transformer_blocks.1.attn.to_out.0"] == OF_ATTENTION
    assert why["transformer_blocks.1.attn.to_add_out"] == OF_ATTENTION
    assert why["single_transformer_blocks.0.proj_out"] is None
    said = str(lrq_quant.check(model))
    assert f"{len(why)} inputs are permuted, 6 of them by what makes them" in said
    assert f"are gathered in front of the rotation: {OF_STREAM}" in said
    assert not any("permuted" in problem for problem in lrq_quant.check(model).problems)
    unfold_permutations(model)
    assert reasons(model)["single_transformer_blocks.0.proj_out"].endswith("was not called")


def permute_input(model: nn.Module, name: str, permutation: torch.Tensor) -> None:
    quantizer = model.get_submodule(name).input_quantizer
    quantizer.permutation = permutation.to(torch.int32)


def test_a_permutation_of_heads_is_gathered(made: Callable):
    model, given = made("flux"), inputs_of("flux")
    name = "single_transformer_blocks.1.proj_out"
    permute_input(model, name, torch.arange(640).flip(0))
    expected = forward(model, given)
    fold_permutations(model)
    assert folded_permutations(model)[name] == ((), MOVES_HEADS)
    assert len(folded_into(model)) == 5
    assert torch.equal(forward(model, given), expected)


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, out: None)


def _pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: None)


def _forward(module: nn.Module) -> None:
    module.forward = module.forward


WAYS: dict[str, tuple[str, Callable[[nn.Module], None], str]] = {
    "hook on the maker": ("ff.net.0.proj", _hook, "forward hook"),
    "hook on the activation": ("ff.net.0", _hook, "forward hook"),
    "hook behind the activation": ("ff.net.1", _pre_hook, "forward hook"),
    "hook before the reader": ("ff.net.2", _pre_hook, "forward hook"),
    "hook on the reader's quantizer": ("ff.net.2.input_quantizer", _pre_hook, "forward hook"),
    "forward of the activation": ("ff.net.0", _forward, "forward of its own"),
    "forward of the block": ("ff", _forward, "forward of its own"),
}


@pytest.mark.parametrize("way", WAYS)
def test_whoever_reads_it_on_the_way_prevents_it(way: str, made: Callable):
    path, change, why = WAYS[way]
    model, given = made("pixart"), inputs_of("pixart")
    expected = forward(model, given)
    change(model.transformer_blocks[0].get_submodule(path))
    fold_permutations(model)
    assert list(folded_into(model)) == ["transformer_blocks.1.ff.net.2"]
    assert why in reasons(model)["transformer_blocks.0.ff.net.2"]
    assert torch.equal(forward(model, given), expected)


def test_another_reader_of_the_rows_or_of_the_input_prevents_it(made: Callable):
    model, given = made("pixart"), inputs_of("pixart")
    first, second = (block.ff for block in model.transformer_blocks)
    second.net[0].proj = first.net[0].proj
    expected = forward(model, given)
    assert not folded_into(fold_permutations(model))
    assert set(reasons(model).values()) >= {"a linear is used in several places"}
    assert torch.equal(forward(model, given), expected)

    model = made("pixart")
    reader = model.transformer_blocks[0].ff.net[2]
    twin = LRQLinear(reader.to_state(), reader.input_quantizer, "twin")
    model.transformer_blocks[1].twin = twin
    fold_permutations(model)
    assert reasons(model)["transformer_blocks.0.ff.net.2"] == "other linears read the input"


def test_hooks_of_offloading_prevent_it_and_dense_makers(made: Callable):
    model = made("pixart")
    model.transformer_blocks[1]._hf_hook = object()
    assert not folded_into(fold_permutations(model))
    assert any("hooks of offloading" in (why or "") for why in reasons(model).values())
    model = made("pixart")
    maker = model.transformer_blocks[0].ff.net[0]
    maker.proj = nn.Linear(maker.proj.in_features, maker.proj.out_features)
    assert list(folded_into(fold_permutations(model))) == ["transformer_blocks.1.ff.net.2"]
    assert reasons(model)["transformer_blocks.0.ff.net.2"] == "net.0.proj is a Linear"


def test_a_hook_that_comes_later_is_reported(made: Callable):
    model = fold_permutations(made("flux"))
    assert not any("permuted" in problem for problem in lrq_quant.check(model).problems)
    _hook(model.single_transformer_blocks[0].act_mlp)
    (problem,) = (p for p in lrq_quant.check(model).problems if "permuted" in p)
    assert "single_transformer_blocks.0.proj_out" in problem and "act_mlp has a forward" in problem


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_it_is_undone_under_hooks_of_offloading(offload_type: str, device: str, made: Callable):
    """Which come after it, and know the buffers by what they are."""
    model, given = fold_permutations(made("flux").to(device)), inputs_of("flux")
    given = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    expected = forward(model, given)
    unfolded = forward(unfold_permutations(copy.deepcopy(model)), given)
    model.to("cpu")
    model.enable_group_offload(
        onload_device=torch.device(device), offload_type=offload_type, num_blocks_per_group=1
    )
    assert torch.equal(forward(model, given), expected)
    unfold_permutations(model)
    assert not folded_into(model)
    for _ in range(2):
        assert torch.equal(forward(model, given), unfolded)


# ---- rows of one linear -------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rows, channels", [(200, 96), (256, 128)])  # 200: a ragged tile
@pytest.mark.parametrize("act_bits", [8, 16])
def test_rows_are_reordered_without_loss(bits: int, rows: int, channels: int, act_bits: int):
    scheme = QuantScheme(bits, act_bits, "hadamard", 32)
    state = make_state(rows, channels, scheme)
    linear = LRQLinear.from_state(state, name="made")
    before = {name: buffer.clone() for name, buffer in linear.named_buffers()}
    x, order = torch.randn(5, channels), torch.randperm(rows).int()
    expected, taken = linear(x)[:, order.long()], linear.to_state()
    order_rows(linear, order)
    assert torch.equal(linear(x), expected)
    assert torch.equal(linear.to_state().codes, state.codes)
    assert torch.equal(linear.codes(), state.codes)
    assert torch.equal(linear.to_state().levels, state.levels)
    assert torch.equal(linear.to_state().weight_scale, state.weight_scale)
    assert torch.equal(taken.levels, state.levels)  # of before: not written over
    assert torch.equal(taken.weight_scale, state.weight_scale)
    with pytest.raises(ValueError, match="rows of made are in an order already"):
        order_rows(linear, order)
    restore_rows(linear)
    after = dict(linear.named_buffers())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_model_of_inference_tensors(made: Callable):
    with torch.inference_mode():
        model = made("pixart")
    given = inputs_of("pixart")
    expected = forward(model, given)
    assert folded_into(fold_permutations(model)) == FOLDED["pixart"]
    assert torch.equal(forward(model, given), expected)
    unfold_permutations(model)
    assert torch.equal(forward(model, given), expected)


def test_weights_that_are_away_are_not_restored():
    state = make_state(128, 128, QuantScheme(4, 8, rotation="none"))
    linear = LRQLinear.from_state(replace(state, rotation=Rotation.none()), name="made")
    order_rows(linear, torch.randperm(128).int())
    linear.packed_weight = linear.packed_weight.to("meta")
    with pytest.raises(RuntimeError, match="made has no values"):
        restore_order(linear)


@pytest.mark.gpu
@every_kind
def test_on_a_gpu_and_in_graphs(kind: str, made: Callable):
    """The kernels of gathered and of plain inputs round alike but for ties."""
    from lrq_kernels import graph, ungraph

    model = made(kind, "w4a8", torch.bfloat16).to("cuda")
    given = {
        n: x.to("cuda") if isinstance(x, torch.Tensor) else x
        for n, x in inputs_of(kind, torch.bfloat16).items()
    }
    gathered = forward(model, given)
    graph(model)
    assert torch.equal(forward(model, given), gathered)
    fold_permutations(model)
    assert folded_into(model) == FOLDED[kind]
    folded = forward(model, given)  # captured anew
    assert sqnr_db(gathered.float(), folded.float()) > 30
    ungraph(model)
    assert torch.equal(forward(model, given), folded)
    unfold_permutations(model)
    assert torch.equal(forward(model, given), gathered)

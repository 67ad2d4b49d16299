"""Offloading hooks and casts on quantized models: the same output, the same bits afterwards.

Hooks of accelerate and diffusers move or cast whatever buffers they find. What needs an accelerator
to exist is marked gpu.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from safetensors.torch import load_file
from tiny_models import (
    BF16,
    TINY,
    asks_for_an_accelerator,
    linears,
    load,
    run,
    shared_folder,
    tiny_pipeline,
)
from torch import Tensor, nn

from lrq_kernels import LRQLinear
from lrq_kernels.testing import sqnr_db
from lrq_quant import QuantRecipe, fuse_projections
from lrq_quant.demo.pipeline import ShapesPipeline, prompt_generators
from lrq_quant.pipeline_io import quantize_pipeline

every_model = pytest.mark.parametrize("kind", TINY)
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(scope="module")
def loaded() -> Callable[[str], nn.Module]:
    done: dict[str, nn.Module] = {}

    def get(kind: str) -> nn.Module:
        if kind not in done:
            done[kind] = load(kind, shared_folder(kind))
        return copy.deepcopy(done[kind])

    return get


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{buffer}": tensor.cpu().clone()
        for name, linear in linears(model).items()
        for buffer, tensor in linear.named_buffers()
    }


def content(tensor: Tensor) -> tuple[torch.dtype, bytes]:
    return tensor.dtype, tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same_bits(before: dict[str, Tensor], model: nn.Module) -> None:
    after = bits(model)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


def run_on(model: nn.Module, kind: str, device: str) -> Tensor:
    torch.manual_seed(0)
    inputs = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in TINY[kind][1](BF16).items()
    }
    with torch.no_grad():
        return model(**inputs)[0].cpu()


# ---- diffusers: group offload -------------------------------------------------------------------

GROUPS = (
    {"offload_type": "leaf_level"},
    {"offload_type": "block_level", "num_blocks_per_group": 1},
    {"offload_type": "block_level", "num_blocks_per_group": 2},
)


@asks_for_an_accelerator
@every_model
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_group_offload(kind: str, fused: bool, group: dict, device: str, loaded: Callable):
    """Everything is a buffer, nothing is held by Python alone."""
    model = loaded(kind)
    if fused:
        fuse_projections(model)
    before = bits(model)
    expected = run_on(model.to(device), kind, device)
    model.to("cpu")
    model.enable_group_offload(
        onload_device=torch.device(device), offload_device=torch.device("cpu"), **group
    )
    for _ in range(2):
        assert torch.equal(run_on(model, kind, device), expected)
    assert_same_bits(before, model)


@asks_for_an_accelerator
@every_model
def test_group_offload_to_disk(kind: str, loaded: Callable, tmp_path: Path):
    """Remedy: no two linears share a buffer. Groups that do write it one after the other, and each
    frees it: the second would write what is left, which is sometimes right."""
    model = loaded(kind)
    expected = run(model, kind)
    tensors = {content(tensor) for tensor in (*model.parameters(), *model.buffers())}
    options = {"onload_device": torch.device("cpu"), "offload_type": "leaf_level"}
    model.enable_group_offload(**options, offload_to_disk_path=str(tmp_path))
    files = list(tmp_path.glob("*.safetensors"))
    written = {content(tensor) for file in files for tensor in load_file(file).values()}
    assert tensors <= written
    for _ in range(2):
        # Not every bit: tensors come back at other addresses, and how torch's products on a CPU
        # round may depend on the alignment of their weights.
        assert sqnr_db(expected, run(model, kind)) > 30


@every_model
def test_no_buffer_belongs_to_two_linears(kind: str, loaded: Callable):
    """With a stream, group offload brings the tensors of one linear while another runs, by putting
    others in their place: a reader of the same input would see what has not arrived yet."""
    owner: dict[int, str] = {}
    for name, linear in linears(loaded(kind)).items():
        for buffer in linear.buffers():
            assert owner.setdefault(buffer.data_ptr(), name) == name


@pytest.mark.gpu
@every_model
@pytest.mark.parametrize("group", GROUPS)
def test_group_offload_with_streams(kind: str, group: dict, loaded: Callable):
    model = loaded(kind)
    expected = run_on(model.to("cuda"), kind, "cuda")
    model.to("cpu")
    model.enable_group_offload(onload_device=torch.device("cuda"), use_stream=True, **group)
    for _ in range(3):
        assert torch.equal(run_on(model, kind, "cuda"), expected)


@asks_for_an_accelerator
@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload_with_a_lora(offload_type: str, loaded: Callable):
    from test_lora import lora_of

    model = loaded("flux")
    model.load_lora_adapter(lora_of(model), prefix=None, adapter_name="style")
    expected = run(model, "flux")
    model.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1
    )
    assert torch.equal(run(model, "flux"), expected)


# ---- accelerate: sequential offload -------------------------------------------------------------


@every_model
@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_sequential_offload(kind: str, offload_buffers: bool, device: str, loaded: Callable):
    """Remedy: state_dict holds every buffer under its own name, where the hooks look it up. PixArt
    has parameters of its own, so diffusers asks for its buffers to be offloaded too."""
    model = loaded(kind)
    before, expected = bits(model), run_on(model.to(device), kind, device)
    model.to("cpu")
    cpu_offload(model, torch.device(device), offload_buffers=offload_buffers)
    if offload_buffers:
        assert all(linear.packed_weight.is_meta for linear in linears(model).values())
    for _ in range(2):
        assert torch.equal(run_on(model, kind, device), expected)
    remove_hook_from_submodules(model)
    if device == "cpu":
        assert_same_bits(before, model)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload_of_a_pipeline(mode: str, tmp_path: Path):
    quantize_pipeline(tiny_pipeline(), QuantRecipe.from_name("w4a8"), None, tmp_path / "q")

    def draw(prepare: Callable[[ShapesPipeline], object]) -> Tensor:
        pipeline = ShapesPipeline.from_pretrained(tmp_path / "q", dtype=BF16)
        prepare(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "output_type": "pt"}
        return pipeline(["a red circle"], generator=prompt_generators(1), **options).images.cpu()

    assert torch.equal(draw(lambda p: getattr(p, mode)()), draw(lambda p: p.to("cuda")))


# ---- casts --------------------------------------------------------------------------------------


@every_model
def test_layerwise_casting(kind: str, loaded: Callable):
    """Remedy: no buffer is floating. The hooks cast float buffers, scales and bias too, of any
    nn.Linear to eight bits."""
    model = loaded(kind)
    before, names = bits(model), linears(model).keys()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=BF16)
    assert_same_bits(before, model)
    dense = [p for n, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn]
    if kind != "wan":  # of which all that is dense is on the list of what is not cast
        assert dense, "nothing was cast: the test shows nothing"
    got = run(model, kind)
    # What is dense was cast and nothing else was: the same as rounding those weights beforehand.
    twin = loaded(kind)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if model.get_parameter(name).dtype == torch.float8_e4m3fn:
                parameter.copy_(parameter.to(torch.float8_e4m3fn))
    assert torch.equal(got, run(twin, kind))
    assert linears(model).keys() == names
    assert_same_bits(before, model)


@every_model
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_casting_from_outside(kind: str, dtype: torch.dtype, loaded: Callable):
    """nn.Module.to, which pipelines and trainers call on parts: codes and scales stay."""
    model = loaded(kind)
    before = bits(model)
    for child in model.children():
        child.to(dtype)
    assert_same_bits(before, model)
    assert {linear.weight.dtype for linear in linears(model).values()} == {dtype}
    assert all(isinstance(linear, LRQLinear) for linear in linears(model).values())

"""Tiny random instances of real diffusers classes, inputs that fit them, quantized folders."""

from __future__ import annotations

import functools
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lrq_kernels import LRQLinear
from lrq_kernels.testing import sqnr_db
from lrq_quant import QuantRecipe, quantize_model
from lrq_quant.demo.pipeline import ShapesPipeline
from lrq_quant.demo.text import CaptionEncoder
from lrq_quant.pipeline_io import save_transformer

BF16 = torch.bfloat16
DIFFUSERS = Version(diffusers.__version__)
# For group offload and LoRAs that widen a linear, from CPU to CPU too.
asks_for_an_accelerator = pytest.mark.skipif(
    DIFFUSERS < Version("0.41") and not torch.accelerator.is_available(),
    reason=f"diffusers {DIFFUSERS} asks which accelerator there is: from 0.41 on there may be none",
)
# By which a model with its roundings elsewhere may be further from fp32: chance. At fp16 an output
# of 60 dB hangs on the few codes that turned; two of 16 draws differed by more than 1 dB.
CHANCE_DB = {torch.bfloat16: 1.0, torch.float16: 3.0}


def as_near(exact: Tensor, got: Tensor, eager: Tensor) -> bool:
    """Whether `got` is as near to the fp32 output as `eager`, of the same dtype, but for chance."""
    nearness = sqnr_db(exact, eager.float()) - CHANCE_DB[eager.dtype]
    return sqnr_db(exact, got.float()) > nearness


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


def tiny_sd3() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=128,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()


def sd3_inputs(dtype: torch.dtype) -> dict:
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, dtype=dtype),
        "encoder_hidden_states": torch.randn(2, 5, 64, dtype=dtype),
        "pooled_projections": torch.randn(2, 32, dtype=dtype),
        "timestep": torch.tensor([500.0, 500.0], dtype=dtype),
        "return_dict": False,
    }


def tiny_wan() -> WanTransformer3DModel:
    """Keeps its norms, its modulation tables and its time embedder in fp32."""
    return WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=64,
        freq_dim=64,
        ffn_dim=256,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()


def wan_inputs(dtype: torch.dtype) -> dict:
    return {
        "hidden_states": torch.randn(1, 4, 2, 8, 8, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 5, 64, dtype=dtype),
        "timestep": torch.tensor([500.0]),
        "return_dict": False,
    }


def tiny_pipeline() -> ShapesPipeline:
    encoder = CaptionEncoder(embed_dim=64)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    return ShapesPipeline(tiny_pixart(), encoder, scheduler)


# Name -> (model, its inputs in a dtype).
TINY: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.dtype], dict]]] = {
    "pixart": (tiny_pixart, pixart_inputs),
    "flux": (tiny_flux, flux_inputs),
    "sd3": (tiny_sd3, sd3_inputs),
    "wan": (tiny_wan, wan_inputs),
}


def quantized_folder(kind: str, folder: Path, dtype: torch.dtype = BF16) -> Path:
    model = TINY[kind][0]().to(dtype)
    save_transformer(model, quantize_model(model, QuantRecipe.from_name("w4a8")), folder)
    return folder


@contextmanager
def of_the_run(name: str) -> Iterator[None]:
    """Draws what the run's seed and `name` say, whichever test is the first to ask for it."""
    from conftest import RUN_SEED

    with torch.random.fork_rng():
        torch.manual_seed((RUN_SEED + zlib.crc32(name.encode())) % 2**31)
        yield


@functools.cache
def _shared(kind: str, dtype: torch.dtype) -> tuple[nn.Module, tempfile.TemporaryDirectory]:
    folder = tempfile.TemporaryDirectory(prefix=f"lrq-{kind}-")
    with of_the_run(f"{kind} {dtype}"):
        model = TINY[kind][0]().to(dtype)
        quantized = quantize_model(model, QuantRecipe.from_name("w4a8"))
    save_transformer(model, quantized, Path(folder.name))
    return model, folder


def shared_folder(kind: str, dtype: torch.dtype = BF16) -> Path:
    """What quantized_folder makes, made once a process, since it takes a second: tests read it and
    change copies."""
    return Path(_shared(kind, dtype)[1].name)


def shared_dense(kind: str, dtype: torch.dtype = BF16) -> nn.Module:
    """The dense model that shared_folder is of; tests do not change it."""
    return _shared(kind, dtype)[0]


def model_class(kind: str) -> type:
    return type(TINY[kind][0]())


def load(kind: str, folder: Path, **options: object) -> nn.Module:
    return model_class(kind).from_pretrained(folder, **{"torch_dtype": BF16, **options})


@torch.no_grad()
def run(model: nn.Module, kind: str, dtype: torch.dtype = BF16, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return model(**TINY[kind][1](dtype))[0]


def linears(model: nn.Module) -> dict[str, LRQLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LRQLinear)}


def all_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same_tensors(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = all_tensors(one), all_tensors(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def rewrite(file: Path, tensors: object = None, **metadata: str) -> None:
    with safe_open(file, framework="pt") as handle:
        kept = {name: handle.get_tensor(name) for name in sorted(handle.keys())}
        old = handle.metadata()
    if tensors is not None:
        tensors(kept)
    save_file(kept, file, metadata={**old, **metadata})

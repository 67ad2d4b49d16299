"""Quantized transformers inside diffusers pipelines: save a folder, load it, fuse q, k and v.

A quantized pipeline folder is an ordinary diffusers folder in which one component, the
transformer, holds an lrq checkpoint and its config.json says so under "quantization_config".
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lrq_kernels
from lrq_kernels import LRQLinear, checkpoint, fuse_linears
from lrq_kernels.checkpoint import CheckpointError

from .calibration import Progress
from .pipeline import QuantizedModel, quantize_model
from .recipe import QuantRecipe
from .report import QuantReport

TRANSFORMER = "transformer"
REPORT_FILE = "lrq_report.json"
# Pipelines of this package, which diffusers does not know by name.
_OWN_PIPELINES = {"ShapesPipeline": "lrq_quant.demo.pipeline"}


# ---- load ---------------------------------------------------------------------------------------


def load_pipeline(
    path: str | os.PathLike,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    fuse: bool = True,
) -> Any:
    """A diffusers pipeline from a folder or hub id, on `device`.

    A transformer that is an lrq checkpoint is loaded as such; any other pipeline loads as diffusers
    does. fuse: q, k and v of an attention become one GEMM. Raises FileNotFoundError, or
    CheckpointError when the checkpoint is damaged or of another model.
    """
    folder = Path(path)
    components = {}
    if is_quantized(folder / TRANSFORMER):
        components[TRANSFORMER] = load_transformer(
            folder / TRANSFORMER, device=device, dtype=dtype, fuse=fuse
        )
    pipeline = pipeline_class(path).from_pretrained(path, dtype=dtype, **components)
    return pipeline.to(device)


def load_transformer(
    folder: str | os.PathLike,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    fuse: bool = True,
) -> nn.Module:
    """The transformer of a quantized component folder (config.json beside the checkpoint)."""
    from accelerate import init_empty_weights

    folder = Path(folder)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"no config.json in {folder}")
    config = json.loads(config_file.read_text())
    config.pop("quantization_config", None)
    cls = _diffusers_class(config.get("_class_name"), config_file)
    with init_empty_weights():  # parameters on meta; buffers, which no checkpoint holds, are real
        model = cls.from_config(config)
    for name, buffer in model.named_buffers():
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = buffer.to(device)
    lrq_kernels.load_quantized(model, folder, device=device, dtype=dtype)
    return fuse_projections(model) if fuse else model


def is_quantized(folder: str | os.PathLike) -> bool:
    """Whether a component folder holds an lrq checkpoint, by its config.json."""
    config_file = Path(folder) / "config.json"
    if not config_file.is_file():
        return False
    quantization = json.loads(config_file.read_text()).get("quantization_config") or {}
    return quantization.get("quant_method") == checkpoint.FORMAT


def pipeline_class(path: str | os.PathLike) -> Any:
    """The class to call from_pretrained on for a pipeline folder or hub id."""
    from diffusers import DiffusionPipeline

    index = Path(path) / "model_index.json"
    if not index.is_file():
        if Path(path).exists():
            raise FileNotFoundError(f"{path} is not a diffusers pipeline: no model_index.json")
        return DiffusionPipeline  # a hub id
    name = json.loads(index.read_text()).get("_class_name")
    if isinstance(name, str) and name in _OWN_PIPELINES:
        return getattr(importlib.import_module(_OWN_PIPELINES[name]), name)
    return DiffusionPipeline


def _diffusers_class(name: str | None, where: Path) -> Any:
    import diffusers

    cls = getattr(diffusers, name or "", None)
    if cls is None:
        raise CheckpointError(f"{where}: _class_name {name!r} is not a class of diffusers")
    return cls


# ---- quantize and save --------------------------------------------------------------------------


def quantize_pipeline(
    pipeline: Any,
    recipe: QuantRecipe,
    prompts: Sequence[str] | None,
    out: str | os.PathLike,
    *,
    call_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> QuantReport:
    """Quantize the transformer of `pipeline` and write the whole pipeline to the folder `out`.

    Calibrated by drawing `prompts` (every step, both guidance halves) with call_options as further
    arguments of the pipeline's call; prompts None looks at the weights alone. A killed run leaves
    `<out>.partial` and, called again, continues from it. Raises FileExistsError or OSError when
    `out` is taken or cannot be written, and what quantize_model raises, before anything is written.
    """
    out = check_writable(out)
    pipeline.set_progress_bar_config(disable=True)
    options = dict(call_options or {})
    if getattr(pipeline, "vae", None) is not None:
        options["output_type"] = "latent"  # statistics need no decoded picture

    def run(batch: list[str]) -> None:
        # The seed follows the prompt, so that statistics do not depend on the batch size.
        generators = [torch.Generator().manual_seed(zlib.crc32(text.encode())) for text in batch]
        pipeline(prompt=batch, generator=generators, **options)

    quantized = quantize_model(
        pipeline.transformer,
        recipe,
        run=None if prompts is None else run,
        prompts=prompts or (),
        work_folder=out.with_name(f"{out.name}.partial"),
        progress=progress,
    )
    save_pipeline(pipeline, quantized, out)
    quantized.remove_work_folder()
    return quantized.report


def save_pipeline(pipeline: Any, quantized: QuantizedModel, out: str | os.PathLike) -> Path:
    """Write `pipeline` with its transformer replaced by `quantized` to the folder `out`, which
    appears under its name when it is complete.

    Raises FileExistsError when `out` holds something already, OSError when it cannot be written.
    """
    out = check_writable(out)
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, component in pipeline.components.items():
            if name != TRANSFORMER and hasattr(component, "save_pretrained"):
                component.save_pretrained(temporary / name)
        pipeline.save_config(temporary)
        save_transformer(pipeline.transformer, quantized, temporary / TRANSFORMER)
        if out.exists():
            out.rmdir()  # empty, as check_writable found
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def save_transformer(model: nn.Module, quantized: QuantizedModel, folder: Path) -> None:
    """config.json of `model`, checkpoint and report of one transformer component."""
    folder.mkdir(parents=True, exist_ok=True)
    quantized.save(folder)
    config = json.loads(model.to_json_string())
    config["quantization_config"] = {
        "quant_method": checkpoint.FORMAT,
        "format_version": checkpoint.VERSION,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    report = json.dumps(quantized.report.to_dict(), indent=1)
    (folder / REPORT_FILE).write_text(report + "\n")


def load_report(path: str | os.PathLike) -> QuantReport:
    """What was done to a quantized pipeline or transformer folder; its checkpoint is checked to be
    there and of a known version. Raises FileNotFoundError or CheckpointError."""
    folder = Path(path)
    if (folder / TRANSFORMER).is_dir():
        folder = folder / TRANSFORMER
    checkpoint.read_header(checkpoint.checkpoint_files(folder))
    file = folder / REPORT_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no {REPORT_FILE} in {folder}")
    return QuantReport.from_dict(json.loads(file.read_text()))


def check_writable(out: str | os.PathLike) -> Path:
    """`out` as a path when a new folder can be made there; called before any long work.

    Raises FileExistsError when it exists and is not an empty folder, OSError when no folder can be
    made there.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already; name a new folder")
    parent = out.absolute().parent
    probe = parent / f".{out.name}.{os.getpid()}.probe"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        raise OSError(f"cannot write to {parent}: {error}") from error
    finally:
        if probe.exists():
            probe.unlink()
    return out


# ---- fused projections --------------------------------------------------------------------------

# Fused name -> linears of an attention module, in the order in which diffusers splits the result.
_SELF_ATTENTION: dict[str, tuple[str, ...]] = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
_CROSS_ATTENTION: dict[str, tuple[str, ...]] = {"to_kv": ("to_k", "to_v")}


def fuse_projections(model: nn.Module) -> nn.Module:
    """Make one GEMM of the quantized q, k and v of every attention module that supports it.

    Lossless: levels and scales are per output row. The separate linears are removed, so nothing is
    held twice. Modules whose projections are not all quantized with one scheme and a shared input
    stay as they are; fused_projections() lists what was fused.
    """
    for module in model.modules():
        groups = _fusable(module)
        if not groups:
            continue
        for fused_name, members in groups.items():
            fused = fuse_linears([getattr(module, name) for name in members])
            for name in members:
                delattr(module, name)
            module.add_module(fused_name, fused)
        module.fused_projections = True
        # diffusers' own fuse_projections would build a dense zero layer from ours.
        module._supports_qkv_fusion = False
        _use_fused_processor(module)
    return model


def fused_projections(model: nn.Module) -> dict[str, list[str]]:
    """Full name of each fused linear -> names of the linears in it."""
    return {
        name: [part for part, _ in module.parts]
        for name, module in model.named_modules()
        if isinstance(module, LRQLinear) and len(module.parts) > 1
    }


def _fusable(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Groups of an attention module to fuse: all that its fused forward reads, or none."""
    if not hasattr(module, "fused_projections") or module.fused_projections:
        return {}
    cross = bool(getattr(module, "is_cross_attention", False))
    wanted = _CROSS_ATTENTION if cross else _SELF_ATTENTION
    groups = {
        fused: members
        for fused, members in wanted.items()
        if any(getattr(module, name, None) is not None for name in members)
    }
    complete = all(_one_input(module, members) for members in groups.values())
    return groups if complete and _has_fused_forward(module) else {}


def _one_input(module: nn.Module, members: tuple[str, ...]) -> bool:
    found = [getattr(module, name, None) for name in members]
    linears = [linear for linear in found if isinstance(linear, LRQLinear)]
    if len(linears) < len(found):
        return False
    first = linears[0]
    return all(
        linear.input_quantizer is first.input_quantizer
        and linear.scheme == first.scheme
        and (linear.bias is None) == (first.bias is None)
        for linear in linears
    )


def _has_fused_forward(module: nn.Module) -> bool:
    """Whether the attention processor reads to_qkv when fused_projections is set."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import AttnProcessor2_0

    return isinstance(module, AttentionModuleMixin) or isinstance(
        getattr(module, "processor", None), AttnProcessor2_0
    )


def _use_fused_processor(module: nn.Module) -> None:
    """The older Attention class picks the fused forward by its processor, not by the flag."""
    from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0

    if isinstance(module.processor, AttnProcessor2_0):
        module.set_processor(FusedAttnProcessor2_0())

"""Pipeline folders: quantize a pipeline, save it, load it, read its report.

A quantized pipeline folder is an ordinary diffusers folder in which one component, the
transformer, holds an lrq checkpoint and its config.json says so under "quantization_config".
diffusers' own from_pretrained and save_pretrained do the same (diffusers_backend).
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrq_kernels import checkpoint
from lrq_kernels.checkpoint import CheckpointError

from .auto_family import with_family
from .calibration import Progress
from .checkpoint_report import report_of_checkpoint
from .config import LRQConfig
from .fused_projections import fuse_projections
from .html_report import html_page
from .mixed_precision import BitBudget, budgeted_recipe
from .model_stats import strided_sample
from .older_diffusers import dtype_option
from .pipeline import QuantizedModel, check_dense, quantize_model
from .recipe import QuantRecipe
from .report import QuantReport
from .report_pictures import DrawnPictures, PictureComparison, picture_seed
from .sharding import processes
from .work_folder import WorkFolder, write_text

TRANSFORMER = "transformer"
REPORT_FILE = "lrq_report.json"
REPORT_PAGE = "report.html"
_KINDS = ("json", "safetensors")
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
    """A diffusers pipeline from a folder or hub id, on `device`: from_pretrained of its class.

    fuse: q, k and v of the attentions of a quantized transformer become one GEMM. Raises
    FileNotFoundError, or CheckpointError when the checkpoint is damaged or of another model.
    """
    pipeline = pipeline_class(path).from_pretrained(path, **dtype_option(dtype))
    for name in transformer_names(pipeline):
        transformer = getattr(pipeline, name)
        if fuse and getattr(transformer, "is_quantized", False):
            fuse_projections(transformer)
    return pipeline.to(device)


def transformer_names(pipeline: Any) -> list[str]:
    """Names of the components that are diffusion transformers: "transformer", and others of its
    class (of Wan 2.2, for the less noisy steps); none where there is no "transformer"."""
    first = getattr(pipeline, TRANSFORMER, None)
    if first is None:
        return []
    others = (n for n, c in pipeline.components.items() if type(c) is type(first))
    return [TRANSFORMER, *(name for name in others if name != TRANSFORMER)]


def load_transformer(
    folder: str | os.PathLike,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    fuse: bool = True,
) -> nn.Module:
    """The transformer of a quantized component folder, as load_pipeline loads it."""
    config_file = Path(folder) / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"no config.json in {folder}")
    cls = _diffusers_class(json.loads(config_file.read_text()).get("_class_name"), config_file)
    model = cls.from_pretrained(folder, **dtype_option(dtype)).to(device)
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


def recipe_for(
    pipeline: Any, recipe: QuantRecipe, call_options: Mapping[str, Any] | None = None
) -> QuantRecipe:
    """The recipe that quantize_pipeline follows: of a transformer of an unknown family, one forward
    of the pipeline is watched and the family is put into the recipe (auto_family)."""
    run = _runner(pipeline, call_options)
    return with_family(recipe, pipeline.transformer, lambda: run([""]))


def _runner(pipeline: Any, call_options: Mapping[str, Any] | None) -> Callable[[list[str]], None]:
    """Draws a batch of prompts, up to the latents."""
    pipeline.set_progress_bar_config(disable=True)
    options = _run_options(pipeline, call_options)

    def run(batch: list[str]) -> None:
        # The seed follows the prompt, so that statistics do not depend on the batch size.
        generators = [torch.Generator().manual_seed(picture_seed(text)) for text in batch]
        pipeline(prompt=batch, generator=generators, **options)

    return run


def _run_options(pipeline: Any, call_options: Mapping[str, Any] | None) -> dict[str, Any]:
    options = dict(call_options or {})
    if getattr(pipeline, "vae", None) is not None:
        options["output_type"] = "latent"  # statistics need no decoded picture
    return options


def _run_key(pipeline: Any, names: Sequence[str], call_options: Mapping[str, Any] | None) -> str:
    """Changes with what statistics depend on beside transformers and prompts: steps, guidance and
    sizes, and all other components. Those of another run must not be continued from."""
    facts: dict[str, Any] = {"options": repr(sorted(_run_options(pipeline, call_options).items()))}
    samples = []
    for name, component in sorted(pipeline.components.items()):
        if name in names:
            continue
        config = dict(getattr(component, "config", None) or {}) if component is not None else {}
        own = sorted((key, repr(value)) for key, value in config.items() if key[:1] != "_")
        facts[name] = [type(component).__name__, own]
        if isinstance(component, nn.Module):
            samples += [strided_sample(p) for p in component.parameters() if not p.is_meta]
    return WorkFolder.fingerprint(facts, samples)


def quantize_pipeline(
    pipeline: Any,
    recipe: QuantRecipe,
    prompts: Sequence[str] | None,
    out: str | os.PathLike,
    *,
    call_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    pictures: int = 0,
    budget: BitBudget | None = None,
) -> QuantReport:
    """Quantize every transformer of `pipeline` (transformer_names) and write the whole pipeline to
    the folder `out`. Returns the report of "transformer"; load_report reads that of another.
    Beside each checkpoint lie its report as lrq_report.json and, to look at, report.html.

    budget: widths of weights and activations are dealt out to the inputs of the blocks by what each
    does to the output (mixed_precision); it needs prompts.

    pictures: so many of the first prompts are drawn before and after quantization and compared in
    the report, once all else is written; the original waits on the CPU meanwhile. What stops them
    is logged and said in the report.

    Calibrated by drawing `prompts` (every step, both guidance halves) with call_options as further
    arguments of the pipeline's call; prompts None looks at the weights alone. A killed run leaves
    `<out>.partial` (of another transformer `<out>.<its name>.partial`) and, called again, continues
    from it. Processes of torch.distributed share the work when all call this, each with the
    pipeline on its own device; the first writes. Raises FileExistsError or OSError when `out` is
    taken or cannot be written, and what quantize_model raises, before anything is written.
    """
    out = check_writable(out)
    if pictures < 0:
        raise ValueError(f"quantize_pipeline: pictures must not be negative, got {pictures}")
    if budget is not None and prompts is None:
        raise ValueError(
            "quantize_pipeline: prompts must be given with a budget, which is dealt out by what "
            "widths do to the output, got None"
        )
    names = transformer_names(pipeline)
    if not names:
        raise ValueError(
            f"quantize_pipeline: {type(pipeline).__name__} must have a component {TRANSFORMER!r}, "
            f"got {', '.join(pipeline.components)}"
        )
    for name in names:
        check_dense(getattr(pipeline, name), name)
    with processes() as shards:
        run = _runner(pipeline, call_options)
        recipe = recipe_for(pipeline, recipe, call_options)
        run_key = _run_key(pipeline, names, call_options)
        recipe = replace(recipe, calibration=replace(recipe.calibration, run_key=run_key))
        drawn = list(prompts or ())[:pictures] if shards.rank == 0 else []
        # Of an offloaded pipeline the GPU, where the weights are not.
        device = getattr(pipeline, "_execution_device", None)
        comparison = PictureComparison(pipeline, names, drawn, call_options, progress)
        if drawn:
            comparison.draw_before()
        quantized = {}
        for name in names:
            model, work_folder = getattr(pipeline, name), _work_folder(out, name)
            own = recipe
            if budget is not None and prompts is not None:
                own = budgeted_recipe(
                    model,
                    recipe,
                    budget,
                    run,
                    prompts,
                    work_folder=work_folder,
                    device=device,
                    progress=progress,
                )
            quantized[name] = quantize_model(
                model,
                own,
                run=None if prompts is None else run,
                prompts=prompts or (),
                work_folder=work_folder,
                device=device,
                progress=progress,
            )
        if shards.rank == 0:
            save_pipeline(pipeline, quantized, out)
            for name in names:
                quantized[name].remove_work_folder()
        reports = {name: result.report for name, result in quantized.items()}
        del quantized  # the memory that it holds is for the pictures
        if drawn:
            reports = _with_pictures(comparison, reports, out)
        return shards.of_first(reports[TRANSFORMER])


def _with_pictures(
    comparison: PictureComparison, reports: Mapping[str, QuantReport], out: Path
) -> dict[str, QuantReport]:
    """The reports, written again with what was drawn or with what stopped it."""

    def load(name: str, original: nn.Module) -> nn.Module:
        return load_transformer(out / name, dtype=original.dtype)

    drawn = comparison.draw_after(load)
    compared = () if drawn is None else drawn.compared
    made = {name: replace(report, pictures=compared) for name, report in reports.items()}
    for name, report in made.items():
        save_report(report, out / name, drawn, comparison.note)
    return made


def _work_folder(out: Path, name: str) -> Path:
    part = "" if name == TRANSFORMER else f".{name}"
    return out.with_name(f"{out.name}{part}.partial")


def save_pipeline(
    pipeline: Any, quantized: Mapping[str, QuantizedModel], out: str | os.PathLike
) -> Path:
    """Write `pipeline` with the components named in `quantized` replaced to the folder `out`, which
    appears under its name when it is complete.

    Raises FileExistsError when `out` holds something already, OSError when it cannot be written.
    """
    out = check_writable(out)
    temporary = out.with_name(
        f".{out.name}.lrq-saving"
    )  # one writer; a kill leaves it for the next
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, component in pipeline.components.items():
            if name in quantized:
                save_transformer(component, quantized[name], temporary / name)
            elif hasattr(component, "save_pretrained"):
                component.save_pretrained(temporary / name)
        pipeline.save_config(temporary)
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
    report = quantized.report
    config["quantization_config"] = LRQConfig.from_recipe(report.recipe, report.kept).to_dict()
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_report(report, folder)


def save_report(
    report: QuantReport, folder: Path, drawn: DrawnPictures | None = None, note: str = ""
) -> None:
    """lrq_report.json and report.html in an existing folder, replacing what is there. drawn and
    note: as of html_page."""
    write_text(folder / REPORT_FILE, json.dumps(report.to_dict(), indent=1) + "\n")
    write_text(folder / REPORT_PAGE, html_page(report, drawn, note))


def load_report(path: str | os.PathLike) -> QuantReport:
    """What was done to a quantized pipeline or transformer folder; its checkpoint is checked to be
    there and of a known version. Without a report, as save_pretrained leaves it, what the
    checkpoint itself tells (checkpoint_report). Raises FileNotFoundError or CheckpointError."""
    folder = Path(path)
    if (folder / TRANSFORMER).is_dir():
        folder = folder / TRANSFORMER
    header = checkpoint.read_header(checkpoint.checkpoint_files(folder))
    file = folder / REPORT_FILE
    if not file.is_file():
        return report_of_checkpoint(header)
    return QuantReport.from_dict(json.loads(file.read_text()))


def is_path(model: str) -> bool:
    """Whether `model` cannot be a hub id, which is OWNER/NAME or NAME."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1


def local_folder(model: str) -> Path:
    """The folder `model`, or, of a hub id, what a report needs of that repository: its checkpoint
    and json files. Raises what huggingface_hub raises."""
    if Path(model).exists() or is_path(model):
        return Path(model)
    from huggingface_hub import snapshot_download

    patterns = [f"{folder}*.{kind}" for folder in ("", "transformer*/") for kind in _KINDS]
    return Path(snapshot_download(model, allow_patterns=patterns))


def check_writable(out: str | os.PathLike) -> Path:
    """`out` as a path when a new folder can be made there; called before any long work.

    Raises FileExistsError when it exists and is not an empty folder, OSError when no folder can be
    made there, or replaced.
    """
    out = Path(out)
    if not out.name or out.name == ".." or out.is_symlink():
        out = out.resolve()
    if out.is_mount() or out == Path.cwd():
        what = "a mount point" if out.is_mount() else "the current folder"
        raise OSError(f"{out} is {what}, which a finished folder cannot replace; name a new folder")
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

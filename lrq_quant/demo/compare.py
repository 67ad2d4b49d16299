"""The demo: the bundled model in bf16 and quantized, on the same captions and seeds.

Each scheme is quantized, saved, reloaded from its folder and only then run, so that the whole path
is what is compared. PSNR is against the bf16 picture of the same caption and seed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from lrq_quant.demo import load_demo_pipeline
from lrq_quant.demo.checker import check_batch
from lrq_quant.demo.pipeline import ShapesPipeline, prompt_generators
from lrq_quant.demo.scenes import heldout_captions, training_captions
from lrq_quant.work_folder import write_text

SCHEMES = ("w4a8", "w4a4", "w3a4")
BASELINE = "bf16"
CALIBRATION_CAPTIONS = 16
CAPTION_SEED = 2025  # captions and noise of the comparison
BATCH = 64
GRID_ROWS = 16
_MARK = ".of-the-demo"  # in a folder that the demo made, and may replace
_CELL, _MARGIN, _HEADER, _TEXT = 96, 8, 22, 18

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Drawn:
    """Pictures fp32 [P, 32, 32, 3] in 0..1 and seconds a picture."""

    pictures: np.ndarray
    seconds_per_image: float


def run_demo(
    out: Path,
    device: torch.device | str,
    *,
    prompts: int,
    schemes: Sequence[str] = SCHEMES,
    progress: Progress = print,
) -> dict[str, dict[str, Any]]:
    """Quantize the bundled model to every scheme, compare with bf16 on `prompts` held-out captions,
    and write grid.png, report.json and the quantized folders under `out`. Returns the report.

    Folders of an earlier demo are replaced; raises FileExistsError for others, before drawing."""
    from lrq_quant import QuantRecipe
    from lrq_quant.pipeline_io import check_writable, load_pipeline, quantize_pipeline

    for scheme in schemes:
        folder = out / "models" / scheme
        if not (folder / _MARK).exists():
            check_writable(folder)
    out.mkdir(parents=True, exist_ok=True)
    captions = heldout_captions(prompts, CAPTION_SEED)
    baseline = load_demo_pipeline(device)
    progress(f"drawing {prompts} held-out captions in bf16 on {device}")
    drawn = {BASELINE: draw(baseline, captions)}
    report = {BASELINE: _row(drawn[BASELINE], drawn[BASELINE], captions)}
    report[BASELINE] |= {"weight_bits": 16.0, "checkpoint_bytes": _dense_bytes(baseline)}
    for scheme in schemes:
        progress(f"{scheme}: quantizing, saving, reloading, drawing")
        folder = out / "models" / scheme
        _remove_own(folder)
        quantization = quantize_pipeline(
            load_demo_pipeline(device),
            QuantRecipe.from_name(scheme),
            training_captions(CALIBRATION_CAPTIONS),
            folder,
        )
        (folder / _MARK).touch()
        pipeline = load_pipeline(folder, device=device)
        drawn[scheme] = draw(pipeline, captions)
        report[scheme] = _row(drawn[scheme], drawn[BASELINE], captions)
        report[scheme] |= {
            "weight_bits": quantization.weight_bits,
            "checkpoint_bytes": _checkpoint_bytes(folder),
        }
    write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    draw_grid({name: d.pictures for name, d in drawn.items()}, captions, out / "grid.png")
    return report


def draw(pipeline: ShapesPipeline, captions: Sequence[str]) -> Drawn:
    """All captions, picture i from seed i, in batches."""
    pipeline.set_progress_bar_config(disable=True)
    generators = prompt_generators(len(captions), CAPTION_SEED)
    pictures = []
    start = time.perf_counter()
    for first in range(0, len(captions), BATCH):
        rows = slice(first, first + BATCH)
        images = pipeline(list(captions[rows]), generator=generators[rows], output_type="np")
        pictures.append(images.images)
    seconds = time.perf_counter() - start
    return Drawn(np.concatenate(pictures), seconds / len(captions))


def psnr_db(pictures: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each picture in dB; 8-bit pictures, capped at 99 when equal."""
    difference = _to_8_bit(pictures).astype(np.float64) - _to_8_bit(reference)
    error = np.square(difference).mean(axis=(1, 2, 3))
    return np.where(error > 0, 10 * np.log10(255.0**2 / np.maximum(error, 1e-12)), 99.0)


def table(report: dict[str, dict[str, Any]]) -> str:
    """The report as a short table."""
    lines = ["scheme  PSNR dB  prompts right  bits/weight  checkpoint MB  s/image"]
    for name, row in report.items():
        psnr = "      -" if row["psnr_db"] is None else f"{row['psnr_db']:7.1f}"
        lines.append(
            f"{name:<6}  {psnr}  {row['prompt_accuracy']:12.1%}  {row['weight_bits']:11.2f}"
            f"  {row['checkpoint_bytes'] / 1e6:13.2f}  {row['seconds_per_image']:7.3f}"
        )
    return "\n".join(lines)


def draw_grid(pictures: dict[str, np.ndarray], captions: Sequence[str], path: Path) -> None:
    """One row a caption, one column a scheme, the caption above its row."""
    rows = min(GRID_ROWS, len(captions))
    column, row_height = _CELL + _MARGIN, _CELL + _TEXT + _MARGIN
    width = max(_MARGIN + len(pictures) * column, 430)
    grid = Image.new("RGB", (width, _HEADER + rows * row_height), "white")
    pen = ImageDraw.Draw(grid)
    for position, (name, images) in enumerate(pictures.items()):
        left = _MARGIN + position * column
        pen.text((left, 5), name, fill="black")
        for index in range(rows):
            cell = Image.fromarray(_to_8_bit(images[index])).resize((_CELL, _CELL), Image.NEAREST)
            grid.paste(cell, (left, _HEADER + index * row_height + _TEXT))
    for index in range(rows):
        pen.text((_MARGIN, _HEADER + index * row_height + 3), captions[index], fill="black")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    grid.save(temporary, format="PNG")
    os.replace(temporary, path)


def _row(drawn: Drawn, baseline: Drawn, captions: Sequence[str]) -> dict[str, Any]:
    verdicts = check_batch(drawn.pictures, captions)
    same = drawn is baseline
    psnr = None if same else float(np.median(psnr_db(drawn.pictures, baseline.pictures)))
    return {
        "psnr_db": psnr,
        "prompt_accuracy": sum(verdict.right for verdict in verdicts) / len(verdicts),
        "prompts": len(captions),
        "seconds_per_image": drawn.seconds_per_image,
    }


def _to_8_bit(pictures: np.ndarray) -> np.ndarray:
    return (pictures.clip(0, 1) * 255).round().astype(np.uint8)


def _dense_bytes(pipeline: ShapesPipeline) -> int:
    parameters = pipeline.transformer.parameters()
    return sum(p.numel() * p.element_size() for p in parameters)


def _checkpoint_bytes(folder: Path) -> int:
    from lrq_kernels.checkpoint import checkpoint_files

    return sum(file.stat().st_size for file in checkpoint_files(folder / "transformer"))


def _remove_own(folder: Path) -> None:
    """Remove a quantized folder that an earlier run of the demo left, and nothing else."""
    if (folder / _MARK).exists():
        shutil.rmtree(folder)

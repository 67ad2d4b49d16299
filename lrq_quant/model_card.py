"""The model card of a quantized pipeline folder, from its report: lrq card FOLDER --base ID."""

from __future__ import annotations

import os
from collections import Counter
from importlib import resources
from pathlib import Path
from statistics import median

from lrq_kernels.checkpoint import checkpoint_files

from .pipeline_io import TRANSFORMER, load_report
from .report import QuantReport


def model_card(folder: str | os.PathLike, base_model: str) -> str:
    """docs/model_card.md, filled in. folder: of a quantized pipeline or transformer; base_model:
    hub id of what it was quantized from. Raises what load_report raises."""
    path, report = Path(folder), load_report(folder)
    inner = path / TRANSFORMER
    is_pipeline = inner.is_dir()
    files = checkpoint_files(inner if is_pipeline else path)
    template = resources.files("lrq_quant").joinpath("docs/model_card.md").read_text()
    return template.format(
        base_model=base_model,
        title=path.absolute().name,
        model_class=report.model_class,
        loader="DiffusionPipeline" if is_pipeline else report.model_class,
        loaded="pipeline" if is_pipeline else "transformer",
        schemes=_schemes(report),
        coverage=f"{report.coverage:.2%}",
        weight_bits=f"{report.weight_bits:.2f}",
        size=f"{sum(file.stat().st_size for file in files) / 1e9:.2f} GB",
        calibration="yes" if report.calibrated else "none, from the weights alone",
        output_db=_output_db(report),
        kept=", ".join(dict.fromkeys(kept.why for kept in report.kept)) or "nothing",
    )


def _schemes(report: QuantReport) -> str:
    counts = Counter(linear.scheme.name.upper() for linear in report.linears)
    return ", ".join(f"{scheme} ({count} linears)" for scheme, count in counts.most_common())


def _output_db(report: QuantReport) -> str:
    found = [linear.output_sqnr_db for linear in report.linears]
    measured = [db for db in found if db is not None]
    return f"{median(measured):.1f} dB, {min(measured):.1f} dB" if measured else "not measured"

"""lrq_quant: calibrates and quantizes diffusion transformers, offline.

QuantRecipe says what is quantized and how, quantize_model does it; collect_stats, choose_rotation
and fit_twin_log are its three steps.
"""

from __future__ import annotations

from .calibration import ActivationStats, collect_stats
from .pipeline import QuantizedModel, quantize_linear, quantize_model
from .recipe import CalibrationOptions, QuantPlan, QuantRecipe, SearchOptions
from .report import LinearReport, QuantReport
from .rotation_search import RotationChoice, choose_rotation
from .smoothing import smooth_scale
from .twin_log import fit_twin_log, fit_twin_log_paper

__all__ = [
    "ActivationStats",
    "CalibrationOptions",
    "LinearReport",
    "QuantPlan",
    "QuantRecipe",
    "QuantReport",
    "QuantizedModel",
    "RotationChoice",
    "SearchOptions",
    "choose_rotation",
    "collect_stats",
    "fit_twin_log",
    "fit_twin_log_paper",
    "quantize_linear",
    "quantize_model",
    "smooth_scale",
]

"""lrq_quant: calibrates and quantizes diffusion transformers, offline.

QuantRecipe says what is quantized and how, quantize_model does it; collect_stats, choose_rotation
and fit_twin_log are its three steps.

Importing it makes "lrq" a quantization method of diffusers and transformers: from_pretrained loads
quantized folders and takes quantization_config=LRQConfig("w4a8"). That imports both, which costs
more than this package does; deferring it would leave from_pretrained ignorant in one of two import
orders.
"""

from __future__ import annotations

from . import diffusers_backend, transformers_backend
from .auto_family import auto_family
from .calibration import ActivationStats, collect_stats
from .checkup import Checkup, check
from .config import LRQConfig
from .diffusers_backend import LRQQuantizer
from .families import Family, SharedInput, register_family
from .folded_permutations import fold_permutations, folded_permutations, unfold_permutations
from .fused_blocks import fuse_blocks, fused_blocks, unfuse_blocks
from .fused_projections import fuse_projections, fused_projections, unfuse_projections
from .mixed_precision import BitBudget, budgeted_recipe
from .pipeline import QuantizedModel, quantize_linear, quantize_model
from .recipe import CalibrationOptions, QuantPlan, QuantRecipe, SearchOptions
from .report import LinearReport, QuantReport
from .rotation_search import RotationChoice, choose_rotation
from .smoothing import smooth_scale
from .step_precision import act_bits_by_step
from .twin_log import fit_twin_log, fit_twin_log_paper

__all__ = [
    "ActivationStats",
    "BitBudget",
    "CalibrationOptions",
    "Checkup",
    "Family",
    "LRQConfig",
    "LRQQuantizer",
    "LinearReport",
    "QuantPlan",
    "QuantRecipe",
    "QuantReport",
    "QuantizedModel",
    "RotationChoice",
    "SearchOptions",
    "SharedInput",
    "act_bits_by_step",
    "auto_family",
    "budgeted_recipe",
    "check",
    "choose_rotation",
    "collect_stats",
    "fit_twin_log",
    "fit_twin_log_paper",
    "fold_permutations",
    "folded_permutations",
    "fuse_blocks",
    "fuse_projections",
    "fused_blocks",
    "fused_projections",
    "quantize_linear",
    "quantize_model",
    "register_family",
    "smooth_scale",
    "unfold_permutations",
    "unfuse_blocks",
    "unfuse_projections",
]

diffusers_backend.register()
transformers_backend.register()

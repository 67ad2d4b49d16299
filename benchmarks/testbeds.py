"""Trained models to measure quality on, with their captions and their checker.

demo            the bundled model, 3.8 M parameters, 32 x 32
demo+mild       the same function with outliers in its activations (benchmarks.outliers)
demo+salient
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.outliers import VARIANTS, inject_outliers
from benchmarks.quality_metrics import DrawScenes
from lrq_quant.demo import load_demo_pipeline
from lrq_quant.demo.checker import check_batch
from lrq_quant.demo.scenes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    SceneSampler,
    heldout_captions,
    training_captions,
)


@dataclass(frozen=True)
class Testbed:
    """A pipeline in bf16, and what belongs to its pictures."""

    __test__ = False  # not a test, whatever pytest thinks of the name

    name: str
    base: str  # without the outliers
    pipeline: Any

    def heldout_captions(self, n: int, seed: int) -> list[str]:
        return heldout_captions(n, seed)

    def calibration_captions(self, n: int) -> list[str]:
        """Of compositions that training showed."""
        return training_captions(n)

    def right(self, pictures: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """Whether each picture [P, H, W, 3] shows its caption, bool [P]."""
        return np.array([verdict.right for verdict in check_batch(pictures, captions)])

    def scenes(self, device: torch.device | str) -> DrawScenes:
        """Draws scenes with what is in them: each kind of thing, and the relation."""
        sampler = SceneSampler(device)
        attributes = torch.tensor(sampler.compositions, device=device)

        def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            batch = sampler.sample(count, generator)
            colour1, shape1, relation, colour2, shape2 = attributes[batch.composition].T
            labels = torch.zeros(count, len(COLOURS) * len(SHAPES) + len(RELATIONS), device=device)
            first, second = colour1 * len(SHAPES) + shape1, colour2 * len(SHAPES) + shape2
            for index in (first, second, len(COLOURS) * len(SHAPES) + relation):
                labels.scatter_(1, index[:, None], 1.0)
            return batch.pictures, labels

        return draw


def load_testbed(name: str, device: torch.device | str, folder: Path | None = None) -> Testbed:
    """`name` is a base, or base+variant. Raises ValueError naming what exists."""
    base, _, variant = name.partition("+")
    if base != "demo" or (variant and variant not in VARIANTS):
        raise ValueError(
            f"load_testbed: name must be 'demo', or it with one of {[*VARIANTS]} as in "
            f"'demo+{next(iter(VARIANTS))}', got {name!r}"
        )
    pipeline = load_demo_pipeline(device)
    pipeline.set_progress_bar_config(disable=True)
    if variant:
        inject_outliers(pipeline.transformer, VARIANTS[variant])
    return Testbed(name, base, pipeline)

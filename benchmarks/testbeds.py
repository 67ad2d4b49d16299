"""Trained models to measure quality on, with their captions and their checker.

demo        the bundled model, 3.8 M parameters, two things in 32 x 32
scenes64    about 28 M parameters, up to three things in 64 x 64; not bundled, the command that
            trains it is in lrq_quant.demo.train
X+mild, X+salient
            the same function with outliers in its activations (benchmarks.outliers)
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
from lrq_quant.demo.pipeline import load_pipeline
from lrq_quant.demo.scenes import (
    RELATIONS,
    WORLDS,
    SceneSampler,
    World,
    heldout_captions,
    training_captions,
)

TRAINED_FOLDER = Path("build/testbeds")


@dataclass(frozen=True)
class Testbed:
    """A pipeline in bf16, and what belongs to its pictures."""

    __test__ = False  # not a test, whatever pytest thinks of the name

    name: str
    base: str  # without the outliers: the name of a world
    pipeline: Any

    @property
    def world(self) -> World:
        return WORLDS[self.base]

    def heldout_captions(self, n: int, seed: int) -> list[str]:
        return heldout_captions(n, seed, self.world)

    def calibration_captions(self, n: int) -> list[str]:
        """Of compositions that training showed."""
        return training_captions(n, 0, self.world)

    def right(self, pictures: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """Whether each picture [P, H, W, 3] shows its caption, bool [P]."""
        verdicts = check_batch(pictures, captions, self.world)
        return np.array([verdict.right for verdict in verdicts])

    def scenes(self, device: torch.device | str) -> DrawScenes:
        """Draws scenes with what is in them: each kind of thing, and the relations."""
        sampler = SceneSampler(device, world=self.world)
        kinds = len(self.world.colours) * len(self.world.shapes)

        def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            batch = sampler.sample(count, generator)
            # One column more takes what is not there.
            labels = torch.zeros(count, kinds + len(RELATIONS) + 1, device=device)
            relations = torch.where(batch.relations < 0, -1, batch.relations + kinds)
            index = torch.cat([batch.things, relations], dim=1)
            index = torch.where(index < 0, labels.shape[1] - 1, index)
            return batch.pictures, labels.scatter_(1, index, 1.0)[:, :-1]

        return draw


def load_testbed(name: str, device: torch.device | str, folder: Path | None = None) -> Testbed:
    """`name` is a base, or base+variant; folder: of a trained base, by default under
    build/testbeds. Raises ValueError naming what exists, FileNotFoundError for an untrained one."""
    base, _, variant = name.partition("+")
    if base not in WORLDS or (variant and variant not in VARIANTS):
        raise ValueError(
            f"load_testbed: name must be one of {[*WORLDS]}, alone or with one of {[*VARIANTS]} as "
            f"in 'demo+{next(iter(VARIANTS))}', got {name!r}"
        )
    if base == "demo":
        pipeline = load_demo_pipeline(device)
    else:
        folder = folder or TRAINED_FOLDER / base
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(
                f"load_testbed: no trained {base} in {folder}; lrq_quant.demo.train says how"
            )
        pipeline = load_pipeline(folder, device)
    pipeline.set_progress_bar_config(disable=True)
    if variant:
        inject_outliers(pipeline.transformer, VARIANTS[variant])
    return Testbed(name, base, pipeline)

"""The demo model: a small text-to-image diffusion transformer that ships with the package.

Captions describe two coloured shapes and a relation ("a small red circle left of a blue
square"); the model draws them as 32x32 pictures. `scenes` draws and describes, `checker` reads a
picture back, `text` and `pipeline` wrap a stock diffusers PixArtTransformer2DModel, `train` made
the weights. Importing this module loads neither torch nor diffusers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lrq_quant.demo.pipeline import ShapesPipeline

WEIGHTS_FOLDER = Path(__file__).parent / "weights"


def load_demo_pipeline(
    device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> ShapesPipeline:
    """The bundled pipeline on `device`, in `dtype` (bfloat16 by default).

    Raises FileNotFoundError when the weights are not installed.
    """
    import torch

    from lrq_quant.demo.pipeline import load_pipeline

    if not (WEIGHTS_FOLDER / "model_index.json").is_file():
        raise FileNotFoundError(
            f"load_demo_pipeline: no weights in {WEIGHTS_FOLDER}; "
            "train them with: python -m lrq_quant.demo.train --out FOLDER"
        )
    return load_pipeline(WEIGHTS_FOLDER, device, dtype or torch.bfloat16)

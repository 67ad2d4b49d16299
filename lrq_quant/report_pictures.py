"""Pictures of a quality report: a few prompts drawn by the transformer that was quantized and by
what it became, from the same seeds.

The quantized transformer takes the place of the original in the pipeline, which waits on the CPU
meanwhile: the two are never on the GPU together.
"""

from __future__ import annotations

import io
import logging
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from lrq_kernels.linear import has_hooks

from .calibration import Progress
from .report import ComparedPicture

logger = logging.getLogger(__name__)

STAGE = "pictures"
_LARGEST_SIDE = 512  # of what the page holds; PSNR is of the whole picture


@dataclass(frozen=True)
class DrawnPictures:
    """compared: prompt, seed and PSNR; before, after: the same pictures as PNG files, of a video
    its middle frame, reduced to 512 pixels; seconds of one picture, before and after."""

    compared: tuple[ComparedPicture, ...]
    before: tuple[bytes, ...]
    after: tuple[bytes, ...]
    seconds: tuple[float, float]


def picture_seed(prompt: str) -> int:
    """Of the noise: it follows the prompt, as in calibration."""
    return zlib.crc32(prompt.encode("utf-8", "replace"))


class PictureComparison:
    """draw_before with the original, then draw_after with the quantized transformers.

    Pictures are an extra: what stops them is logged, kept as `note` and never raised, so that it
    cannot cost a quantization that took hours.
    """

    def __init__(
        self,
        pipeline: Any,
        names: Sequence[str],
        prompts: Sequence[str],
        call_options: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """names: of the transformers in the pipeline; call_options: of the pipeline's call."""
        self.pipeline, self.names, self.prompts = pipeline, names, list(prompts)
        self.options = {**(call_options or {}), "output_type": "np"}
        self.progress = progress
        self.note = ""
        self._before: list[np.ndarray] = []
        self._seconds = 0.0

    def draw_before(self) -> None:
        hooked = [name for name in self.names if has_hooks(getattr(self.pipeline, name))]
        if hooked or getattr(self.pipeline, "hf_device_map", None):
            self._stop("the pipeline is offloaded or spread over devices")
            return
        try:
            self._before, self._seconds = self._draw(0)
        except Exception as error:  # whatever a pipeline raises
            self._stop(f"{type(error).__name__}: {error}")

    def draw_after(self, load: Callable[[str, nn.Module], nn.Module]) -> DrawnPictures | None:
        """load(name, original): the quantized transformer on the device that the original was on.
        None where there is nothing to compare; the pipeline is as it was afterwards."""
        if self.note or not self._before:
            return None
        try:
            with _replaced(self.pipeline, self.names, load):
                after, seconds = self._draw(len(self.prompts))
        except Exception as error:  # as above
            self._stop(f"{type(error).__name__}: {error}")
            return None
        pairs = list(zip(self.prompts, self._before, after, strict=True))
        return DrawnPictures(
            tuple(ComparedPicture(p, picture_seed(p), psnr_db(a, b)) for p, b, a in pairs),
            tuple(preview(picture) for picture in self._before),
            tuple(preview(picture) for picture in after),
            (self._seconds, seconds),
        )

    def _draw(self, done: int) -> tuple[list[np.ndarray], float]:
        """uint8 [H, W, 3] or [F, H, W, 3] of every prompt, and seconds of one."""
        pictures = []
        start = time.perf_counter()
        # One by one: a batch would take more memory than calibration, which uses one.
        for prompt in self.prompts:
            generator = torch.Generator().manual_seed(picture_seed(prompt))
            drawn = self.pipeline(prompt=[prompt], generator=[generator], **self.options)
            pictures.append(_to_8_bit(drawn))
            if self.progress is not None:
                self.progress(STAGE, done + len(pictures), 2 * len(self.prompts))
        return pictures, (time.perf_counter() - start) / max(1, len(pictures))

    def _stop(self, why: str) -> None:
        self.note = f"No pictures were compared: {why}"
        logger.warning(self.note)


def psnr_db(picture: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 pictures or videos of one shape; inf when equal."""
    error = float(np.square(picture.astype(np.float64) - reference).mean())
    return 10 * math.log10(255.0**2 / error) if error else math.inf


def preview(picture: np.ndarray) -> bytes:
    """PNG of uint8 [H, W, 3], or of the middle of [F, H, W, 3], at most 512 pixels a side."""
    image = Image.fromarray(picture[picture.shape[0] // 2] if picture.ndim == 4 else picture)
    image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return file.getvalue()


def _to_8_bit(drawn: Any) -> np.ndarray:
    """The one picture or video of a pipeline's result, in 0..1."""
    found = getattr(drawn, "images", None)
    array = np.asarray(getattr(drawn, "frames", None) if found is None else found)
    if array.ndim not in (4, 5) or array.shape[0] != 1 or array.shape[-1] != 3:
        raise ValueError(f"a picture must be [1, H, W, 3] or a video, got shape {array.shape}")
    return (np.nan_to_num(array[0].astype(np.float32)).clip(0, 1) * 255).round().astype(np.uint8)


@contextmanager
def _replaced(
    pipeline: Any, names: Sequence[str], load: Callable[[str, nn.Module], nn.Module]
) -> Iterator[None]:
    originals = {name: getattr(pipeline, name) for name in names}
    devices = {name: next(model.parameters()).device for name, model in originals.items()}
    quantized: dict[str, nn.Module] = {}
    try:
        for name, model in originals.items():
            quantized[name] = load(name, model)
            model.to("cpu")
            setattr(pipeline, name, quantized[name].to(devices[name]))
        yield
    finally:
        for name, model in originals.items():
            setattr(pipeline, name, model)
        for module in quantized.values():
            module.to("cpu")
        for name, model in originals.items():
            model.to(devices[name])

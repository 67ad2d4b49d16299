"""Activation bits by denoising step: the same codes run as A8 or A16.

The first and the last steps decide most about a picture.  Running those few with 16-bit activations
costs little time and no memory, since only what is done with the input changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lrq_kernels import get_act_bits, set_act_bits


class act_bits_by_step:  # noqa: N801 - used like a function
    """A pipeline callback that gives each step its activation bits, within a with statement.

        steps = [16, 16, *[None] * 25, 16]
        with act_bits_by_step(pipeline.transformer, steps) as callback:
            pipeline(prompt, num_inference_steps=28, callback_on_step_end=callback)

    bits: 8, 16 or None (what the checkpoint says) of every step.  Pipelines that call
    callback(step, timestep, latents) take it too.  On exit the model is as before.  Raises
    ValueError for another width, and in the pipeline for a step that bits does not have.
    """

    def __init__(self, model: nn.Module, bits: Sequence[int | None]) -> None:
        self._model, self._bits = model, list(bits)
        unknown = [width for width in self._bits if width not in (None, 8, 16)]
        if unknown or not self._bits:
            raise ValueError(
                f"act_bits_by_step: bits must be 8, 16 or None for every step, got {bits!r}"
            )

    def __enter__(self) -> act_bits_by_step:
        self._before = get_act_bits(self._model)
        set_act_bits(self._model, self._bits[0])
        return self

    def __exit__(self, *_: object) -> None:
        set_act_bits(self._model, self._before)

    def __call__(self, *arguments: Any) -> Any:
        """(pipeline, step, timestep, kwargs) -> kwargs, or (step, timestep, latents)."""
        step = arguments[0] if len(arguments) == 3 else arguments[1]
        if step >= len(self._bits):
            raise ValueError(
                f"act_bits_by_step: bits must have an entry for every step, got "
                f"{len(self._bits)}; the pipeline is at step {step}"
            )
        # After the last step for the first one, should the pipeline be called again.
        set_act_bits(self._model, self._bits[(step + 1) % len(self._bits)])
        return arguments[3] if len(arguments) > 3 else None

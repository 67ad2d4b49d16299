"""ShapesPipeline: a diffusers pipeline around the demo transformer."""

# No annotations of __future__: diffusers up to 0.38 takes the types of components as they are.

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from lrq_quant.demo.text import CaptionEncoder
from lrq_quant.older_diffusers import dtype_option

DEFAULT_STEPS = 20
DEFAULT_GUIDANCE = 2.0


def prompt_generators(count: int, seed: int = 0) -> list[torch.Generator]:
    """One CPU generator a prompt: picture i depends on `seed` and i, not on the batch."""
    return [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(count)]


class ShapesPipeline(DiffusionPipeline):
    """Draws captions of coloured shapes, in pixel space (there is no VAE).

    The transformer predicts the velocity of a straight path from picture to noise; the scheduler
    integrates it with deterministic Euler steps. Latents stay fp32 whatever the transformer's
    dtype.
    """

    model_cpu_offload_seq = "text_encoder->transformer"

    def __init__(
        self,
        transformer: PixArtTransformer2DModel,
        text_encoder: CaptionEncoder,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, text_encoder=text_encoder, scheduler=scheduler
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = DEFAULT_STEPS,
        guidance_scale: float = DEFAULT_GUIDANCE,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict], Any] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Pictures of `prompt`, one a caption.

        generator: one a prompt makes every picture independent of its batch; a single generator
        is drawn from in prompt order. Both halves of guidance go through one forward;
        guidance_scale <= 1 turns guidance off. output_type: "pil", "np" (fp32 [B, 32, 32, 3] in
        0..1) or "pt" (fp32 [B, 3, 32, 32] in 0..1). callback_on_step_end is called as
        callback(pipeline, step, timestep, {}) after each step.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("ShapesPipeline: prompt must hold at least one caption, got none")
        if num_inference_steps < 1:
            raise ValueError(
                f"ShapesPipeline: num_inference_steps must be positive, got {num_inference_steps}"
            )
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(
                f"ShapesPipeline: output_type must be 'pil', 'np' or 'pt', got {output_type!r}"
            )
        device = self._execution_device
        guided = guidance_scale > 1
        captions = [""] * len(prompts) + prompts if guided else prompts
        embeddings, mask = self.text_encoder.encode(captions, device)
        embeddings = embeddings.to(self.transformer.dtype)

        # The last step goes from 1/n (before the shift) to 0; the scheduler's own default spends
        # it between 0.001 and 0.
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        latents = self._initial_noise(len(prompts), generator, device)
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            inputs = torch.cat([latents, latents]) if guided else latents
            velocity = self.transformer(
                inputs.to(self.transformer.dtype),
                encoder_hidden_states=embeddings,
                encoder_attention_mask=mask,
                timestep=timestep.expand(len(inputs)),
                return_dict=False,
            )[0].float()
            if guided:
                empty, captioned = velocity.chunk(2)
                velocity = empty + guidance_scale * (captioned - empty)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                callback_on_step_end(self, step, timestep, {})

        pictures = (latents / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            pictures = pictures.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            pictures = VaeImageProcessor.numpy_to_pil(pictures)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def _initial_noise(
        self,
        count: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        device: torch.device,
    ) -> torch.Tensor:
        """fp32 [count, C, H, W]; every picture is drawn by itself, on its generator's device."""
        if generator is None or isinstance(generator, torch.Generator):
            generators = [generator] * count
        else:
            generators = list(generator)
            if len(generators) != count:
                raise ValueError(
                    f"ShapesPipeline: generator must be one or one a prompt ({count}), "
                    f"got {len(generators)}"
                )
        config = self.transformer.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        noise = [
            torch.randn(shape, generator=g, device=device if g is None else g.device)
            for g in generators
        ]
        return torch.stack([n.to(device) for n in noise])


def load_pipeline(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> ShapesPipeline:
    """The pipeline that save_pretrained wrote to `folder`, on `device` in `dtype`."""
    return ShapesPipeline.from_pretrained(folder, **dtype_option(dtype)).to(device)

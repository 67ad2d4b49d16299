"""Random inputs against what diffusers' pipelines really pass: names, shapes and dtypes.

A pipeline of a tiny transformer whose forward only notes its arguments, without text encoders and
VAE: texts come from the inputs, and are as long as the pipeline's default allows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from packaging.version import Version
from tiny_families import TINY_FAMILIES, build
from tiny_models import DIFFUSERS
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lrq_quant.model_inputs import model_inputs

BF16 = torch.bfloat16
Inputs = Mapping[str, Any]
# What pipelines pass on from their caller.
PASSED_ON = {"return_dict", "attention_kwargs", "joint_attention_kwargs"}


@dataclass(frozen=True)
class Case:
    """texts(inputs): what the pipeline would have encoded; call: arguments without guidance by a
    second forward; changes: of the tiny configuration; pipe: attributes that its VAE would give
    and its own configuration."""

    family: str
    pipeline: str
    texts: Callable[[Inputs], dict[str, Any]]
    call: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    pipe: Mapping[str, Any] = field(default_factory=dict)
    scheduler: str = "FlowMatchEulerDiscreteScheduler"
    size: int = 64


def _text(inputs: Inputs) -> dict[str, Any]:
    return {"prompt_embeds": inputs["encoder_hidden_states"]}


def _pooled(inputs: Inputs) -> dict[str, Any]:
    return _text(inputs) | {"pooled_prompt_embeds": inputs["pooled_projections"]}


def _masked(inputs: Inputs) -> dict[str, Any]:
    return _text(inputs) | {"prompt_attention_mask": inputs["encoder_attention_mask"]}


def _chroma(inputs: Inputs) -> dict[str, Any]:
    """The tokens of the picture are added to the mask."""
    tokens = inputs["encoder_hidden_states"].shape[1]
    return _text(inputs) | {"prompt_attention_mask": inputs["attention_mask"][:, :tokens]}


def _qwen(inputs: Inputs) -> dict[str, Any]:
    """A tokenizer's mask, of texts that are equally long."""
    text = inputs["encoder_hidden_states"]
    return _text(inputs) | {"prompt_embeds_mask": torch.ones(text.shape[:2], dtype=torch.long)}


def _hidream(inputs: Inputs) -> dict[str, Any]:
    return {
        "prompt_embeds_t5": inputs["encoder_hidden_states_t5"],
        "prompt_embeds_llama3": inputs["encoder_hidden_states_llama3"],
        "pooled_prompt_embeds": inputs["pooled_embeds"],
    }


NO_GUIDANCE = {"guidance_scale": 1.0}
UNBINNED = {"use_resolution_binning": False}
PIXART = {**NO_GUIDANCE, **UNBINNED, "negative_prompt": None}
ALPHA = {"sample_size": 128, "use_additional_conditions": None}
T2V = {"image_dim": None, "added_kv_proj_dim": None}
TI2V = {**T2V, "in_channels": 48, "out_channels": 48}
TI2V_PIPE = {"vae_scale_factor_spatial": 16, "expand_timesteps": True}
ROTARY = {"use_rotary_positional_embeddings": True}
DDIM, DPM = "CogVideoXDDIMScheduler", "DPMSolverMultistepScheduler"

CASES = {
    "flux": Case("flux", "FluxPipeline", _pooled),
    "flux2": Case("flux2", "Flux2Pipeline", _text),
    "flux2-klein": Case(
        "flux2", "Flux2KleinPipeline", _text, NO_GUIDANCE, {"guidance_embeds": False}
    ),
    "chroma": Case("chroma", "ChromaPipeline", _chroma, {"guidance_scale": 0.0}),
    "pixart-sigma": Case("pixart", "PixArtSigmaPipeline", _masked, PIXART, scheduler=DPM),
    "pixart-alpha": Case("pixart", "PixArtAlphaPipeline", _masked, PIXART, ALPHA, scheduler=DPM),
    "sd3.5": Case("sd3.5", "StableDiffusion3Pipeline", _pooled, NO_GUIDANCE),
    "wan": Case("wan", "WanPipeline", _text, NO_GUIDANCE, T2V),
    "wan2.2-ti2v": Case("wan", "WanPipeline", _text, NO_GUIDANCE, TI2V, TI2V_PIPE),
    "hunyuan-video": Case(
        "hunyuan-video", "HunyuanVideoPipeline", lambda inputs: _pooled(inputs) | _masked(inputs)
    ),
    "cogvideox": Case("cogvideox", "CogVideoXPipeline", _text, NO_GUIDANCE, scheduler=DDIM),
    "cogvideox-rotary": Case(
        "cogvideox", "CogVideoXPipeline", _text, NO_GUIDANCE, ROTARY, scheduler=DDIM
    ),
    "cogvideox1.5": Case(
        "cogvideox",
        "CogVideoXPipeline",
        _text,
        NO_GUIDANCE,
        {**ROTARY, "patch_size_t": 2, "sample_frames": 81},
        scheduler=DDIM,
    ),
    "ltx-video": Case("ltx-video", "LTXPipeline", _masked, NO_GUIDANCE),
    "qwen-image": Case("qwen-image", "QwenImagePipeline", _qwen, {"true_cfg_scale": 1.0}),
    "z-image": Case(
        "z-image",
        "ZImagePipeline",
        lambda inputs: {"prompt_embeds": inputs["cap_feats"]},
        {"guidance_scale": 0.0},
    ),
    "sana": Case(
        "sana",
        "SanaPipeline",
        _masked,
        {**NO_GUIDANCE, **UNBINNED},
        {"guidance_embeds": False},
        scheduler=DPM,
    ),
    "sana-sprint": Case("sana", "SanaSprintPipeline", _masked, UNBINNED, scheduler="SCMScheduler"),
    "lumina2": Case("lumina2", "Lumina2Pipeline", _masked, NO_GUIDANCE),
    # The pipeline scales every other size to this area.
    "hidream": Case("hidream", "HiDreamImagePipeline", _hidream, NO_GUIDANCE, size=1024),
}
# Texts of tiny models are bound by their tables of places; SD3 adds 77 tokens of CLIP.
SHORTER = {"z-image", "lumina2", "cogvideox", "cogvideox-rotary", "cogvideox1.5"}
CLIP_TOKENS = {"sd3.5": 77}


class _Noted(Exception):
    pass


def _class(case: Case) -> Any:
    return getattr(diffusers, case.pipeline)


def _parts(case: Case, transformer: nn.Module) -> dict[str, Any]:
    """All parts of the pipeline: a transformer, a scheduler, otherwise None."""
    parameters = list(inspect.signature(_class(case).__init__).parameters.values())[1:]
    parts = {p.name: None for p in parameters if p.default is inspect.Parameter.empty}
    scheduler = getattr(diffusers, case.scheduler)()
    return {**parts, "transformer": transformer, "scheduler": scheduler}


def passed(case: Case, model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """What the pipeline gives to the first forward."""
    names = [*inspect.signature(type(model).forward).parameters][1:]
    given: dict[str, Any] = {}

    def note(*args: Any, **kwargs: Any) -> None:
        given.update(zip(names, args, strict=False))
        given.update(kwargs)
        raise _Noted

    model.forward = note
    pipeline = _class(case)(**_parts(case, model))
    for name, value in case.pipe.items():
        if name in pipeline.config:
            pipeline.register_to_config(**{name: value})
        else:
            setattr(pipeline, name, value)
    pipeline.set_progress_bar_config(disable=True)
    call = {"height": case.size, "width": case.size, "num_inference_steps": 2}
    with pytest.raises(_Noted):
        pipeline(**call, output_type="latent", **case.texts(inputs), **case.call)
    return {name: value for name, value in given.items() if name not in PASSED_ON}


def described(inputs: Inputs) -> dict[str, Any]:
    """Shapes and dtypes for tensors; arguments that are None are left out, as the class does."""
    given = {name: value for name, value in inputs.items() if value is not None}
    return tree_map_only(Tensor, lambda tensor: (tuple(tensor.shape), tensor.dtype), given)


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_passes_the_same(name: str):
    case = CASES[name]
    if name == "qwen-image" and DIFFUSERS < Version("0.37"):
        pytest.skip(f"QwenImagePipeline of diffusers {DIFFUSERS} passes a mask of ones")
    tiny = TINY_FAMILIES[case.family].make()
    own = {key: value for key, value in tiny.config.items() if not key.startswith("_")}
    model = build(type(tiny).__name__, **{**own, **case.changes}).to(BF16)
    inputs = model_inputs(
        type(model).__name__, model.config, size=case.size, batch=2, device="cpu", dtype=BF16
    )
    assert described(inputs) == described(passed(case, model, inputs))
    if name not in SHORTER:
        texts = case.texts(inputs)
        text = texts.get("prompt_embeds", texts.get("prompt_embeds_t5"))
        default = inspect.signature(_class(case).__call__).parameters["max_sequence_length"].default
        assert text.shape[1] == default + CLIP_TOKENS.get(name, 0)


# Pictures beside the noise; the others encode videos first, which no tiny VAE stands in for here.
WITHOUT_A_PIPELINE = {"z-image-omni", "wan-vace", "wan-animate"}


def test_every_family_has_a_pipeline_here():
    assert {case.family for case in CASES.values()} == {*TINY_FAMILIES} - WITHOUT_A_PIPELINE

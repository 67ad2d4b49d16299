"""Puts a checkpoint into a model: load_quantized replaces linears, model_states takes them out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from . import checkpoint
from .checkpoint import CheckpointError, LinearState
from .input_quantizer import InputQuantizer
from .linear import LRQLinear


def load_quantized(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> nn.Module:
    """Replace the linears of `model` that `path` holds quantized and fill in everything else.

    The model is the unquantized one, of the class that the checkpoint names; its parameters may
    be on the meta device. Quantized and dense tensors land on `device`; floating dense tensors are
    cast to `dtype` when it is given, those of modules named in the model's _keep_in_fp32_modules
    to fp32, as diffusers does. Everything is checked before the model is changed: raises
    CheckpointError naming what is missing, extra or of another shape. Returns the model.
    """
    loaded = checkpoint.load(path, device=device, verify=verify)
    _check_dense(model, loaded)
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    dense = {
        name: tensor.to(torch.float32 if kept & set(name.split(".")) else dtype)
        if dtype is not None and tensor.is_floating_point()
        else tensor
        for name, tensor in loaded.dense.items()
    }
    floats = (tensor.dtype for tensor in dense.values() if tensor.is_floating_point())
    linears = build_linears(loaded.states, dtype or next(floats, torch.float32))
    # All that can fail, for want of memory too, is done: the model is never half replaced.
    for name, linear in linears.items():
        model.set_submodule(name, linear)
    for name, tensor in dense.items():
        _assign(model, name, tensor)
    return model.eval()


def build_linears(states: Mapping[str, LinearState], dtype: torch.dtype) -> dict[str, LRQLinear]:
    """Linears in place of the states, those of one input with one PreparedInput; every state's
    shared_input must be among them. dtype: of the model around them."""
    inputs: dict[str, InputQuantizer] = {}
    linears = {}
    for name, state in states.items():
        owner = state.shared_input or name
        if owner not in inputs:
            first = states[owner]
            inputs[owner] = InputQuantizer(
                first.in_features,
                first.scheme,
                first.smooth_scale,
                first.rotation,
                first.low_rank_down,
            )
        linears[name] = LRQLinear.from_state(state, inputs[owner], name, dtype)
    return linears


def model_states(model: nn.Module) -> tuple[dict[str, LinearState], dict[str, Tensor]]:
    """The inverse: canonical states of all LRQLinears (fused ones split again) and the dense
    tensors of the rest, as checkpoint.save takes them."""
    states: dict[str, LinearState] = {}
    owners: dict[int, str] = {}
    skip: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, LRQLinear):
            continue
        skip.append(name + ".")
        for part, state in module.part_states().items():
            full = part or name
            owner = full
            if module.parts_share_input:
                owner = owners.setdefault(id(module.input_quantizer.shared), full)
            shared = None if owner == full else owner
            states[full] = dataclasses.replace(state, shared_input=shared)
    dense = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(tuple(skip))
    }
    return states, dense


def check_model(
    model: nn.Module,
    model_class: str,
    linears: Mapping[str, tuple[int, int, bool]],
    dense: Collection[str],
    *,
    meta_buffers: bool = False,
) -> None:
    """Raise CheckpointError unless a checkpoint of this content is one of `model`: its class, its
    linears (out_features, in_features, bias) and the names of the dense tensors. meta_buffers:
    whoever loads fills buffers that are in no checkpoint."""
    if model_class != type(model).__name__:
        raise CheckpointError(
            f"the checkpoint is of a {model_class}, the model is a {type(model).__name__}"
        )
    modules = dict(model.named_modules())
    for name, sizes in linears.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            got = "nothing" if module is None else type(module).__name__
            raise CheckpointError(f"{name} must be a Linear in the model, got {got}")
        expected = (module.out_features, module.in_features, module.bias is not None)
        if expected != sizes:
            raise CheckpointError(
                f"{name}: (out_features, in_features, bias) must be {expected} as in the model, "
                f"the checkpoint has {sizes}"
            )
    replaced = tuple(f"{name}." for name in linears)
    target = {name for name in model.state_dict() if not name.startswith(replaced)}
    missing, extra = sorted(target - set(dense)), sorted(set(dense) - target)
    if missing or extra:
        raise CheckpointError(
            f"dense tensors do not fit the model: missing {missing[:5]}, extra {extra[:5]}"
        )
    if meta_buffers:
        return
    # Non-persistent buffers are in no checkpoint; on meta they would stay empty without a word.
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in dense and not name.startswith(replaced):
            raise CheckpointError(
                f"buffer {name} of the model is on the meta device and not in the checkpoint; "
                "create the model with real buffers (accelerate.init_empty_weights does)"
            )


def _check_dense(model: nn.Module, loaded: checkpoint.Checkpoint) -> None:
    linears = {
        name: (state.out_features, state.in_features, state.bias is not None)
        for name, state in loaded.states.items()
    }
    check_model(model, loaded.model_class, linears, loaded.dense)
    target = model.state_dict()
    for name, tensor in loaded.dense.items():
        if tensor.shape != target[name].shape:
            raise CheckpointError(
                f"{name} must be {list(target[name].shape)} as in the model, "
                f"the checkpoint has {list(tensor.shape)}"
            )


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if leaf in parent._buffers:
        parent._buffers[leaf] = tensor
    else:
        parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

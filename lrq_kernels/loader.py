"""Puts a checkpoint into a model: load_quantized replaces linears, model_states takes them out."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from . import checkpoint
from .checkpoint import CheckpointError, LinearState
from .linear import InputQuantizer, LRQLinear


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
    cast to `dtype` when it is given. Everything is checked before the model is changed: raises
    CheckpointError naming what is missing, extra or of another shape. Returns the model.
    """
    loaded = checkpoint.load(path, device=device, verify=verify)
    _check_model(model, loaded)
    inputs: dict[str, InputQuantizer] = {}
    linears: dict[str, LRQLinear] = {}
    for name, state in loaded.states.items():
        owner = state.shared_input or name
        if owner not in inputs:
            first = loaded.states[owner]
            inputs[owner] = InputQuantizer(
                first.in_features, first.scheme, first.smooth_scale, first.rotation
            )
        linears[name] = LRQLinear.from_state(state, inputs[owner], name)
    dense = {
        name: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        for name, tensor in loaded.dense.items()
    }
    # All that can fail, for want of memory too, is done: the model is never half replaced.
    for name, linear in linears.items():
        model.set_submodule(name, linear)
    for name, tensor in dense.items():
        _assign(model, name, tensor)
    return model.eval()


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
            owner = owners.setdefault(id(module.input_quantizer), full)
            shared = None if owner == full else owner
            states[full] = _with_shared_input(state, shared)
    dense = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(tuple(skip))
    }
    return states, dense


def _with_shared_input(state: LinearState, shared_input: str | None) -> LinearState:
    import dataclasses

    return dataclasses.replace(state, shared_input=shared_input)


def _check_model(model: nn.Module, loaded: checkpoint.Checkpoint) -> None:
    model_class = type(model).__name__
    if loaded.model_class != model_class:
        raise CheckpointError(
            f"the checkpoint is of a {loaded.model_class}, the model is a {model_class}"
        )
    modules = dict(model.named_modules())
    replaced = []
    for name, state in loaded.states.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            got = "nothing" if module is None else type(module).__name__
            raise CheckpointError(f"{name} must be a Linear in the model, got {got}")
        expected = (module.out_features, module.in_features, module.bias is not None)
        got_sizes = (state.out_features, state.in_features, state.bias is not None)
        if expected != got_sizes:
            raise CheckpointError(
                f"{name}: (out_features, in_features, bias) must be {expected} as in the model, "
                f"the checkpoint has {got_sizes}"
            )
        replaced.append(name + ".")
    target = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(tuple(replaced))
    }
    missing = sorted(set(target) - set(loaded.dense))
    extra = sorted(set(loaded.dense) - set(target))
    if missing or extra:
        raise CheckpointError(
            f"dense tensors do not fit the model: missing {missing[:5]}, extra {extra[:5]}"
        )
    for name, tensor in loaded.dense.items():
        if tensor.shape != target[name].shape:
            raise CheckpointError(
                f"{name} must be {list(target[name].shape)} as in the model, "
                f"the checkpoint has {list(tensor.shape)}"
            )
    _check_nothing_on_meta(model, set(loaded.dense), tuple(replaced))


def _check_nothing_on_meta(model: nn.Module, filled: set[str], replaced: tuple[str, ...]) -> None:
    """Non-persistent buffers are in no checkpoint; on meta they would stay empty without a word."""
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in filled and not name.startswith(replaced):
            raise CheckpointError(
                f"buffer {name} of the model is on the meta device and not in the checkpoint; "
                "create the model with real buffers (accelerate.init_empty_weights does)"
            )


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if leaf in parent._buffers:
        parent._buffers[leaf] = tensor
    else:
        parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

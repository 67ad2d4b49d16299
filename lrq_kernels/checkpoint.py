"""THE checkpoint format: one safetensors file, canonical codes, nothing derived, no architecture.

Tensors of a quantized linear `name` are `name.<field>` for the fields below; everything else in
the file is a dense parameter of the model under its own name. Floating data of a quantized linear
is stored as int32 views, so that a loader that casts floats cannot touch it. Linears that share an
input store its smoothing and rotation once, under the first of them; the others name it.

Metadata (strings, as safetensors asks):
    format             "lrq"
    version            "1"
    model_class        class name of the model
    layers             JSON: name -> {scheme fields, in_features, out_features, shared_input?}
    checksums          JSON: tensor name -> CRC-32 of "dtype shape" (as "int32 [64, 16]") and bytes
    metadata_checksum  CRC-32 of model_class, layers and checksums, joined by zero bytes
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .codebook import TwinLogCodebook
from .packing import packed_words
from .rotation import Rotation
from .scheme import DUAL_BLOCK_SIZE, INPUT_FIELDS, ROTATIONS, QuantScheme

FORMAT = "lrq"
VERSION = 1
# diffusers looks for this name in a model folder.
FILE_NAME = "diffusion_pytorch_model.safetensors"


class CheckpointError(ValueError):
    """The file is not an intact lrq checkpoint, or not one of this model."""


class Field(NamedTuple):
    """dtype: as stored. shape: of (N, K, bits). required: by the scheme. float_bits: an int32 view
    of float32. per_input: belongs to the shared input, stored under its first linear."""

    dtype: torch.dtype
    shape: Callable[[int, int, int], tuple[int, ...]]
    shape_text: str
    required: str
    float_bits: bool
    per_input: bool
    meaning: str


FIELDS: dict[str, Field] = {
    "codes": Field(
        torch.int32,
        lambda n, k, b: (n, packed_words(k, b)),
        "[N, ceil(K/32)*b]",
        "always",
        False,
        False,
        "b-bit codes, a little-endian bit stream along K",
    ),
    "levels": Field(
        torch.int8,
        lambda n, k, b: (n, 1 << b),
        "[N, 2^b]",
        "always",
        False,
        False,
        "int8 level of each code, per output row",
    ),
    "weight_scale": Field(
        torch.int32,
        lambda n, k, b: (n,),
        "[N]",
        "always",
        True,
        False,
        "float32 scale of each output row",
    ),
    "bias": Field(
        torch.int32, lambda n, k, b: (n,), "[N]", "optional", True, False, "float32 bias"
    ),
    "smooth_scale": Field(
        torch.int32,
        lambda n, k, b: (k,),
        "[K]",
        "optional",
        True,
        True,
        "float32 factor on each input channel; the weight was divided by it",
    ),
    "signs": Field(
        torch.int8,
        lambda n, k, b: (k,),
        "[K]",
        "hadamard",
        False,
        True,
        "+1 or -1 on each channel before the Hadamard transform",
    ),
    "permutation": Field(
        torch.int32,
        lambda n, k, b: (k,),
        "[K]",
        "optional",
        False,
        True,
        "input channel at each position",
    ),
    "rotation_matrices": Field(
        torch.int32,
        lambda n, k, b: (2, DUAL_BLOCK_SIZE, DUAL_BLOCK_SIZE),
        "[2, 128, 128]",
        "dual",
        True,
        True,
        "float32 orthogonal pair around the permutation",
    ),
}


@dataclass(frozen=True)
class LinearState:
    """One quantized linear in canonical form.

    codes int32 [N, ceil(K/32)*b], levels int8 [N, 2^b], weight_scale fp32 [N], bias fp32 [N],
    smooth_scale fp32 [K], rotation of K channels. shared_input names the linear under which the
    smoothing and rotation of this one are stored; None: under itself.
    """

    codes: Tensor
    levels: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    scheme: QuantScheme
    in_features: int
    out_features: int
    smooth_scale: Tensor | None = None
    rotation: Rotation = field(default_factory=Rotation.none)
    shared_input: str | None = None

    def to(self, device: torch.device | str) -> LinearState:
        import dataclasses

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return dataclasses.replace(
            self,
            codes=self.codes.to(device),
            levels=self.levels.to(device),
            weight_scale=self.weight_scale.to(device),
            bias=move(self.bias),
            smooth_scale=move(self.smooth_scale),
            rotation=self.rotation.to(device),
        )


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: quantized linears, dense tensors by name, and the class of the model."""

    states: dict[str, LinearState]
    dense: dict[str, Tensor]
    model_class: str


def fields_table() -> str:
    """FIELDS as a Markdown table; the README carries it."""
    lines = ["| field | stored as | shape | present | meaning |", "|---|---|---|---|---|"]
    for name, spec in FIELDS.items():
        stored = str(spec.dtype).removeprefix("torch.")
        if spec.float_bits:
            stored += " view of float32"
        present = spec.required
        if present in ROTATIONS:
            present = f"rotation {present}"
        if spec.per_input:
            present += ", once per input"
        lines.append(f"| `{name}` | {stored} | {spec.shape_text} | {present} | {spec.meaning} |")
    return "\n".join(lines)


# ---- one linear ---------------------------------------------------------------------------------


def state_tensors(state: LinearState, *, with_input: bool) -> dict[str, Tensor]:
    """Field name -> stored tensor. with_input False leaves out what a shared input stores once."""
    rotation = state.rotation
    values: dict[str, Tensor | None] = {
        "codes": state.codes,
        "levels": state.levels,
        "weight_scale": state.weight_scale,
        "bias": state.bias,
        "smooth_scale": state.smooth_scale,
        "signs": rotation.signs,
        "permutation": rotation.permutation,
        "rotation_matrices": rotation.matrices,
    }
    tensors = {}
    for name, value in values.items():
        spec = FIELDS[name]
        if value is None or (spec.per_input and not with_input):
            continue
        if spec.float_bits:
            value = value.detach().to(torch.float32).contiguous().view(torch.int32)
        tensors[name] = value.contiguous()
    return tensors


def state_from_tensors(
    tensors: Mapping[str, Tensor],
    scheme: QuantScheme,
    out_features: int,
    in_features: int,
    where: str,
    shared_input: str | None = None,
) -> LinearState:
    """Inverse of state_tensors. Raises CheckpointError, naming `where`.field, unless every tensor
    has the dtype, shape and values that FIELDS and the scheme ask for."""
    for name in tensors:
        if name not in FIELDS:
            raise CheckpointError(f"{where}.{name} is not a field of the format: {list(FIELDS)}")
    values: dict[str, Tensor | None] = {}
    for name, spec in FIELDS.items():
        tensor = tensors.get(name)
        if tensor is None:
            if spec.required in ("always", scheme.rotation):
                raise CheckpointError(f"{where}.{name} is missing")
            values[name] = None
            continue
        shape = spec.shape(out_features, in_features, scheme.weight_bits)
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{where}.{name} must be {spec.dtype} {list(shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        values[name] = tensor.view(torch.float32) if spec.float_bits else tensor
    rotation = Rotation(
        scheme.rotation,
        scheme.block_size,
        values["signs"],
        values["permutation"],
        values["rotation_matrices"],
    )
    smooth, bias = values["smooth_scale"], values["bias"]
    try:
        rotation.validate(in_features)
        TwinLogCodebook(values["levels"], values["weight_scale"])
        if smooth is not None and not bool(((smooth > 0) & torch.isfinite(smooth)).all()):
            raise ValueError("smooth_scale must be positive and finite")
        if bias is not None and not bool(torch.isfinite(bias).all()):
            raise ValueError("bias must be finite")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    return LinearState(
        codes=values["codes"],
        levels=values["levels"],
        weight_scale=values["weight_scale"],
        bias=bias,
        scheme=scheme,
        in_features=in_features,
        out_features=out_features,
        smooth_scale=smooth,
        rotation=rotation,
        shared_input=shared_input,
    )


# ---- file ---------------------------------------------------------------------------------------


def checkpoint_file(path: str | os.PathLike) -> Path:
    """The file behind a path: itself, or FILE_NAME in a folder."""
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path


def save(
    path: str | os.PathLike,
    states: Mapping[str, LinearState],
    dense: Mapping[str, Tensor],
    model_class: str,
) -> Path:
    """Write a checkpoint to `path` (a file, or a folder that gets FILE_NAME) and return the file.

    Everything is validated first; the file is written under a temporary name and renamed. Raises
    CheckpointError for inconsistent states and OSError when the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    for name, state in states.items():
        owner = state.shared_input or name
        if owner not in states or states[owner].shared_input:
            raise CheckpointError(
                f"{name}: shared_input must name a linear that stores it, got {owner!r}"
            )
        own = state_tensors(state, with_input=True)
        sizes = (state.out_features, state.in_features)
        state_from_tensors(own, state.scheme, *sizes, name)
        if owner != name:
            _check_same_input(name, state, owner, states[owner])
        layer = {**state.scheme.to_dict(), "out_features": sizes[0], "in_features": sizes[1]}
        if owner != name:
            layer["shared_input"] = owner
        layers[name] = layer
        for key, tensor in state_tensors(state, with_input=owner == name).items():
            tensors[f"{name}.{key}"] = tensor
    for name, tensor in dense.items():
        if name in tensors:
            raise CheckpointError(f"{name} is both a dense tensor and a field of a linear")
        if tensor.is_meta:
            raise CheckpointError(f"{name} is on the meta device: it has no values to save")
        tensors[name] = tensor.detach().contiguous()
    tensors = _separate_on_cpu(tensors)
    checksums = {name: _crc32(tensor) for name, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "model_class": model_class,
        "layers": json.dumps(layers),
        "checksums": json.dumps(checksums),
    }
    metadata["metadata_checksum"] = _metadata_crc32(metadata)
    file = checkpoint_file(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, str(temporary), metadata=metadata)
        os.replace(temporary, file)
    except SafetensorError as error:
        raise OSError(f"cannot write {file}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return file


def _separate_on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, none sharing memory with another: safetensors refuses tied tensors."""
    storages: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        tensor = tensor.cpu()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return separate


def _check_same_input(name: str, state: LinearState, owner: str, owner_state: LinearState) -> None:
    _check_same_input_scheme(name, state, owner, owner_state)
    own = state_tensors(state, with_input=True)
    stored = state_tensors(owner_state, with_input=True)
    for key, spec in FIELDS.items():
        if not spec.per_input:
            continue
        mine, theirs = own.get(key), stored.get(key)
        same = mine is theirs or (
            mine is not None and theirs is not None and torch.equal(mine.cpu(), theirs.cpu())
        )
        if not same:
            raise CheckpointError(f"{name}.{key} must equal that of {owner}, whose input it shares")


def _check_same_input_scheme(
    name: str, state: LinearState, owner: str, owner_state: LinearState
) -> None:
    if state.in_features != owner_state.in_features:
        raise CheckpointError(
            f"{name}: in_features must be {owner_state.in_features} as in {owner}, whose input it "
            f"shares, got {state.in_features}"
        )
    for key in INPUT_FIELDS:
        mine, theirs = getattr(state.scheme, key), getattr(owner_state.scheme, key)
        if mine != theirs:
            raise CheckpointError(
                f"{name}: {key} must be {theirs!r} as in {owner}, whose input it shares, "
                f"got {mine!r}"
            )


def _crc32(tensor: Tensor) -> int:
    what = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return zlib.crc32(data, zlib.crc32(what.encode()))


def _metadata_crc32(metadata: Mapping[str, str]) -> str:
    covered = (metadata["model_class"], metadata["layers"], metadata["checksums"])
    return str(zlib.crc32("\0".join(covered).encode()))


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """Header of a checkpoint: format, version (int), model_class, layers and checksums (dicts).

    Raises CheckpointError when the file is not an intact lrq checkpoint of a known version.
    """
    file = checkpoint_file(path)
    if not file.is_file():
        raise FileNotFoundError(f"no lrq checkpoint at {file}")
    try:
        with safe_open(str(file), framework="pt") as handle:
            raw = handle.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file: {error}") from error
    if raw.get("format") != FORMAT:
        raise CheckpointError(f"{file}: format must be {FORMAT!r}, got {raw.get('format')!r}")
    if raw.get("version") != str(VERSION):
        raise CheckpointError(
            f"{file} has format version {raw.get('version')}; this package reads version {VERSION}"
        )
    try:
        if raw["metadata_checksum"] != _metadata_crc32(raw):
            raise CheckpointError(f"{file}: metadata was altered: its checksum does not match")
        return {
            "format": FORMAT,
            "version": VERSION,
            "model_class": raw["model_class"],
            "layers": json.loads(raw["layers"]),
            "checksums": json.loads(raw["checksums"]),
        }
    except (KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: damaged metadata: {error!r}") from error


def load(
    path: str | os.PathLike, *, device: torch.device | str = "cpu", verify: bool = True
) -> Checkpoint:
    """Read and validate a checkpoint; tensors end up on `device`.

    verify also compares every tensor with its checksum. Raises FileNotFoundError, or
    CheckpointError naming the tensor that is missing, extra, of a wrong shape or altered.
    """
    metadata = read_metadata(path)
    file = checkpoint_file(path)
    layers: dict[str, dict[str, Any]] = metadata["layers"]
    tensors: dict[str, Tensor] = {}
    with safe_open(str(file), framework="pt") as handle:
        names = set(handle.keys())
        if names != set(metadata["checksums"]):
            odd = sorted(names ^ set(metadata["checksums"]))
            raise CheckpointError(f"{file}: tensors missing or extra: {odd[:5]}")
        for name in sorted(names):
            tensor = handle.get_tensor(name)
            if verify and _crc32(tensor) != metadata["checksums"][name]:
                raise CheckpointError(f"{file}: {name} was altered: its checksum does not match")
            tensors[name] = tensor.to(device)
    states = {}
    for name in layers:
        own = {key: tensors.pop(f"{name}.{key}") for key in FIELDS if f"{name}.{key}" in tensors}
        layers[name]["tensors"] = own
    for name, layer in layers.items():
        states[name] = _layer_state(name, layer, layers)
    for name, state in states.items():
        if state.shared_input is not None:
            owner = states[state.shared_input]
            _check_same_input_scheme(name, state, state.shared_input, owner)
    return Checkpoint(states, tensors, metadata["model_class"])


def _layer_state(
    name: str, layer: dict[str, Any], layers: dict[str, dict[str, Any]]
) -> LinearState:
    facts = dict(layer)
    own = dict(facts.pop("tensors"))
    owner = facts.pop("shared_input", None)
    if owner is not None:
        if owner not in layers or "shared_input" in layers[owner]:
            raise CheckpointError(
                f"{name}: shared_input must name a linear that stores it, got {owner!r}"
            )
        stored = layers[owner]["tensors"]
        for key, spec in FIELDS.items():
            if spec.per_input and key in own:
                raise CheckpointError(f"{name}.{key} must be stored under {owner} alone")
            if spec.per_input and key in stored:
                own[key] = stored[key]
    try:
        sizes = (facts.pop("out_features"), facts.pop("in_features"))
        scheme = QuantScheme.from_dict(facts)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: damaged description: {error}") from error
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise CheckpointError(f"{name}: out_features, in_features must be positive, got {sizes}")
    return state_from_tensors(own, scheme, *sizes, name, owner)


def stored_bits(state: LinearState) -> dict[str, int]:
    """Bits that each field of this linear takes in the file; a shared input counts at its owner."""
    with_input = state.shared_input is None
    tensors = state_tensors(state, with_input=with_input)
    return {name: tensor.numel() * tensor.element_size() * 8 for name, tensor in tensors.items()}

"""THE checkpoint format: safetensors, canonical codes, nothing derived, no architecture.

Tensors of a quantized linear `name` are `name.<field>` for the fields below; everything else in
the file is a dense parameter of the model under its own name. Floating data of a quantized linear
is stored as views of integers, so that a loader that casts floats cannot touch it. Linears that
share an input store its smoothing, its rotation and the first factor of its low-rank branch once,
under the first of them; the others name it.

A checkpoint is one file, or several (shards) listed in an index as diffusers writes it. Every file
carries the metadata of the whole. Metadata (strings, as safetensors asks):
    format             "lrq"
    version            "1", "2" where a linear has a low-rank branch, "3" where rows share tables of
                       levels: the lowest that knows all fields in the file
    model_class        class name of the model
    layers             JSON: name -> {scheme fields, in_features, out_features, shared_input?,
                       low_rank?: rank of the branch, shared_tables?: of levels}
    checksums          JSON: tensor name -> CRC-32 of "dtype shape" (as "int32 [64, 16]") and bytes
    metadata_checksum  CRC-32 of model_class, layers and checksums, joined by zero bytes
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .linear_state import (
    FIELDS,
    CheckpointError,
    LinearState,
    Sizes,
    fields_table,
    state_from_tensors,
    state_tensors,
    stored_bits,
)
from .scheme import INPUT_FIELDS, QuantScheme

__all__ = [
    "FIELDS",
    "FILE_NAME",
    "FORMAT",
    "INDEX_NAME",
    "VERSIONS",
    "Checkpoint",
    "CheckpointError",
    "Header",
    "LinearState",
    "checkpoint_files",
    "encode",
    "fields_table",
    "layer_state",
    "load",
    "read_header",
    "save",
    "state_from_tensors",
    "state_tensors",
    "stored_bits",
    "verify_files",
    "version_with",
]

FORMAT = "lrq"
# That this package reads; it writes the lowest that has what a file holds (version_with).
VERSIONS = (1, 2, 3)
# diffusers looks for these names in a model folder.
FILE_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = f"{FILE_NAME}.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: quantized linears, dense tensors by name, and the class of the model."""

    states: dict[str, LinearState]
    dense: dict[str, Tensor]
    model_class: str


# ---- files --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """Metadata of a checkpoint and where its tensors are: layers is name -> description, checksums
    tensor name -> CRC-32, files tensor name -> file. Reading it reads no tensor."""

    model_class: str
    layers: dict[str, dict[str, Any]]
    checksums: dict[str, int]
    files: dict[str, Path]

    def fields(self, layer: str) -> dict[str, str]:
        """Field -> tensor name, of the fields that are stored under this linear."""
        names = {key: f"{layer}.{key}" for key in FIELDS}
        return {key: name for key, name in names.items() if name in self.checksums}

    def facts(self, layer: str) -> LayerFacts:
        """What the description of a linear says. Raises CheckpointError for a damaged one."""
        return _layer_facts(layer, self.layers[layer])

    def dense(self) -> set[str]:
        """Names of the tensors that belong to no quantized linear."""
        quantized = {name for layer in self.layers for name in self.fields(layer).values()}
        return set(self.checksums) - quantized

    def groups(self) -> dict[str, list[str]]:
        """The linear that stores an input -> all linears that read it, itself included."""
        groups: dict[str, list[str]] = {}
        for name, layer in self.layers.items():
            groups.setdefault(layer.get("shared_input", name), []).append(name)
        return groups

    def verify(self, name: str, tensor: Tensor) -> None:
        """Raise CheckpointError unless `tensor` is what was saved under `name`."""
        if _crc32(tensor.cpu()) != self.checksums[name]:
            raise CheckpointError(
                f"{self.files[name]}: {name} was altered: its checksum does not match"
            )


def checkpoint_files(path: str | os.PathLike) -> list[Path]:
    """The files behind a path: itself; in a folder the shards of its index, else FILE_NAME."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    index = path / INDEX_NAME
    if not index.is_file():
        return [path / FILE_NAME]
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{index} is damaged: {error!r}") from error
    return [path / shard for shard in shards]


def version_with(fields: Iterable[str]) -> int:
    """The lowest format version that has these fields of linears: an older reader, which would be
    wrong about them, refuses the file by it, and reads all others."""
    return max((FIELDS[field].since for field in fields), default=VERSIONS[0])


def encode(
    states: Mapping[str, LinearState], dense: Mapping[str, Tensor], model_class: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (on the CPU, sharing no memory) and the metadata of a checkpoint.

    Whoever writes them, in one file or several with the metadata in each, writes a checkpoint.
    Raises CheckpointError for inconsistent states.
    """
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    fields: set[str] = set()
    for name, state in states.items():
        owner = state.shared_input or name
        if owner not in states or states[owner].shared_input:
            raise CheckpointError(
                f"{name}: shared_input must name a linear that stores it, got {owner!r}"
            )
        own = state_tensors(state, with_input=True)
        facts = LayerFacts.of(state)
        state_from_tensors(own, state.scheme, facts.sizes, name)
        if owner != name:
            _check_same_input(name, state, owner, states[owner])
        sizes = {"out_features": state.out_features, "in_features": state.in_features}
        layer = {**state.scheme.to_dict(), **sizes}
        if owner != name:
            layer["shared_input"] = owner
        if state.low_rank:
            layer["low_rank"] = state.low_rank
        if state.shared_tables:
            layer["shared_tables"] = state.shared_tables
        layers[name] = layer
        fields.update(own)
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
        "version": str(version_with(fields)),
        "model_class": model_class,
        "layers": json.dumps(layers),
        "checksums": json.dumps(checksums),
    }
    metadata["metadata_checksum"] = _metadata_crc32(metadata)
    return tensors, metadata


def save(
    path: str | os.PathLike,
    states: Mapping[str, LinearState],
    dense: Mapping[str, Tensor],
    model_class: str,
) -> Path:
    """Write a checkpoint to `path` (a file, or a folder that gets FILE_NAME) and return the file.

    Everything is validated first; the file is written under a temporary name and renamed. Raises
    CheckpointError for inconsistent states, FileExistsError for a folder that holds shards, and
    OSError when it cannot be written.
    """
    tensors, metadata = encode(states, dense, model_class)
    file = Path(path)
    if file.is_dir():
        if (file / INDEX_NAME).exists():
            raise FileExistsError(f"{file} holds a sharded checkpoint: save to another folder")
        file = file / FILE_NAME
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


class LayerFacts(NamedTuple):
    """What the description of a linear says."""

    scheme: QuantScheme
    sizes: Sizes

    @staticmethod
    def of(state: LinearState) -> LayerFacts:
        n, k, scheme = state.out_features, state.in_features, state.scheme
        sizes = Sizes(n, k, scheme.weight_bits, state.low_rank, state.shared_tables)
        return LayerFacts(scheme, sizes)

    def of_input(self) -> dict[str, Any]:
        """What linears that share an input agree on."""
        scheme = {key: getattr(self.scheme, key) for key in INPUT_FIELDS}
        return {"in_features": self.sizes.k, "low_rank": self.sizes.rank, **scheme}


def _check_same_input(name: str, state: LinearState, owner: str, owner_state: LinearState) -> None:
    _check_same_input_facts(name, LayerFacts.of(state), owner, LayerFacts.of(owner_state))
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


def _check_same_input_facts(
    name: str, facts: LayerFacts, owner: str, owner_facts: LayerFacts
) -> None:
    expected = owner_facts.of_input()
    for key, mine in facts.of_input().items():
        if mine != (theirs := expected[key]):
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


def read_header(files: Sequence[str | os.PathLike]) -> Header:
    """Header of the checkpoint that consists of `files`, without reading a tensor.

    Raises FileNotFoundError, or CheckpointError naming the file that is not an intact part of an
    lrq checkpoint of a known version, or the tensor that none of them holds.
    """
    first: dict[str, str] = {}
    where: dict[str, Path] = {}
    for file in map(Path, files):
        if not file.is_file():
            raise FileNotFoundError(f"no lrq checkpoint at {file}")
        try:
            with safe_open(str(file), framework="pt") as handle:
                raw, names = handle.metadata() or {}, list(handle.keys())
        except SafetensorError as error:
            what = _first_cut_tensor(file) or "is truncated or not a safetensors file"
            raise CheckpointError(f"{file} {what}: {error}") from error
        _check_metadata(file, raw)
        first = first or raw
        if raw["metadata_checksum"] != first["metadata_checksum"]:
            raise CheckpointError(f"{file} belongs to another checkpoint than {files[0]}")
        where.update(dict.fromkeys(names, file))
    try:
        header = Header(
            first["model_class"], json.loads(first["layers"]), json.loads(first["checksums"]), where
        )
    except (KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{files[0]}: damaged metadata: {error!r}") from error
    if where.keys() != header.checksums.keys():
        odd = sorted(where.keys() ^ header.checksums.keys())
        place = files[0] if len(files) == 1 else f"{files[0]} and its {len(files) - 1} shards"
        raise CheckpointError(f"{place}: tensors missing or extra: {odd[:5]}")
    return header


def verify_files(header: Header) -> None:
    """Read every tensor and compare it with its checksum, for a loader that casts what it reads.
    Raises CheckpointError naming file and tensor."""
    for file in dict.fromkeys(header.files.values()):
        with safe_open(str(file), framework="pt") as handle:
            for name in sorted(handle.keys()):
                header.verify(name, handle.get_tensor(name))


def _check_metadata(file: Path, raw: Mapping[str, str]) -> None:
    if raw.get("format") != FORMAT:
        raise CheckpointError(f"{file}: format must be {FORMAT!r}, got {raw.get('format')!r}")
    if raw.get("version") not in [str(version) for version in VERSIONS]:
        known = ", ".join(map(str, VERSIONS))
        raise CheckpointError(
            f"{file} has format version {raw.get('version')}; this package reads versions {known}"
        )
    try:
        if raw["metadata_checksum"] != _metadata_crc32(raw):
            raise CheckpointError(f"{file}: metadata was altered: its checksum does not match")
    except KeyError as error:
        raise CheckpointError(f"{file}: damaged metadata: {error!r}") from error


def _first_cut_tensor(file: Path) -> str | None:
    """Where a file whose own header is whole ends too early."""
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        try:
            header = json.loads(handle.read(size))
            spans = {n: e["data_offsets"] for n, e in header.items() if n != "__metadata__"}
            start = 8 + size
            cut = [n for n, (_, end) in spans.items() if start + end > file.stat().st_size]
            return f"is truncated at {min(cut, key=lambda n: spans[n][0])}" if cut else None
        except (ValueError, TypeError, KeyError, AttributeError, MemoryError, OverflowError):
            return None


def load(
    path: str | os.PathLike, *, device: torch.device | str = "cpu", verify: bool = True
) -> Checkpoint:
    """Read and validate a checkpoint; tensors end up on `device`.

    path: a file, or a folder with FILE_NAME or shards. verify also compares every tensor with its
    checksum. Raises FileNotFoundError, or CheckpointError naming the tensor that is missing, extra,
    of a wrong shape or altered.
    """
    files = checkpoint_files(path)
    header = read_header(files)
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as handle:
            for name in sorted(handle.keys()):
                tensor = handle.get_tensor(name)
                if verify:
                    header.verify(name, tensor)
                # Not a view of the file: that may be replaced, and lies on odd addresses, for which
                # matrix products on the CPU round differently.
                tensors[name] = tensor.to(device, copy=True)
    states = {name: layer_state(name, header, tensors) for name in header.layers}
    dense = {name: tensors[name] for name in sorted(header.dense())}
    return Checkpoint(states, dense, header.model_class)


def layer_state(name: str, header: Header, tensors: Mapping[str, Tensor]) -> LinearState:
    """One linear from tensors by their names in the file, which must hold its own and those of the
    input it shares. Raises CheckpointError naming what does not fit."""
    own = {key: tensors[full] for key, full in header.fields(name).items()}
    owner = header.layers[name].get("shared_input")
    facts = header.facts(name)
    if owner is not None:
        if owner not in header.layers or "shared_input" in header.layers[owner]:
            raise CheckpointError(
                f"{name}: shared_input must name a linear that stores it, got {owner!r}"
            )
        _check_same_input_facts(name, facts, owner, header.facts(owner))
        stored = header.fields(owner)
        for key, spec in FIELDS.items():
            if spec.per_input and key in own:
                raise CheckpointError(f"{name}.{key} must be stored under {owner} alone")
            if spec.per_input and key in stored:
                own[key] = tensors[stored[key]]
    return state_from_tensors(own, facts.scheme, facts.sizes, name, owner)


def _layer_facts(name: str, description: Mapping[str, Any]) -> LayerFacts:
    rest = {key: value for key, value in description.items() if key != "shared_input"}
    try:
        sizes = (rest.pop("out_features"), rest.pop("in_features"))
        optional = {key: rest.pop(key, None) for key in ("low_rank", "shared_tables")}
        scheme = QuantScheme.from_dict(rest)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: damaged description: {error}") from error
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise CheckpointError(f"{name}: out_features, in_features must be positive, got {sizes}")
    for key, value in optional.items():
        if value is not None and not (isinstance(value, int) and value > 0):
            raise CheckpointError(f"{name}: {key} must be positive, got {value!r}")
    rank, tables = (value or 0 for value in optional.values())
    return LayerFacts(scheme, Sizes(*sizes, scheme.weight_bits, rank, tables))

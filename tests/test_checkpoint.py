"""The checkpoint format: nothing is lost, nothing damaged is read, nothing half is written."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrq_kernels import (
    CheckpointError,
    LinearState,
    LRQLinear,
    QuantScheme,
    checkpoint,
    load,
    save,
)
from lrq_kernels.checkpoint import FIELDS, FILE_NAME, INDEX_NAME, stored_bits
from lrq_kernels.testing import make_state

K = 128
W4A8 = QuantScheme(4, 8)
SCHEMES = {
    "w4a8": W4A8,
    "w3a4": QuantScheme(3, 4, "hadamard", 32, "rms", 0.3545),
    "w2a8-dual": QuantScheme(2, 8, "dual"),
    "w4a16": QuantScheme(4, 16, "none"),
}


def attention(scheme: QuantScheme = W4A8, n: int = 8) -> dict[str, LinearState]:
    """to_k and to_v share the input of to_q; proj has its own and no bias."""
    permuted = scheme.rotation != "none"
    q = make_state(n, K, scheme, permuted=permuted)
    return {
        "to_q": q,
        "to_k": make_state(n + 1, K, scheme, shared_with=("to_q", q)),
        "to_v": make_state(n, K, scheme, bias=False, shared_with=("to_q", q)),
        "block.proj": make_state(n, K, QuantScheme(2, 16, "none"), bias=False, smooth=False),
    }


def dense_tensors() -> dict[str, Tensor]:
    return {
        "norm.weight": torch.randn(5).bfloat16(),
        "embed": torch.randn(3, 4).T,  # not contiguous
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
        "wide": torch.randn(2).double(),
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save(tmp_path / "model.safetensors", attention(), dense_tensors(), "Toy")


def tensors_of(state: LinearState) -> dict[str, Tensor | None]:
    rotation = state.rotation
    names = ("codes", "levels", "table_of_row", "weight_scale", "bias")
    own = {name: getattr(state, name) for name in names}
    return {
        **own,
        "smooth_scale": state.smooth_scale,
        "signs": rotation.signs,
        "permutation": rotation.permutation,
        "matrices": rotation.matrices,
    }


def assert_same_state(one: LinearState, other: LinearState) -> None:
    for name, tensor in tensors_of(one).items():
        against = tensors_of(other)[name]
        assert (tensor is None) == (against is None), name
        if tensor is not None and against is not None:
            assert tensor.dtype == against.dtype and torch.equal(tensor, against), name
    for name in ("scheme", "in_features", "out_features", "shared_input"):
        assert getattr(one, name) == getattr(other, name)
    assert one.rotation.kind == other.rotation.kind


# ---- round trip ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_save_load_forward_is_bit_identical(scheme: QuantScheme, tmp_path: Path):
    states, dense = attention(scheme), dense_tensors()
    loaded = load(save(tmp_path, states, dense, "Toy"))
    assert loaded.model_class == "Toy"
    assert loaded.states.keys() == states.keys()
    x = torch.randn(5, K).bfloat16()
    for name, state in states.items():
        assert_same_state(loaded.states[name], state)
        expected = LRQLinear.from_state(state)(x)
        assert torch.equal(LRQLinear.from_state(loaded.states[name])(x), expected)
    assert loaded.dense.keys() == dense.keys()
    for name, tensor in dense.items():
        assert loaded.dense[name].dtype == tensor.dtype
        assert torch.equal(loaded.dense[name], tensor)


def test_a_folder_gets_the_file_name_that_diffusers_looks_for(tmp_path: Path):
    assert save(tmp_path, attention(), {}, "Toy") == tmp_path / FILE_NAME
    assert load(tmp_path).states.keys() == load(tmp_path / FILE_NAME).states.keys()


def test_missing_folders_are_made(tmp_path: Path):
    assert save(tmp_path / "a" / "b" / "model.safetensors", attention(), {}, "Toy").is_file()


def test_shared_input_is_stored_once(file: Path):
    with safe_open(str(file), framework="pt") as handle:
        names = set(handle.keys())
    for name in ("signs", "permutation", "smooth_scale"):
        assert f"to_q.{name}" in names
        assert f"to_k.{name}" not in names and f"to_v.{name}" not in names
    states = load(file).states
    assert states["to_k"].rotation.permutation is states["to_q"].rotation.permutation


def test_no_floating_tensor_belongs_to_a_quantized_linear(file: Path):
    """A loader that casts floats must find none to spoil."""
    with safe_open(str(file), framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118
            tensor = handle.get_tensor(name)
            if name not in dense_tensors():
                field = FIELDS[name.rpartition(".")[2]]
                assert tensor.dtype == field.dtype and not tensor.is_floating_point()


def test_stored_bits_is_what_the_file_holds(file: Path):
    states = load(file).states
    with safe_open(str(file), framework="pt") as handle:
        for name, state in states.items():
            for field, bits in stored_bits(state).items():
                tensor = handle.get_tensor(f"{name}.{field}")
                assert bits == 8 * tensor.numel() * tensor.element_size()
        quantized = sum(sum(stored_bits(state).values()) for state in states.values())
        dense = {name: handle.get_tensor(name) for name in dense_tensors()}
    dense_bytes = sum(tensor.numel() * tensor.element_size() for tensor in dense.values())
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == header + quantized // 8 + dense_bytes


def test_tensors_that_share_memory_are_saved_whole(tmp_path: Path):
    """Tied weights, one rotation in two linears, and slices of one fused weight."""
    first = make_state(8, K, W4A8, permuted=True)
    second = dataclasses.replace(
        make_state(8, K, W4A8), rotation=first.rotation, smooth_scale=first.smooth_scale
    )
    tied = torch.randn(4, 4)
    dense = {"a": tied, "b": tied, "row": tied[1]}
    loaded = load(save(tmp_path, {"x": first, "y": second}, dense, "Toy"))
    assert_same_state(loaded.states["y"], second)
    assert all(torch.equal(loaded.dense[name], dense[name]) for name in dense)


@pytest.mark.gpu
def test_load_to_the_gpu_and_save_from_it(file: Path, tmp_path: Path):
    on_cpu, on_gpu = load(file), load(file, device="cuda")
    assert all(tensor.is_cuda for tensor in on_gpu.dense.values())
    x = torch.randn(5, K).bfloat16().cuda()
    for name, state in on_gpu.states.items():
        assert state.codes.is_cuda
        assert_same_state(state.to("cpu"), on_cpu.states[name])
        assert LRQLinear.from_state(state)(x).shape == (5, state.out_features)
    again = load(save(tmp_path / "again.safetensors", on_gpu.states, on_gpu.dense, "Toy"))
    for name, state in on_cpu.states.items():
        assert_same_state(again.states[name], state)
    assert all(torch.equal(again.dense[name], tensor) for name, tensor in on_cpu.dense.items())


# ---- damage -------------------------------------------------------------------------------------


def test_any_single_changed_bit_is_noticed(file: Path):
    """In a tensor, a shape, a scheme field, a name, a length: the whole file is covered."""
    original = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(original[:8], "little")
    positions = [*range(8), *torch.randint(8, header, (250,)).tolist()]
    positions += torch.randint(header, len(original), (150,)).tolist()
    for position in positions:
        damaged = bytearray(original)
        damaged[position] ^= 1 << int(torch.randint(0, 8, ()))
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load(file)
            pytest.fail(f"byte {position} of {len(original)}, header of {header}")


def test_an_edited_tensor_is_named(file: Path):
    data = bytearray(file.read_bytes())
    name = "to_k.levels"
    start = tensor_start(data, name)
    # The smallest level becomes smaller, so that they still grow with the code.
    assert data[start] > 0
    data[start] -= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="to_k.levels was altered: its checksum"):
        load(file)
    assert load(file, verify=False).states.keys() == {"to_q", "to_k", "to_v", "block.proj"}


def tensor_start(data: bytes, name: str) -> int:
    header = int.from_bytes(data[:8], "little")
    return 8 + header + json.loads(data[8 : 8 + header])[name]["data_offsets"][0]


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.2, 0.9, 0.9999])
def test_a_truncated_file_is_refused(file: Path, keep: float):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match=f"{file.name} is truncated"):
        load(file)


def test_where_a_file_was_cut_is_named(file: Path):
    data = file.read_bytes()
    for name in ("to_k.levels", "to_q.codes"):
        file.write_bytes(data[: tensor_start(data, name) + 1])
        with pytest.raises(CheckpointError, match=f"{file.name} is truncated at {name}:"):
            load(file)


def test_another_kind_of_file_is_refused(tmp_path: Path):
    text = tmp_path / "text.safetensors"
    text.write_text("not a checkpoint, but long enough to hold a header\n" * 9)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(text)
    plain = tmp_path / "plain.safetensors"
    save_file({"weight": torch.zeros(2)}, plain)
    with pytest.raises(CheckpointError, match="format must be 'lrq', got None"):
        load(plain)
    for missing in (tmp_path / "nothing.safetensors", tmp_path / "no" / "folder", tmp_path):
        with pytest.raises(FileNotFoundError, match="no lrq checkpoint at"):
            load(missing)


Contents = dict[str, Any]


def rewrite(file: Path, change: Callable[[Contents], None], *, forge: bool = True) -> None:
    """Change a file's tensors or metadata; forge: with checksums that fit again."""
    with safe_open(str(file), framework="pt") as handle:
        metadata = handle.metadata()
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    contents = {"tensors": tensors, "layers": json.loads(metadata["layers"]), "metadata": metadata}
    change(contents)
    if forge:
        metadata["layers"] = json.dumps(contents["layers"])
        checksums = {name: checkpoint._crc32(tensor) for name, tensor in tensors.items()}
        metadata["checksums"] = json.dumps(checksums)
        metadata["metadata_checksum"] = checkpoint._metadata_crc32(metadata)
    save_file(tensors, file, metadata=metadata)


def test_a_newer_version_is_refused_and_both_are_named(file: Path):
    rewrite(file, lambda c: c["metadata"].update(version="4", new="field"), forge=False)
    with pytest.raises(CheckpointError, match="version 4; this package reads versions 1, 2, 3"):
        load(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["metadata"].update(model_class="Other"), "metadata was altered"),
        (lambda c: c["metadata"].update(layers="{}"), "metadata was altered"),
        (lambda c: c["metadata"].pop("layers"), "damaged metadata.*layers"),
        (lambda c: c["metadata"].pop("metadata_checksum"), "damaged metadata"),
        (lambda c: c["metadata"].update(version="one"), "format version one"),
        (lambda c: c["metadata"].pop("version"), "format version None"),
        (lambda c: c["tensors"].pop("norm.weight"), "missing or extra: .'norm.weight'"),
        (lambda c: c["tensors"].update(lora=torch.zeros(1)), "missing or extra: .'lora'"),
        (lambda c: c["tensors"].update(wide=torch.zeros(2)), "wide was altered"),  # dtype
        (lambda c: c["tensors"].update(empty=torch.zeros(3, 0)), "empty was altered"),  # shape
    ],
)
def test_an_edit_is_noticed(file: Path, change: Callable[[Contents], None], message: str):
    rewrite(file, change, forge=False)
    with pytest.raises(CheckpointError, match=message):
        load(file)


def layer(name: str, **values: object) -> Callable[[Contents], None]:
    return lambda contents: contents["layers"][name].update(values)


def tensor(name: str, value: object) -> Callable[[Contents], None]:
    def change(contents: Contents) -> None:
        old = contents["tensors"].get(name)
        contents["tensors"][name] = value(old) if callable(value) else value

    return change


def drop(name: str) -> Callable[[Contents], None]:
    return lambda contents: contents["tensors"].pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("to_q.codes"), "to_q.codes is missing"),
        (drop("to_q.signs"), "to_q.signs is missing"),
        (tensor("to_q.codes", lambda t: t[:-1]), r"to_q.codes must be torch.int32 \[8, 16\]"),
        (tensor("to_q.levels", lambda t: t.int()), "to_q.levels must be torch.int8"),
        (tensor("to_q.levels", lambda t: -t), "to_q: TwinLogCodebook: .* wrong sign"),
        (tensor("to_q.signs", lambda t: 0 * t), "to_q: Rotation: signs must be"),
        (tensor("to_q.permutation", lambda t: 0 * t), "to_q: Rotation: permutation must"),
        (tensor("to_q.smooth_scale", lambda t: 0 * t), "to_q: smooth_scale must be positive"),
        (tensor("to_q.bias", lambda t: torch.full_like(t, 0x7FC00000)), "to_q: bias must be fin"),
        (
            tensor("to_q.weight_scale", lambda t: t | torch.tensor(-(2**31), dtype=torch.int32)),
            "to_q: .* scale must be finite and not negative",
        ),
        (tensor("to_k.signs", torch.ones(K, dtype=torch.int8)), "to_k.signs must be stored under"),
        (
            tensor("block.proj.signs", torch.ones(K, dtype=torch.int8)),
            "block.proj: Rotation: kind 'none' takes no tensors",
        ),
        (layer("to_q", weight_bits=5), "to_q: damaged description: .*weight_bits"),
        (layer("to_q", weight_bits=4.0), "to_q: damaged description: .*weight_bits"),
        (layer("to_q", rank=16), "to_q: damaged description: .*unknown fields .'rank'"),
        (layer("to_q", out_features=9), r"to_q.codes must be torch.int32 \[9, 16\]"),
        (layer("to_q", out_features="8"), "to_q: out_features, in_features must be positive"),
        (layer("to_q", in_features=-128), "to_q: out_features, in_features must be positive"),
        (lambda c: c["layers"]["to_q"].pop("in_features"), "to_q: damaged description"),
        (layer("to_k", shared_input="nobody"), "to_k: shared_input must name .* got 'nobody'"),
        (layer("to_v", shared_input="to_k"), "to_v: shared_input must name .* got 'to_k'"),
        (layer("to_k", act_bits=4), "to_k: act_bits must be 8 as in to_q.* got 4"),
        (layer("to_k", scale_factor=0.5), "to_k: scale_factor must be 1.0 as in to_q.* got 0.5"),
    ],
)
def test_a_consistent_file_with_wrong_contents_is_refused(
    file: Path, change: Callable[[Contents], None], message: str
):
    rewrite(file, change)
    with pytest.raises(CheckpointError, match=message):
        load(file)


# ---- shards -------------------------------------------------------------------------------------


def write_shards(folder: Path, count: int = 3) -> list[Path]:
    """As diffusers writes them: the metadata in each, an index that says where a tensor is."""
    tensors, metadata = checkpoint.encode(attention(), dense_tensors(), "Toy")
    folder.mkdir(exist_ok=True)
    files, weight_map = [], {}
    for i in range(count):
        names = sorted(tensors)[i::count]
        files.append(folder / f"diffusion_pytorch_model-{i + 1:05}-of-{count:05}.safetensors")
        save_file({name: tensors[name] for name in names}, files[-1], metadata=metadata)
        weight_map.update(dict.fromkeys(names, files[-1].name))
    index = {"metadata": {"total_size": 1, **metadata}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return files


def test_shards_are_one_checkpoint(tmp_path: Path):
    write_shards(tmp_path)
    loaded = load(tmp_path)
    one = load(save(tmp_path / "one" / "file", loaded.states, loaded.dense, "Toy"))
    assert loaded.states.keys() == one.states.keys() and loaded.dense.keys() == one.dense.keys()
    for name, state in loaded.states.items():
        assert_same_state(state, one.states[name])


def test_a_missing_shard_is_named(tmp_path: Path):
    files = write_shards(tmp_path)
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=files[1].name):
        load(tmp_path)


def test_a_truncated_shard_and_its_tensor_are_named(tmp_path: Path):
    file = write_shards(tmp_path)[2]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{file.name} is truncated at \w+"):
        load(tmp_path)


def test_a_shard_of_another_checkpoint_is_named(tmp_path: Path):
    files = write_shards(tmp_path / "a")
    shutil.copy(write_shards(tmp_path / "b")[1], files[1])
    with pytest.raises(CheckpointError, match=f"{files[1].name} belongs to another checkpoint"):
        load(tmp_path / "a")


def test_a_tensor_that_no_shard_holds_is_named(tmp_path: Path):
    files = write_shards(tmp_path)
    with safe_open(files[1], framework="pt") as handle:
        metadata = handle.metadata()
        kept = {name: handle.get_tensor(name) for name in sorted(handle.keys())}
    lost, _ = kept.popitem()
    save_file(kept, files[1], metadata=metadata)
    with pytest.raises(CheckpointError, match=rf"and its 2 shards: .*{lost}"):
        load(tmp_path)


def test_a_damaged_index_is_named(tmp_path: Path):
    write_shards(tmp_path)
    for text in ("{", "[]", '{"weight_map": 1}'):
        (tmp_path / INDEX_NAME).write_text(text)
        with pytest.raises(CheckpointError, match="index.json is damaged"):
            load(tmp_path)


def test_a_single_file_is_not_written_beside_shards(tmp_path: Path):
    """A reader would take the shards."""
    write_shards(tmp_path)
    with pytest.raises(FileExistsError, match="sharded checkpoint"):
        save(tmp_path, attention(), {}, "Toy")


# ---- what cannot be saved -----------------------------------------------------------------------


def change_state(name: str, **values: object) -> dict[str, LinearState]:
    states = attention()
    states[name] = dataclasses.replace(states[name], **values)
    return states


def other_permutation() -> dict[str, LinearState]:
    states = attention()
    rotation = states["to_q"].rotation
    other = dataclasses.replace(rotation, permutation=rotation.permutation.flip(0))
    return {**states, "to_k": dataclasses.replace(states["to_k"], rotation=other)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: change_state("to_q", bias=torch.full((8,), float("nan"))), "to_q: bias must be"),
        (lambda: change_state("to_q", smooth_scale=torch.zeros(K)), "to_q: smooth_scale must"),
        (
            lambda: change_state("to_q", weight_scale=torch.full((8,), float("inf"))),
            "to_q: .* scale must be finite",
        ),
        (lambda: change_state("to_q", out_features=9), r"to_q.codes must be .* \[9, 16\]"),
        (lambda: change_state("to_k", shared_input="gone"), "to_k: shared_input must name"),
        (lambda: change_state("to_k", shared_input="to_v"), "to_k: shared_input must name"),
        (lambda: change_state("to_k", smooth_scale=None), "to_k.smooth_scale must equal that of"),
        (other_permutation, "to_k.permutation must equal that of to_q"),
        (
            lambda: change_state("to_k", scheme=QuantScheme(4, 4)),
            "to_k: act_bits must be 8 as in to_q",
        ),
        (lambda: change_state("to_q", scheme=QuantScheme(4, 8, "none")), "takes no tensors"),
    ],
)
def test_inconsistent_states_are_refused_before_anything_is_written(
    make: Callable[[], dict[str, LinearState]], message: str, tmp_path: Path
):
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "folder" / "model.safetensors", make(), {}, "Toy")
    assert list(tmp_path.iterdir()) == []


def test_dense_tensors_that_cannot_be_saved_are_refused(tmp_path: Path):
    for dense, message in (
        ({"to_q.codes": torch.zeros(1)}, "to_q.codes is both a dense tensor and a field"),
        ({"norm": torch.empty(2, device="meta")}, "norm is on the meta device"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save(tmp_path, attention(), dense, "Toy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [SafetensorError("No space"), OSError("disk"), RuntimeError("x")])
def test_a_failed_save_keeps_the_old_file_and_leaves_nothing(
    file: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
):
    before = file.read_bytes()

    def half_written(tensors: object, path: str, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", half_written)
    with pytest.raises((OSError, RuntimeError)):
        save(file, attention(), {}, "Toy")
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_saving_over_a_checkpoint_replaces_it(file: Path):
    states = attention()
    save(file, states, {}, "Toy")
    loaded = load(file)
    assert_same_state(loaded.states["to_q"], states["to_q"])
    assert loaded.dense == {} and list(file.parent.iterdir()) == [file]


def test_a_folder_that_cannot_be_written_is_an_os_error(tmp_path: Path):
    # A file where a folder must be: root may write anywhere else.
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save(tmp_path / "file" / "model.safetensors", attention(), {}, "Toy")
    assert (tmp_path / "file").read_text() == "" and len(list(tmp_path.iterdir())) == 1


def test_the_readme_shows_the_table_of_fields() -> None:
    readme = Path(__file__).parents[1] / "README.md"
    assert checkpoint.fields_table() in readme.read_text()

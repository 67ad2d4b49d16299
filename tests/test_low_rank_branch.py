"""The low-rank branch of a linear: in the format, in the layer, and where it is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from test_checkpoint import (
    SCHEMES,
    Contents,
    assert_same_state,
    attention,
    drop,
    layer,
    rewrite,
    tensor,
)
from test_fusion import passed
from torch import Tensor, nn

from lrq_kernels import (
    CheckpointError,
    InputQuantizer,
    LinearState,
    LRQLinear,
    QuantScheme,
    checkpoint,
    fuse_linears,
    load,
    reference,
    save,
    set_act_bits,
    stack_linears,
)
from lrq_kernels.checkpoint import INDEX_NAME, stored_bits
from lrq_kernels.linear import split_linear
from lrq_kernels.loader import build_linears
from lrq_kernels.row_order import fold_permutation, order_rows, restore_order
from lrq_kernels.testing import assert_at_most_twice, make_state, relative_error, with_low_rank
from lrq_quant.model_memory import BRANCHES, memory_by_kind

N, K, R = 40, 256, 6
ALL = {
    "w4a8": QuantScheme(4, 8),
    "w3a4-rms": QuantScheme(3, 4, "hadamard", 64, "rms", 0.3545),
    "w2a8-dual": QuantScheme(2, 8, "dual"),
    "w4a16": QuantScheme(4, 16),
    "w4a16-plain": QuantScheme(4, 16, "none"),
}
every_scheme = pytest.mark.parametrize("scheme", ALL.values(), ids=ALL.keys())
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def draw(scheme: QuantScheme, rank: int = R) -> LinearState:
    return with_low_rank(make_state(N, K, scheme, permuted=scheme.rotation != "none"), rank)


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Activations with a few loud channels."""
    x = torch.randn(*shape, K)
    x[..., ::37] *= 8
    return x.to(dtype)


def without_branch(state: LinearState) -> LinearState:
    return dataclasses.replace(state, low_rank_down=None, low_rank_up=None)


def exact_branch(state: LinearState, x: Tensor) -> Tensor:
    """In float64, from x as it comes."""
    down, up = state.low_rank_down, state.low_rank_up
    assert down is not None and up is not None
    return x.double() @ down.double().T @ up.double().T


def branched_attention(scheme: QuantScheme = ALL["w4a8"]) -> dict[str, LinearState]:
    """attention() of test_checkpoint with a branch on what q, k and v read, and none on proj."""
    states = attention(scheme)
    states["to_q"] = with_low_rank(states["to_q"], R)
    for name in ("to_k", "to_v"):
        states[name] = with_low_rank(states[name], R, like=states["to_q"])
    return states


def same_branch(one: LinearState, other: LinearState) -> bool:
    pairs = ((one.low_rank_down, other.low_rank_down), (one.low_rank_up, other.low_rank_up))
    return all(
        (a is None) == (b is None) and (a is None or (a.dtype == b.dtype and torch.equal(a, b)))
        for a, b in pairs
    )


# ---- format -------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save(tmp_path / "model.safetensors", branched_attention(), {}, "Toy")


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
@pytest.mark.parametrize("shards", [1, 3])
def test_save_load_forward_is_bit_identical(scheme: QuantScheme, shards: int, tmp_path: Path):
    states = branched_attention(scheme)
    if shards == 1:
        save(tmp_path, states, {}, "Toy")
    else:
        tensors, metadata = checkpoint.encode(states, {}, "Toy")
        places = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(sorted(tensors))}
        for part in set(places.values()):
            own = {name: tensors[name] for name, place in places.items() if place == part}
            save_file(own, tmp_path / part, metadata=metadata)
        (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": places}))
    loaded = load(tmp_path).states
    before, after = (build_linears(of, torch.float32) for of in (states, loaded))
    x = torch.randn(5, 128).bfloat16()
    for name, state in states.items():
        assert_same_state(loaded[name], state)
        assert same_branch(loaded[name], state)
        assert torch.equal(after[name](x), before[name](x))
    assert loaded["to_q"].low_rank == R and loaded["block.proj"].low_rank == 0
    down = [loaded[name].low_rank_down for name in ("to_q", "to_k")]
    assert down[0].data_ptr() == down[1].data_ptr()


def test_a_branch_is_stored_as_integers_once_for_an_input_and_counted(file: Path):
    with safe_open(str(file), framework="pt") as handle:
        stored = {n: handle.get_tensor(n) for n in handle.keys() if "low_rank" in n}  # noqa: SIM118
    assert set(stored) == {"to_q.low_rank_down", *(f"to_{n}.low_rank_up" for n in "qkv")}
    assert all(value.dtype == torch.int16 for value in stored.values())
    states = load(file).states
    assert stored_bits(states["to_q"])["low_rank_down"] == 16 * R * 128
    assert "low_rank_down" not in stored_bits(states["to_k"])
    assert stored_bits(states["to_k"])["low_rank_up"] == 16 * 9 * R


def test_only_a_file_with_a_branch_needs_the_newer_version(file: Path, tmp_path: Path):
    """Readers of version 1 refuse it, and read all others as before."""
    plain = save(tmp_path / "plain.safetensors", attention(), {}, "Toy")
    versions = {}
    for path in (file, plain):
        with safe_open(str(path), framework="pt") as handle:
            metadata = handle.metadata()
        versions[path] = metadata["version"]
        ranks = {n: v.get("low_rank") for n, v in json.loads(metadata["layers"]).items()}
        has = path == file
        assert ranks == {**dict.fromkeys(("to_q", "to_k", "to_v"), R if has else None),
                         "block.proj": None}  # fmt: skip
    assert versions == {file: "2", plain: "1"}


def test_a_newer_version_than_this_is_refused(file: Path):
    rewrite(file, lambda c: c["metadata"].update(version="4"), forge=False)
    with pytest.raises(CheckpointError, match="version 4; this package reads versions 1, 2, 3"):
        load(file)


def test_a_truncated_branch_is_named(file: Path):
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    start = json.loads(data[8:header])["to_q.low_rank_down"]["data_offsets"][0]
    file.write_bytes(data[: header + start + 1])
    with pytest.raises(CheckpointError, match=f"{file.name} is truncated at to_q.low_rank_down"):
        load(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("to_q.low_rank_down"), "to_q.low_rank_down is missing"),
        (drop("to_k.low_rank_up"), "to_k.low_rank_up is missing"),
        (
            tensor("to_k.low_rank_up", lambda t: t[:, 1:].clone()),
            r"to_k.low_rank_up .* \[9, 6\], got .* ",
        ),
        (tensor("to_q.low_rank_down", lambda t: t[:-1]), r"to_q.low_rank_down .* \[6, 128\]"),
        (tensor("to_q.low_rank_up", lambda t: t.int()), "to_q.low_rank_up must be torch.int16"),
        (
            tensor("to_q.low_rank_up", lambda t: torch.full_like(t, 0x7FC0)),
            "to_q: low_rank_up must be finite",
        ),
        (layer("to_k", low_rank=5), "to_k: low_rank must be 6 as in to_q, whose input it shares"),
        (lambda c: c["layers"]["to_k"].pop("low_rank"), "to_k: low_rank must be 6 as in to_q"),
        (layer("to_q", low_rank=0), "to_q: low_rank must be positive, got 0"),
        (layer("to_q", low_rank="6"), "to_q: low_rank must be positive, got '6'"),
        (
            tensor("block.proj.low_rank_up", torch.zeros(8, R, dtype=torch.int16)),
            "block.proj.low_rank_up is there, and the linear has no low_rank",
        ),
    ],
)
def test_a_file_with_half_a_branch_is_refused(
    file: Path, change: Callable[[Contents], None], message: str
):
    rewrite(file, change)
    with pytest.raises(CheckpointError, match=message):
        load(file)


def test_states_that_do_not_share_their_branch_are_not_saved(tmp_path: Path):
    states = branched_attention()
    other = with_low_rank(states["to_k"], R)
    narrower = with_low_rank(states["to_k"], R - 1)
    half = dataclasses.replace(states["to_k"], low_rank_up=None)
    for state, message in (
        (other, "to_k.low_rank_down must equal that of to_q"),
        (narrower, "to_k: low_rank must be 6 as in to_q, whose input it shares, got 5"),
        (half, "to_k.low_rank_up is missing"),
        (without_branch(other), "to_k: low_rank must be 6 as in to_q.* got 0"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save(tmp_path / "x.safetensors", {**states, "to_k": state}, {}, "Toy")
    assert list(tmp_path.iterdir()) == []


# ---- layer --------------------------------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [9, 33])
def test_branch_is_added_within_rounding(scheme: QuantScheme, dtype: torch.dtype, rows: int):
    """Against the linear without it plus the branch in float64; torch does the same by rounding
    every product and the sum."""
    state, x = draw(scheme), tokens(rows, dtype=dtype)
    rest = LRQLinear.from_state(without_branch(state))(x)
    down, up = (t.to(dtype) for t in (state.low_rank_down, state.low_rank_up))
    baseline = rest + F.linear(F.linear(x, down), up)
    y = LRQLinear.from_state(state)(x)
    assert y.dtype == dtype
    oracle = LRQLinear.from_state(without_branch(state))(x.float()).double() + exact_branch(
        state, x
    )
    assert_at_most_twice(y, baseline, oracle)
    assert relative_error(rest, oracle) > 0.1  # the branch is no rounding


def test_gemm_adds_the_branch_before_it_rounds():
    state, x = draw(ALL["w4a8"]), tokens(33, dtype=torch.bfloat16)
    down, up = state.low_rank_down, state.low_rank_up
    rest = LRQLinear.from_state(without_branch(state))
    branch = F.linear(F.linear(x, down), up)
    expected = rest.from_quantized(*rest.input_quantizer.quantize(x), x.dtype, residual=branch)
    assert torch.equal(LRQLinear.from_state(state)(x), expected)


@every_scheme
def test_shapes_and_strides_of_x(scheme: QuantScheme):
    linear, x = LRQLinear.from_state(draw(scheme)), tokens(12)
    y = linear(x)
    close = {"rtol": 1e-4, "atol": 1e-4}  # products of torch may sum in another order
    torch.testing.assert_close(linear(x.view(2, 2, 3, K)), y.view(2, 2, 3, N), **close)
    torch.testing.assert_close(linear(x.T.contiguous().T), y, **close)
    torch.testing.assert_close(linear(x[5]), y[5], **close)
    assert linear(x[:0].view(0, 3, K)).shape == (0, 3, N)


def test_autocast_changes_nothing():
    for scheme in ALL.values():
        linear, x = LRQLinear.from_state(draw(scheme)), tokens(5)
        expected = linear(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(linear(x), expected)


@every_scheme
def test_dense_weight_holds_the_branch(scheme: QuantScheme):
    state = draw(scheme)
    linear, rest = LRQLinear.from_state(state), LRQLinear.from_state(without_branch(state))
    assert torch.equal(linear.dequantize(), rest.dequantize())
    product = state.low_rank_up.double() @ state.low_rank_down.double()
    assert relative_error(linear.dense_weight(), rest.dense_weight().double() + product) < 1e-6


@pytest.mark.parametrize("act_bits", [8, 16])
def test_set_act_bits_leaves_the_branch_as_it_is(act_bits: int):
    state, x = draw(ALL["w3a4-rms"]), tokens(17)
    linear, rest = LRQLinear.from_state(state), LRQLinear.from_state(without_branch(state))
    for each in (linear, rest):
        set_act_bits(each, act_bits)
    assert relative_error(linear(x), rest(x).double() + exact_branch(state, x)) < 1e-5


def sharing(scheme: QuantScheme) -> tuple[list[LinearState], list[LRQLinear]]:
    first = draw(scheme)
    others = [make_state(N, K, scheme, shared_with=("q", first)) for _ in range(2)]
    states = [first, *(with_low_rank(state, R, like=first) for state in others)]
    return states, list(build_linears(dict(zip("qkv", states, strict=True)), F32).values())


F32 = torch.float32


@pytest.mark.parametrize("scheme", [ALL["w4a8"], ALL["w4a16"]])
def test_x_is_projected_once_for_all_readers(scheme: QuantScheme, monkeypatch: pytest.MonkeyPatch):
    states, linears = sharing(scheme)
    x, calls = tokens(7), []
    real = InputQuantizer.project
    monkeypatch.setattr(InputQuantizer, "project", lambda q, x: calls.append(q) or real(q, x))
    outputs = [linear(x) for linear in linears]
    assert len(calls) == 1
    for state, y in zip(states, outputs, strict=True):
        alone = LRQLinear.from_state(dataclasses.replace(state, shared_input=None))
        assert torch.equal(alone(x), y)
    x[3].mul_(2.0)
    assert torch.equal(linears[0](x), LRQLinear.from_state(states[0])(x))


@pytest.mark.parametrize("scheme", [ALL["w4a8"], ALL["w3a4-rms"], ALL["w4a16"]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_linears_equal_separate_ones(scheme: QuantScheme, dtype: torch.dtype):
    states, linears = sharing(scheme)
    x = tokens(9, dtype=dtype)
    separate = torch.cat([linear(x) for linear in linears], dim=-1)
    fused = fuse_linears(linears)
    rest = [LRQLinear.from_state(without_branch(state))(x.float()) for state in states]
    exact = [r.double() + exact_branch(s, x) for r, s in zip(rest, states, strict=True)]
    assert_at_most_twice(fused(x), separate, torch.cat(exact, dim=-1))
    parts = fused.part_states()
    assert all(same_branch(parts[n], s) for n, s in zip("qkv", states, strict=True))
    split = split_linear(fused)
    assert torch.equal(torch.cat([linear(x) for linear in split], dim=-1), separate)


def test_a_linear_whose_input_has_no_branch_of_its_rank_is_refused():
    state = draw(ALL["w4a8"])
    for other in (without_branch(state), draw(ALL["w4a8"], R + 1)):
        shared = LRQLinear.from_state(other).input_quantizer
        with pytest.raises(ValueError, match=rf"LRQLinear k: low_rank_up .* rank {other.low_rank}"):
            LRQLinear.from_state(state, shared, "k")
    with pytest.raises(ValueError, match=r"low_rank_down must be \[R, 256\], got \[6, 255\]"):
        half = (state.smooth_scale, state.rotation, state.low_rank_down[:, 1:])
        InputQuantizer(K, state.scheme, *half)


def test_a_quantized_input_alone_is_refused():
    """What it computes would lack the branch."""
    linear = LRQLinear.from_state(draw(ALL["w4a8"]), name="proj")
    prepared = linear.input_quantizer.quantize(tokens(3))
    with pytest.raises(RuntimeError, match="proj has a low-rank branch"):
        linear.from_quantized(*prepared, torch.float32)


def test_a_stack_is_refused():
    scheme = ALL["w4a16-plain"]
    states = [make_state(128, K, scheme, smooth=False) for _ in range(2)]
    branched = [with_low_rank(states[0], R), states[1]]
    with pytest.raises(ValueError, match="StackedLinear: a has a low-rank branch"):
        stack_linears(
            [LRQLinear.from_state(s, name=n) for s, n in zip(branched, "ab", strict=True)]
        )
    stack, rows = stack_linears([LRQLinear.from_state(state) for state in states])
    assert stack.to_state().low_rank == 0 and rows[1].linear().to_state().low_rank == 0


@pytest.mark.parametrize("scheme", [ALL["w4a8"], ALL["w4a16"]])
def test_permutation_folded_and_unfolded(scheme: QuantScheme):
    """x comes in the order of the permutation, rows stand in another: the same branch."""
    state, x = draw(scheme), tokens(5)
    linear = LRQLinear.from_state(state)
    expected, before = linear(x), {n: b.clone() for n, b in linear.named_buffers()}
    order = torch.randperm(N).int()
    fold_permutation(linear.input_quantizer)
    order_rows(linear, order)
    permuted = x[:, state.rotation.permutation.long()]
    torch.testing.assert_close(linear(permuted), expected[:, order.long()], rtol=1e-4, atol=1e-4)
    assert same_branch(linear.to_state(), state)
    restore_order(linear)
    after = dict(linear.named_buffers())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], buffer) for name, buffer in before.items())


@every_scheme
def test_casts_copies_and_state_dicts_keep_the_bits(scheme: QuantScheme):
    linear, x = LRQLinear.from_state(draw(scheme)), tokens(5)
    y = linear(x)
    for twin in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert torch.equal(twin.to(torch.float16).to(torch.bfloat16)(x), y)
    other = LRQLinear.from_state(draw(scheme))
    if scheme.rotation != "dual":
        assert not torch.equal(other(x), y)
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other(x), y)
    wrong = linear.state_dict()
    wrong["low_rank_up"] = torch.zeros(N, R, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="low_rank_up must be torch.int16, got torch.bfloat16"):
        other.load_state_dict(wrong)


def test_memory_is_counted_as_a_branch():
    linear = LRQLinear.from_state(draw(ALL["w4a8"]))
    assert memory_by_kind(linear)[BRANCHES] == 2 * R * (N + K)


@every_scheme
def test_compiled_is_one_graph_and_equal(scheme: QuantScheme):
    _, linears = sharing(scheme)
    x = tokens(6)

    def all_three(x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in linears], dim=-1)

    expected = all_three(x)
    compiled = torch.compile(all_three, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_pass_under_compile_projects_x_once(dtype: torch.dtype):
    """Of three readers one projection and one quantization are left, and three second products; no
    epilogue is fused over the branch."""
    _, linears = sharing(ALL["w4a8"])
    x = tokens(2, 3, dtype=dtype)

    class Readers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (linear(x) for linear in linears)
            return torch.cat([F.gelu(q, approximate="tanh"), x[..., :N] + k, v], dim=-1)

    model = Readers()
    compiled, found = passed(model)
    with torch.no_grad():
        got = compiled(x)
        assert found == [{"shared_input": 2 + 2}]
        assert relative_error(got, model(x).double()) < (1e-5 if dtype == F32 else 2e-2)


def test_exported_program_holds_the_branch(tmp_path: Path):
    linear, x = LRQLinear.from_state(draw(ALL["w4a8"])), tokens(6)
    program = torch.export.export(linear, (x,), strict=False)
    torch.export.save(program, tmp_path / "program.pt2")
    again = torch.export.load(tmp_path / "program.pt2").module()
    torch.testing.assert_close(again(x), linear(x), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@every_scheme
def test_gpu_is_as_near_as_the_cpu_and_comes_back(scheme: QuantScheme):
    state, x = draw(scheme), tokens(33, dtype=torch.bfloat16)
    linear = LRQLinear.from_state(state)
    on_cpu = linear(x)
    on_gpu = linear.cuda()(x.cuda()).cpu()
    weight = reference.prepack(state.codes, K, scheme.weight_bits)
    sizes = (N, K, scheme.weight_bits)
    level = reference.weight_levels(weight, state.levels, *sizes).double()
    rotated = state.rotation.apply(x.double() * state.smooth_scale.double())
    exact = F.linear(rotated, level * state.weight_scale.double()[:, None], state.bias.double())
    assert_at_most_twice(on_gpu, on_cpu, exact + exact_branch(state, x))
    assert torch.equal(linear.cpu()(x), on_cpu)

"""Tables of levels that rows share: fitted, in the format, in the layer, in every op."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from op_samples import VALID
from safetensors import safe_open
from test_checkpoint import assert_same_state, drop, layer, rewrite, tensor
from test_fused_blocks import LrqCalls
from test_fusion import passed
from test_low_rank import WEIGHTS_FOLDER
from tiny_models import TINY, linears, run
from torch import Tensor

import lrq_quant
from lrq_kernels import (
    CheckpointError,
    LinearState,
    LRQLinear,
    QuantScheme,
    TwinLogCodebook,
    fuse_linears,
    load,
    ops,
    save,
    stack_linears,
)
from lrq_kernels.checkpoint import stored_bits
from lrq_kernels.codebook import joined_tables
from lrq_kernels.linear import split_linear
from lrq_kernels.loader import build_linears
from lrq_kernels.row_order import order_rows, restore_order
from lrq_kernels.testing import make_problem, make_state, poisoned_memory, random_levels, sqnr_db
from lrq_quant import LRQConfig, QuantRecipe, quantize_model
from lrq_quant.__main__ import main
from lrq_quant.model_memory import LEVELS, memory_by_kind
from lrq_quant.pipeline_io import load_report, load_transformer, save_transformer
from lrq_quant.shared_tables import fit_shared_tables
from lrq_quant.twin_log import fit_twin_log

N, K, T = 48, 256, 5
F32 = torch.float32
SCHEMES = {
    "w4a8": QuantScheme(4, 8),
    "w3a4": QuantScheme(3, 4, "hadamard", 64, "rms", 0.3545),
    "w2a8-dual": QuantScheme(2, 8, "dual"),
    "w4a16": QuantScheme(4, 16, "none"),
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
every_width = pytest.mark.parametrize("bits", [2, 3, 4])


def draw(scheme: QuantScheme, tables: int = T, **options: Any) -> LinearState:
    return make_state(N, K, scheme, shared_tables=tables, **options)


def with_own_tables(state: LinearState) -> LinearState:
    """The same weights, each row with a table of its own."""
    return dataclasses.replace(state, levels=state.codebook().row_levels(), table_of_row=None)


def same_weight(one: LinearState, other: LinearState) -> bool:
    """What is stored of the weight; the input may be under another name."""
    names = ("codes", "levels", "weight_scale", "table_of_row")
    mine, theirs = ([getattr(state, name) for name in names] for state in (one, other))
    return all(
        torch.equal(a, b) if a is not None and b is not None else a is b
        for a, b in zip(mine, theirs, strict=True)
    )


def error(codebook: TwinLogCodebook, weight: Tensor, importance: Tensor | float = 1.0) -> Tensor:
    """[N]"""
    decoded = codebook.decode(codebook.encode(weight))
    return ((decoded - weight).double().square() * importance).sum(1)


# ---- the fit ------------------------------------------------------------------------------------


@every_width
def test_more_tables_fit_better_and_those_of_rows_best(bits: int):
    weight = torch.randn(192, 320) * torch.rand(192, 1).add(0.01)
    own = fit_twin_log(weight, bits)
    decibel = [
        sqnr_db(weight, c.decode(c.encode(weight)))
        for c in (*(fit_shared_tables(weight, bits, count) for count in (1, 4, 32)), own)
    ]
    # Neither search is exhaustive.
    assert all(fewer < more + 0.02 for fewer, more in itertools.pairwise(decibel))
    assert decibel[3] - decibel[0] < {2: 0.4, 3: 0.6, 4: 0.9}[bits]
    assert decibel[3] - decibel[2] < {2: 0.1, 3: 0.15, 4: 0.3}[bits]


@every_width
def test_rows_of_two_kinds_get_a_table_each(bits: int):
    """Of uniform and long-tailed rows no one table is good: two are about as good as one for each
    kind alone, whatever the order of the rows and their sizes."""
    uniform = torch.rand(64, 512) * 2 - 1
    tailed = torch.randn(64, 512) * torch.randn(64, 512)
    order = torch.randperm(128)
    weight = torch.cat([uniform, tailed]) * torch.rand(128, 1).add(0.1)

    def loss(rows: Tensor, tables: int) -> float:
        """Of rows that count alike."""
        power = rows.square().sum(1)
        return float((error(fit_shared_tables(rows, bits, tables), rows) / power).sum())

    alone = loss(weight[:64], 1) + loss(weight[64:], 1)
    assert loss(weight[order], 2) < 1.02 * alone < loss(weight[order], 1) / 1.02


@every_width
def test_every_row_has_the_best_table_and_scale(bits: int):
    """By search: all tables at 57 scales leave 2 % less at best."""
    weight = torch.randn(48, 320) * torch.rand(48, 1).add(0.1)
    made = fit_shared_tables(weight, bits, 4)
    best = mine = error(made, weight)
    for table in range(len(made.levels)):
        place = torch.full_like(made.table_of_row, table)
        for factor in torch.linspace(0.7, 1.4, 57).tolist():
            other = TwinLogCodebook(made.levels, made.scale * factor, place)
            best = torch.minimum(best, error(other, weight))
    assert float((best / mine).mean()) > 0.98


def test_importance_counts():
    weight, importance = torch.randn(40, 256), torch.rand(256).pow(4)
    weighed, plain = (fit_shared_tables(weight, 3, 4, importance=i) for i in (importance, None))
    assert error(weighed, weight, importance).sum() < error(plain, weight, importance).sum()
    assert error(plain, weight).sum() < error(weighed, weight).sum()
    each = fit_shared_tables(weight, 3, 4, importance=importance.expand(40, -1))
    for name in ("levels", "scale", "table_of_row"):
        assert torch.equal(getattr(each, name), getattr(weighed, name))


def test_the_same_weight_gives_the_same_tables_and_all_are_used():
    weight = torch.randn(300, 96)
    made, again = (fit_shared_tables(weight, 4, 256) for _ in range(2))
    for name in ("levels", "scale", "table_of_row"):
        assert torch.equal(getattr(made, name), getattr(again, name))
    assert made.table_of_row.unique().tolist() == list(range(len(made.levels)))
    assert len(made.levels) <= 256


def test_few_rows_rows_of_zeros_and_parts():
    one = fit_shared_tables(torch.randn(1, 64), 4, 16)
    assert len(one.levels) == 1 and one.table_of_row.tolist() == [0]
    weight = torch.randn(40, 128)
    weight[[3, 17]] = 0.0
    made = fit_shared_tables(weight, 4, 4)
    decoded = made.decode(made.encode(weight))
    assert torch.isfinite(made.scale).all() and float(decoded[[3, 17]].abs().max()) < 1e-6
    part = made.rows(slice(10, 20))
    assert torch.equal(part.decode(part.encode(weight[10:20])), decoded[10:20])
    assert fit_shared_tables(torch.zeros(5, 64), 2, 2).scale.isfinite().all()


def test_what_it_does_not_take_is_refused():
    weight = torch.randn(4, 64)
    for tables in (0, 257, -1):
        with pytest.raises(ValueError, match=f"tables must be from 1 to 256, got {tables}"):
            fit_shared_tables(weight, 4, tables)
    with pytest.raises(ValueError, match="weight must be finite"):
        fit_shared_tables(weight / 0, 4, 2)
    with pytest.raises(ValueError, match=r"importance must be \[K\] = \[64\]"):
        fit_shared_tables(weight, 4, 2, importance=torch.ones(4))


# ---- codebook -----------------------------------------------------------------------------------


@every_width
def test_a_codebook_is_that_of_the_rows_written_out(bits: int):
    levels, scale = random_levels(3, bits), torch.rand(20)
    of_row = torch.randint(0, 3, (20,), dtype=torch.uint8)
    shared = TwinLogCodebook(levels, scale, of_row)
    own = TwinLogCodebook(levels[of_row.long()], scale)
    weight = torch.randn(20, 33)
    assert torch.equal(shared.encode(weight), own.encode(weight))
    assert torch.equal(shared.decode(own.encode(weight)), own.decode(own.encode(weight)))
    assert torch.equal(shared.ascending(), own.ascending()) and shared.bits == bits


def test_codebooks_that_do_not_fit_together_are_refused():
    levels, scale = random_levels(3, 4), torch.rand(20)
    of_row = torch.randint(0, 3, (20,), dtype=torch.uint8)
    with pytest.raises(ValueError, match="below the 3 tables there are, got 3"):
        TwinLogCodebook(levels, scale, torch.full_like(of_row, 3))
    with pytest.raises(ValueError, match=r"torch.uint8 \[20\] as scale, got torch.int64 \[20\]"):
        TwinLogCodebook(levels, scale, of_row.long())
    with pytest.raises(ValueError, match=r"as scale, got torch.uint8 \[19\]"):
        TwinLogCodebook(levels, scale, of_row[1:])
    with pytest.raises(ValueError, match="must be 1 to 256 tables, got 257"):
        TwinLogCodebook(random_levels(257, 4), scale, of_row)


# ---- ops ----------------------------------------------------------------------------------------

WITH_TABLES = ("dequantize", "gemm", "gemm_config", "gemv", "gemm_a16")


@pytest.mark.parametrize("op", WITH_TABLES)
def test_ops_refuse_other_tables(op: str):
    """On the CPU and on meta tensors, naming what is wrong."""
    given = VALID[op]("cpu")
    n = given["out_features"]
    of_row = torch.zeros(n, dtype=torch.uint8)
    call = getattr(torch.ops.lrq, op)
    wrong = (
        ({"levels": random_levels(257, 4)}, r"levels must be \[T, 16\] with T from 1 to 256"),
        ({"levels": random_levels(3, 3)}, r"levels must be torch.int8 \[3, 16\]"),
        ({"table_of_row": of_row[1:]}, rf"table_of_row must be torch.uint8 \[{n}\]"),
        ({"table_of_row": of_row.int()}, "table_of_row must be torch.uint8"),
        ({"table_of_row": None}, rf"levels must be torch.int8 \[{n}, 16\]"),
    )
    for changes, message in wrong:
        arguments = {**given, "levels": random_levels(3, 4), "table_of_row": of_row, **changes}
        with pytest.raises(ValueError, match=message):
            call(**arguments)
        on_meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
        with pytest.raises(ValueError, match=message):
            call(**on_meta)


@pytest.mark.parametrize("op", WITH_TABLES)
def test_ops_read_the_table_of_each_row(op: str):
    given = VALID[op]("cpu")
    levels = random_levels(7, 4)
    of_row = torch.randint(0, 7, (given["out_features"],), dtype=torch.uint8)
    call = getattr(torch.ops.lrq, op)
    shared = call(**{**given, "levels": levels, "table_of_row": of_row})
    assert torch.equal(shared, call(**{**given, "levels": levels[of_row.long()]}))
    assert not torch.equal(shared, call(**{**given, "levels": levels[(of_row.long() + 1) % 7]}))
    torch.library.opcheck(
        call.default, (), {**given, "levels": levels, "table_of_row": of_row},
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.gpu
@every_width
@pytest.mark.parametrize(("n", "k"), [(64, 128), (200, 640), (3072, 1152), (1001, 1000)])
def test_kernels_read_the_table_of_each_row(bits: int, n: int, k: int):
    """Every configuration and tile, bit for bit what it makes of rows with tables of their own."""
    planner = pytest.importorskip("lrq_kernels._planner")
    capability = torch.cuda.get_device_capability()
    arch = 10 * capability[0] + capability[1]
    problem = make_problem(300, n, k, bits, device="cuda", tables=11)
    own, of_row = problem.levels[problem.table_of_row.long()], problem.table_of_row
    weight, scale, bias = problem.weight, problem.weight_scale, problem.bias

    def both(run: Callable[..., Tensor]) -> None:
        with poisoned_memory():
            shared, expected = run(problem.levels, of_row), run(own, None)
        assert torch.equal(shared, expected)

    both(lambda levels, t: ops.dequantize(weight, levels, scale, n, k, bits, torch.bfloat16, t))
    x = torch.randn(300, k, device="cuda", dtype=torch.bfloat16)
    for rows in (1, 16):
        both(lambda levels, t, r=rows: ops.gemv(x[:r], weight, levels, scale, bias, bits, n, t))
    tiles = range(-1, len(planner.a16_tiles()) if capability == (9, 0) and k % 8 == 0 else 0)
    for tile in tiles:
        both(lambda levels, t, i=tile: ops.gemm_a16(x, weight, levels, scale, bias, bits, n, i, t))
    for config, row in enumerate(planner.gemm_configs()):
        if not row.is_legal(300, n, k, bits, arch):
            continue
        both(
            lambda levels, t, c=config: torch.ops.lrq.gemm_config(
                problem.x_q, problem.x_scale, weight, levels, scale, bias, None, None, bits, n,
                "gelu_tanh", torch.bfloat16, c, t,
            )
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("op", WITH_TABLES)
def test_kernels_refuse_other_tables(op: str):
    given = VALID[op]("cuda")
    of_row = torch.zeros(given["out_features"], dtype=torch.uint8, device="cuda")
    call = getattr(torch.ops.lrq, op)
    levels = random_levels(3, 4, device="cuda")
    wrong = (
        ({"levels": random_levels(257, 4, device="cuda")}, r"\[T, 16\] with T from 1 to 256"),
        ({"table_of_row": of_row[1:]}, "table_of_row must be torch.uint8"),
        ({"table_of_row": of_row.cpu()}, "table_of_row must be on cuda"),
        ({"table_of_row": None}, "levels must be torch.int8"),
    )
    for changes, message in wrong:
        with pytest.raises(ValueError, match=message):
            call(**{**given, "levels": levels, "table_of_row": of_row, **changes})


# ---- the layer ----------------------------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32])
def test_a_layer_computes_what_own_tables_do(scheme: QuantScheme, dtype: torch.dtype):
    state = draw(scheme, permuted=scheme.rotation != "none")
    linear, expected = LRQLinear.from_state(state), LRQLinear.from_state(with_own_tables(state))
    for rows in (3, 33):
        x = torch.randn(2, rows, K).to(dtype)
        assert torch.equal(linear(x), expected(x))
    assert torch.equal(linear.dense_weight(), expected.dense_weight())
    assert_same_state(linear.to_state(), state)
    twin = copy.deepcopy(linear).to(torch.float16)
    assert torch.equal(twin(x), linear(x))
    twin.load_state_dict(linear.state_dict())
    assert_same_state(twin.to_state(), state)


def test_memory_counts_the_tables():
    state = draw(SCHEMES["w4a8"], permuted=False)
    shared, own = (memory_by_kind(LRQLinear.from_state(s)) for s in (state, with_own_tables(state)))
    assert own[LEVELS] - shared[LEVELS] == 16 * (N - T) - N


@pytest.mark.parametrize("scheme", [SCHEMES["w4a8"], SCHEMES["w4a16"]])
def test_rows_in_another_order(scheme: QuantScheme):
    state, x = draw(scheme), torch.randn(5, K)
    linear = LRQLinear.from_state(state)
    before, expected = {n: b.clone() for n, b in linear.named_buffers()}, linear(x)
    order = torch.randperm(N).int()
    order_rows(linear, order)
    assert torch.equal(linear(x), expected[:, order.long()])
    assert_same_state(linear.to_state(), state)
    restore_order(linear)
    assert all(torch.equal(b, before[n]) for n, b in linear.named_buffers())


@pytest.mark.parametrize("kinds", [(5, 7, 6), (200, 56, 0), (200, 57, 3), (0, 0, 4)])
def test_fused_linears_keep_their_tables_where_a_byte_names_them(kinds: tuple[int, ...]):
    """300 rows each; 0: a table for each row. Above 256 tables each row gets its own."""
    scheme = SCHEMES["w4a8"]
    first = make_state(300, K, scheme, shared_tables=kinds[0])
    others = [
        make_state(300, K, scheme, shared_with=("q", first), shared_tables=k) for k in kinds[1:]
    ]
    states = dict(zip("qkv", [first, *others], strict=True))
    x = torch.randn(9, K).bfloat16()
    linears = list(build_linears(states, F32).values())
    separate = torch.cat([linear(x) for linear in linears], dim=-1)
    fused = fuse_linears(linears)
    assert torch.equal(fused(x), separate)
    together = sum(kinds) if sum(kinds) <= 256 and all(kinds) else 0
    assert fused.to_state().shared_tables == together
    for name, part in fused.part_states().items():
        assert same_weight(part, states[name] if together else with_own_tables(states[name]))
    split = split_linear(fused)
    assert torch.equal(torch.cat([linear(x) for linear in split], dim=-1), separate)


@pytest.mark.parametrize("count", [3, 100])
def test_stacked_linears(count: int):
    """As fused ones: 300 tables are written out."""
    scheme, names = SCHEMES["w4a16"], "abc"
    states = [make_state(128, K, scheme, smooth=False, shared_tables=count) for _ in names]
    linears = [LRQLinear.from_state(s, name=n) for s, n in zip(states, names, strict=True)]
    x = torch.randn(2, K).bfloat16()
    expected = [linear(x) for linear in linears]
    stack, rows = stack_linears(linears)
    assert torch.equal(stack(x), torch.cat(expected, dim=-1))
    kept = count == 3
    assert stack.to_state().shared_tables == (9 if kept else 0)
    for place, state, y in zip(rows, states, expected, strict=True):
        assert torch.equal(place(x), y)
        back = place.linear()
        assert torch.equal(back(x), y)
        assert_same_state(back.to_state(), state if kept else with_own_tables(state))


def test_joined_tables_of_other_parts():
    levels, of_row = joined_tables([(random_levels(2, 4), torch.tensor([1, 0], dtype=torch.uint8))])
    assert len(levels) == 2 and of_row.tolist() == [1, 0]


# ---- the format ---------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    scheme = SCHEMES["w4a8"]
    q = draw(scheme)
    states = {"to_q": q, "to_k": make_state(N, K, scheme, shared_with=("to_q", q))}
    return save(tmp_path / "model.safetensors", states, {}, "Toy")


@every_scheme
def test_save_and_load(scheme: QuantScheme, tmp_path: Path):
    q = draw(scheme)
    k = make_state(N, K, scheme, shared_with=("to_q", q), shared_tables=2)
    states = {"to_q": q, "to_k": k, "out": make_state(N, K, scheme)}
    loaded = load(save(tmp_path, states, {}, "Toy")).states
    for name, state in states.items():
        assert_same_state(loaded[name], state)
        assert loaded[name].shared_tables == state.shared_tables
    bits = stored_bits(loaded["to_k"])
    assert bits["levels"] == 8 * 2 << scheme.weight_bits and bits["table_of_row"] == 8 * N


def test_only_a_file_with_shared_tables_needs_the_newer_version(file: Path, tmp_path: Path):
    plain = save(tmp_path / "plain", {"q": make_state(N, K, SCHEMES["w4a8"])}, {}, "Toy")
    expected = {file: ("3", {"to_q": T, "to_k": None}), plain: ("1", {"q": None})}
    for path, (version, tables) in expected.items():
        with safe_open(str(path), framework="pt") as handle:
            metadata = handle.metadata()
        described = json.loads(metadata["layers"])
        assert metadata["version"] == version
        assert {n: v.get("shared_tables") for n, v in described.items()} == tables


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("to_q.table_of_row"), "to_q.table_of_row is missing"),
        (
            lambda contents: contents["layers"]["to_q"].pop("shared_tables"),
            rf"to_q.levels must be torch.int8 \[{N}, 16\]",
        ),
        (layer("to_k", shared_tables=N), "to_k.table_of_row is missing"),
        (
            layer("to_q", shared_tables=T + 1),
            rf"to_q.levels must be torch.int8 \[{T + 1}, 16\]",
        ),
        (layer("to_q", shared_tables=0), "shared_tables must be positive"),
        (
            tensor("to_q.table_of_row", lambda t: t.clamp(min=T)),
            f"below the {T} tables there are, got {T}",
        ),
        (tensor("to_q.table_of_row", lambda t: t.int()), "to_q.table_of_row must be torch.uint8"),
    ],
)
def test_files_that_contradict_themselves_are_refused(change: Callable, message: str, file: Path):
    rewrite(file, change)
    with pytest.raises(CheckpointError, match=message):
        load(file)


# ---- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flux", "pixart"])
def test_a_model_is_quantized_saved_and_loaded(kind: str, tmp_path: Path):
    """Modulation keeps its own tables, few rows share fewer; fewer bits, nearly the same."""
    model = TINY[kind][0]()
    bits = {}
    for tables in (0, 4):
        result = quantize_model(model, QuantRecipe.from_name("w4a8", shared_tables=tables))
        bits[tables] = result.report.weight_bits
        for linear in result.report.linears:
            own = linear.role == "modulation" or not tables
            most = 0 if own else min(tables, max(1, linear.out_features // 16))
            found = result.states[linear.name].shared_tables
            assert found <= most and bool(found) == bool(most), linear.name
    assert bits[4] < bits[0] - 0.1
    expected = run(model, kind, F32)
    save_transformer(model, result, tmp_path)
    again = load_transformer(tmp_path, dtype=F32)
    assert sqnr_db(expected, run(again, kind, F32)) > 15
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["shared_tables"], config["format_version"]) == (4, 3)
    again.save_pretrained(tmp_path / "again")
    one, other = (load(folder).states for folder in (tmp_path, tmp_path / "again"))
    for name, state in one.items():
        assert same_weight(other[name], state)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flux", "pixart"])
def test_fused_and_compiled_they_are_read_all_the_same(kind: str, tmp_path: Path):
    """The pass under torch.compile and fuse_blocks find what they find in a model whose rows have
    the same tables written out, and compute the same bits."""
    dense = TINY[kind][0]()
    result = quantize_model(dense, QuantRecipe.from_name("w4a8", shared_tables=4))
    written_out = {name: with_own_tables(state) for name, state in result.states.items()}
    outputs, counts = [], []
    for states in (result.states, written_out):
        folder = tmp_path / str(len(outputs))
        save_transformer(dense, dataclasses.replace(result, states=states), folder)
        each = load_transformer(folder, dtype=F32)
        share = [linear.table_of_row is not None for linear in linears(each).values()]
        assert any(share) == (not outputs)
        compiled, found = passed(each)
        outputs.append([run(each, kind, F32), run(compiled, kind, F32)])
        lrq_quant.fuse_blocks(each)
        with LrqCalls() as calls:
            outputs[-1].append(run(each, kind, F32))
        counts.append((found, calls.counts))
    assert counts[0] == counts[1] and counts[0][0][0]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_quantized_while_it_loads(tmp_path: Path):
    dense = TINY["pixart"][0]()
    dense.save_pretrained(tmp_path / "dense")
    model = type(dense).from_pretrained(
        tmp_path / "dense",
        quantization_config=LRQConfig("w4a8", shared_tables=8),
        torch_dtype=F32,
    )
    expected = quantize_model(dense, QuantRecipe.from_name("w4a8", shared_tables=8)).states
    found = linears(model)
    assert found.keys() == expected.keys()
    for name, linear in found.items():
        state = linear.to_state()
        assert torch.equal(state.codes, expected[name].codes)
        assert state.shared_tables == expected[name].shared_tables


def test_recipes_that_are_none_are_refused():
    for tables in (-1, 257, True, "8"):
        with pytest.raises(ValueError, match="shared_tables must be a whole number from 0 to 256"):
            QuantRecipe(shared_tables=tables)
        with pytest.raises(ValueError, match="shared_tables must be a whole number from 0 to 256"):
            LRQConfig(shared_tables=tables)
    with pytest.raises(ValueError, match="shared_tables must be 0 in mode 'paper', got 4"):
        QuantRecipe(shared_tables=4, mode="paper")
    assert "shared_tables" not in LRQConfig().to_dict()
    assert LRQConfig.from_dict(LRQConfig(shared_tables=7).to_dict()).shared_tables == 7


def test_the_command_line_takes_tables(tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "shapes"
    arguments = ["quantize", str(WEIGHTS_FOLDER), str(out), "--weights-only", "--device", "cpu"]
    assert main([*arguments, "--shared-tables", "4", "--pictures", "0"]) == 0
    assert "codebooks of 4 tables that rows share" in capsys.readouterr().out
    assert load_report(out).recipe["shared_tables"] == 4
    assert main(["inspect", str(out)]) == 0
    assert "codebooks of 4 tables that rows share" in capsys.readouterr().out

"""bench_model: what a variant is, what a row says, and that a failing variant does not end a run.

On tiny models on the CPU, where times mean nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from benchmarks import bench_model as bench
from benchmarks import model_breakdown, peers
from benchmarks import model_variants as variants
from benchmarks.model_plot import plot
from benchmarks.model_variants import Variant
from lrq_kernels.testing import relative_error
from lrq_quant.machine_limits import Limits
from lrq_quant.model_inputs import model_inputs
from lrq_quant.model_memory import memory_by_kind, tensor_bytes
from lrq_quant.model_shapes import make_model, named_inputs, names_with_inputs
from lrq_quant.profiling import Kernel, Recording


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(bench, "WARMUP_S", 0.0)
    monkeypatch.setattr(bench, "MIN_FORWARDS", 3)
    monkeypatch.setattr(bench, "MAX_FORWARDS", 3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Of checkpoints: the first test that asks for a scheme quantizes it."""
    return tmp_path_factory.mktemp("cache")


def run(
    tmp_path: Path,
    cache: Path,
    *names: str,
    model: object = "tiny-flux",
    options: Sequence[str] = ("--output-error",),
) -> tuple[int, list[dict]]:
    file = tmp_path / "rows.json"
    given = ["--device", "cpu", "--size", "64", "--json", str(file), "--cache", str(cache)]
    code = bench.main(["--model", str(model), *given, *options, "--variants", *names])
    return code, json.loads(file.read_text())


@pytest.mark.parametrize("model", ["tiny-flux", "tiny-pixart"])
def test_rows_of_variants(model: str, cache: Path, tmp_path: Path, capsys):
    code, rows = run(tmp_path, cache, "bf16-eager", "w4a8-loaded", "w4a8-eager", model=model)
    assert code == 0 and [row["variant"] for row in rows] == [
        "bf16-eager",
        "w4a8-loaded",
        "w4a8-eager",
    ]
    dense, loaded, eager = rows
    assert dense["weights_gb"] == pytest.approx(tensor_bytes(make_model(model, "cpu")) / 1e9)
    assert loaded["weights_gb"] < dense["weights_gb"] and 4 < loaded["weight_bits"] < 6
    assert 0.5 < loaded["coverage"] < 1 and loaded["quantize_s"] == eager["quantize_s"]
    assert (loaded["output_error"], loaded["output_sqnr_db"]) == (0.0, None)
    assert eager["output_sqnr_db"] > 35 and eager["fused_blocks"].startswith(("4 of 4", "2 of 2"))
    for row in rows:
        assert row["ms"] > 0 and row["forwards"] == 3 and row["model"] == model
        assert row["torch"] == torch.__version__ and row["gpu"] == "none, CPU" and row["date"]
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def test_breakdown_by_family(cache: Path, tmp_path: Path, capsys):
    """The parts add up to the forward that was recorded; kernels bear the family they count for;
    both are held to the same products."""
    names = ("bf16-eager", "w4a8-eager")
    options = ["--breakdown", "--trace", str(tmp_path / "new" / "traces")]
    options += ["--plot", str(tmp_path / "bars.png")]
    code, (dense, ours) = run(tmp_path, cache, *names, model="tiny-pixart", options=options)
    assert code == 0
    for row in (dense, ours):
        families = row["families"]
        assert sum(families.values()) == pytest.approx(row["recorded_ms"])
        assert min(families.values()) >= 0 and families["gemm"] > 0 and families["attention"] > 0
        for kernel in row["kernels"]:
            assert kernel["ms"] <= families[kernel["family"]] * (1 + 1e-9)
        assert row["gemm_share"] is None and row["limits"] == Limits()._asdict()
    for family in ("gemm", "attention"):
        done = [row[f"{family}_tops"] * row["families"][family] for row in (dense, ours)]
        assert done[0] == pytest.approx(done[1]) and done[0] > 0
    assert "quantization" in ours["families"] and "quantization" not in dense["families"]
    by_lrq = [any("lrq::" in kernel["name"] for kernel in row["kernels"]) for row in (dense, ours)]
    assert by_lrq == [False, True]
    for name in names:
        trace = json.loads((tmp_path / "new" / "traces" / f"{name}.json").read_text())
        assert any(event["name"] == "aten::linear" for event in trace["traceEvents"])
    out = capsys.readouterr().out
    titles, *lines = out[out.index("of a recorded forward") :].splitlines()[1:4]
    assert titles.split()[:4] == ["variant", "ms", "gemm", "attention"]
    for line, row in zip(lines, (dense, ours), strict=True):
        gemm = row["families"]["gemm"]
        assert line.split()[:3] == [row["variant"], f"{row['recorded_ms']:.2f}", f"{gemm:.2f}"]


def test_a_breakdown_that_fails_leaves_the_times(cache: Path, tmp_path: Path, monkeypatch, capsys):
    def nothing(*_: object, **__: object) -> None:
        raise RuntimeError("the profiler recorded no kernel")

    monkeypatch.setattr(model_breakdown, "record_forwards", nothing)
    code, (row,) = run(tmp_path, cache, "bf16-eager", options=["--breakdown"])
    assert code == 1 and row["ms"] > 0 and "families" not in row
    assert "no breakdown, RuntimeError: the profiler recorded" in capsys.readouterr().out


def test_breakdown_table_of_variants_and_families():
    """A family that one variant lacks is a zero; a share is there where its limit is."""
    rows = [
        {"variant": "nf4", "recorded_ms": 12.0, "families": {"gemm": 8.0, "quantization": 3.0}},
        {
            "variant": "w4a8-graph",
            "recorded_ms": 5.0,
            "families": {"gemm": 4.5, "launch gaps": 0.5},
        },
        {"variant": "sdnq", "error": "no"},
    ]
    rows[0] |= {"gemm_tops": 500.4, "gemm_share": 0.662}
    rows[1] |= {"gemm_tops": 900.0, "gemm_share": None}
    titles, *lines = model_breakdown.table(rows).splitlines()[1:]
    assert titles.split()[2:6] == ["gemm", "quantization", "launch", "gaps"]
    assert [line.split() for line in lines] == [
        ["nf4", "12.00", "8.00", "3.00", "0.00", "500", "(66%)", "-"],
        ["w4a8-graph", "5.00", "4.50", "0.00", "0.50", "900", "-"],
    ]
    assert len({len(line) for line in (titles, *lines)}) == 1


@pytest.mark.parametrize(
    "name, limit",
    [
        ("bf16-compiled", 700.0),
        ("nf4", 700.0),
        ("w4a16-eager", 700.0),
        ("torchao-fp8-compiled", 1400.0),
        ("torchao-int8-compiled", 1400.0),
        ("sdnq", 1400.0),
        ("w4a4-graph", 1400.0),
    ],
)
def test_products_are_held_to_the_limit_of_their_bits(name: str, limit: float, monkeypatch):
    recording = Recording([Kernel("nvjet_tst", "gemm", 2.0, 3.0)], 2.5, 2.0)
    monkeypatch.setattr(model_breakdown, "record_forwards", lambda *_, **__: recording)
    operations = {"gemm": int(1.4e12), "attention": 0}
    limits = Limits(3000.0, 1400.0, 700.0)
    row = model_breakdown.broken_down(nn.Module(), {}, Variant.parse(name), operations, limits)
    assert row["families"] == {"gemm": 2.0, "launch gaps": 0.5}
    assert row["gemm_tops"] == pytest.approx(700.0) and "attention_tops" not in row
    assert row["gemm_share"] == pytest.approx(700.0 / limit)


def test_a_low_rank_branch_and_shared_tables_are_variants(cache: Path, tmp_path: Path):
    """Bits are counted, and with a branch weights are nearer to those of bf16."""
    names = ("w4a8-loaded", "w4a8+rank8-loaded", "w4a8+rank8+tables4-loaded")
    code, (plain, branch, both) = run(tmp_path, cache, *names, model="tiny-pixart")
    assert code == 0 and branch["weight_bits"] > plain["weight_bits"] + 0.5
    assert both["weight_bits"] < branch["weight_bits"] - 0.3
    assert both["weights_gb"] < branch["weights_gb"]
    models = variants.Models("tiny-pixart", "cpu", cache)
    of_block = "transformer_blocks.1.ff.net.2"
    weight = models.dense().get_submodule(of_block).weight.float()
    held = [models.make(Variant.parse(name))[0].get_submodule(of_block) for name in names[:2]]
    errors = [relative_error(linear.dense_weight(), weight) for linear in held]
    assert errors[1] < 0.97 * errors[0]
    for name in ("w4a8+rank0-graph", "w4a8+tables0-graph", "w4a8+tables16+rank8-graph"):
        with pytest.raises(ValueError, match=r"or w4a8\+rank32\+tables16-graph"):
            Variant.parse(name)


def test_a_failing_variant_is_a_row_and_the_others_run(
    cache: Path, tmp_path: Path, monkeypatch, capsys
):
    def absent(name: str) -> None:
        raise peers.PeerMissing(f"{name} is not installed")

    for module in (peers, variants):
        monkeypatch.setattr(module, "package", absent)
    code, rows = run(
        tmp_path, cache, "torchao-int8-eager", "nf4", "sdnq", "w4a8-graph", "w4a8-eager"
    )
    assert code == 1
    assert [("error" in row) for row in rows] == [True, True, True, True, False]
    assert rows[0]["error"] == "PeerMissing: torchao.quantization is not installed"
    assert "CUDA" in rows[3]["error"] and "Traceback" in rows[3]["traceback"]
    assert "nf4                     failed: PeerMissing" in capsys.readouterr().out
    code, rows = run(tmp_path, cache, "nf4", "bf16-eager")
    assert code == 0 and ["missing" in row for row in rows] == [True, False]


def test_rows_are_written_one_by_one(tmp_path: Path, monkeypatch):
    """What was measured before a run is cut stays."""

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(variants._QUANTIZE, "sdnq", cut)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tmp_path / "cache", "bf16-eager", "sdnq")
    assert [row["variant"] for row in json.loads((tmp_path / "rows.json").read_text())] == [
        "bf16-eager"
    ]


def test_a_scheme_is_quantized_once(cache: Path, tmp_path: Path, monkeypatch):
    _, (first,) = run(tmp_path, cache, "w4a8-eager")
    monkeypatch.setattr("lrq_quant.quantize_model", None)
    _, (again,) = run(tmp_path, cache, "w4a8-eager")
    assert again["weight_bits"] == first["weight_bits"]
    assert again["quantize_s"] == first["quantize_s"]


def test_a_folder_in_place_of_a_published_shape(tmp_path: Path):
    """Dense, its weights; quantized, what it holds and nothing else."""
    dense = make_model("tiny-flux", "cpu", seed=5)
    dense.save_pretrained(tmp_path / "dense" / "transformer")
    code, rows = run(tmp_path, tmp_path / "c", "bf16-eager", "w4a8-eager", model=tmp_path / "dense")
    assert code == 0 and rows[0]["weights_gb"] == pytest.approx(tensor_bytes(dense) / 1e9)
    (made,) = (tmp_path / "c").iterdir()
    models = variants.Models(str(made), "cpu", tmp_path / "c2")
    held, facts = models.make(Variant.parse("w4a8-loaded"))
    assert "load_s" in facts and "quantize_s" not in facts
    inputs = models.source.inputs(size=64, device="cpu")
    error = relative_error(held(**inputs)[0], dense(**inputs)[0])
    assert error < 0.3 and type(held) is type(dense)
    for name in ("bf16-eager", "w3a8-eager"):
        with pytest.raises(ValueError, match="must be dense, it is quantized to w4a8"):
            models.make(Variant.parse(name))


def test_names_of_variants():
    for name in [*variants.peer_names(), *variants.DEFAULT_VARIANTS, "w2a8-graph", "w4a16-loaded"]:
        assert Variant.parse(name).name == name
    assert Variant.parse("torchao-fp8-compiled") == Variant(
        "torchao-fp8-compiled", "torchao-fp8", "compiled"
    )
    assert Variant.parse("nf4").mode == "eager" and not Variant.parse("nf4").is_lrq
    for name in (
        "w4a8",
        "w5a8-eager",
        "bf16-loaded",
        "nf4-compiled",
        "w4a8-fast",
        "",
        "sdnq-graph",
    ):
        with pytest.raises(ValueError, match="a variant must be one of"):
            Variant.parse(name)


@pytest.mark.parametrize("name", names_with_inputs())
def test_inputs_are_the_same_in_every_call(name: str):
    first, second = (named_inputs(name, size=256, batch=2, device="cpu") for _ in range(2))
    (leaves, structure), (others, same) = tree_flatten(first), tree_flatten(second)
    assert structure == same
    for value, other in zip(leaves, others, strict=True):
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other)
        else:
            assert value == other


def test_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match="multiple of 16 pixels, got 100"):
        named_inputs("flux-dev", size=100, device="cpu")
    with pytest.raises(ValueError, match="batch must be positive, got 0"):
        named_inputs("flux-dev", batch=0, device="cpu")
    with pytest.raises(ValueError, match="no inputs are known for Unknown"):
        model_inputs("Unknown", {}, device="cpu")


def test_memory_counts_each_storage_once_and_whole():
    model = nn.Module()
    model.whole = nn.Parameter(torch.zeros(8, 4))
    model.register_buffer("view", model.whole.data[:2])
    model.register_buffer("codes", torch.zeros(16, dtype=torch.int8))
    model.register_buffer("empty", torch.zeros(0))
    assert memory_by_kind(model) == {"float32": 128, "int8": 16}
    assert tensor_bytes(model) == 144


def test_memory_of_a_tensor_that_wraps_others():
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Module()
    model.weight = nn.Parameter(TwoTensor(torch.zeros(8), torch.ones(8)), requires_grad=False)
    assert tensor_bytes(model) == 64


def test_plot_writes_a_picture(tmp_path: Path, capsys):
    row = {"variant": "bf16-eager", "lrq": False, "ms": 2.0, "weights_gb": 1.0, "peak_gb": None}
    facts = {"model": "m", "size": 64, "batch": 1, "gpu": "g", "torch": "t", "date": "d"}
    plot([{**facts, "variant": "nf4", "error": "no"}], tmp_path / "none.png")
    assert "no plot" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    plot([facts | row, facts | row | {"lrq": True, "peak_gb": 1.5}], tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 10_000


def test_plot_without_matplotlib_is_a_word(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot([], tmp_path / "bars.png")
    assert "matplotlib is not installed" in capsys.readouterr().out

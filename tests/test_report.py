"""What `inspect` says beyond the figures of a layer."""

from __future__ import annotations

import json

from lrq_kernels import QuantScheme
from lrq_quant.input_makers import MOVES_HEADS, OF_ATTENTION, OF_STREAM, UNKNOWN
from lrq_quant.report import LinearReport, QuantReport


def linear(
    name: str, rotation: str, shared_input: str | None = None, rows: int = 128
) -> LinearReport:
    return LinearReport(
        name=name,
        role="attention",
        scheme=QuantScheme(4, 8),
        shared_input=shared_input or name,
        out_features=rows,
        in_features=256,
        rotation=rotation,
        why="least error",
        alpha=0.5,
        j=None,
        peak_ratio=None,
        weight_sqnr_db=20.0,
        output_sqnr_db=None,
        stored_bits=128 * 256 * 4,
        candidates={},
    )


def report(*linears: LinearReport) -> QuantReport:
    return QuantReport("Tiny", {}, True, 1.0, 1000, linears, ())


def test_inputs_that_are_gathered_are_named_once():
    made = report(
        linear("q", "permuted128 alpha=0.5"),
        linear("k", "permuted128 alpha=0.5", "q"),
        linear("out", "hadamard128 alpha=none"),
        linear("up", "dual128 alpha=0.5"),
        linear("down", "permuted1024 alpha=none"),
    )
    assert made.gathered == ("q", "down") and not made.foldable
    last = made.table().splitlines()[-1]
    assert last.endswith(f"in front of the rotation ({UNKNOWN}): q, down")
    values = json.loads(json.dumps(made.to_dict()))
    assert values["gathered"] == ["q", "down"] and values["foldable"] == []
    assert QuantReport.from_dict(values) == made


def test_inputs_that_are_folded_are_told_from_those_that_cannot_be():
    made = report(
        linear("b.attn.to_q", "permuted128 alpha=0.5"),
        linear("b.attn.to_out.0", "permuted128 alpha=0.5"),
        linear("b.ff.net.0.proj", "hadamard128 alpha=none", rows=256),
        linear("b.ff.net.2", "permuted128 alpha=none"),
        linear("c.ff.net.0.proj", "hadamard128 alpha=none", rows=512),  # GEGLU
        linear("c.ff.net.2", "permuted256 alpha=0.5"),
        linear("s.0.proj_mlp", "hadamard128 alpha=none", rows=128),
        linear("s.0.proj_out", "permuted128 alpha=0.5"),
        linear("s.1.proj_mlp", "hadamard128 alpha=none", rows=128),
        linear("s.1.proj_out", "permuted-part128 alpha=0.5"),
        linear("m.w1", "hadamard128 alpha=none", rows=256),
        linear("m.w3", "hadamard128 alpha=none", "m.w1", rows=256),
        linear("m.w2", "permuted128 alpha=0.5"),
        linear("d.net.0.proj", "hadamard128 alpha=none", rows=384),  # does not fit
        linear("d.net.2", "permuted128 alpha=0.5"),
        linear("e.net.2", "permuted128 alpha=0.5"),  # its maker stays dense
    )
    assert made.foldable == {
        "b.ff.net.2": ("b.ff.net.0.proj",),
        "c.ff.net.2": ("c.ff.net.0.proj",),
        "s.1.proj_out": ("s.1.proj_mlp",),
        "m.w2": ("m.w1", "m.w3"),
    }
    gathered = ("b.attn.to_q", "b.attn.to_out.0", "s.0.proj_out", "d.net.2", "e.net.2")
    assert made.gathered == gathered
    table = made.table()
    assert "m.w2 by m.w1 and m.w3" in table and "s.1.proj_out by s.1.proj_mlp" in table
    assert f"({MOVES_HEADS}): s.0.proj_out" in table
    assert f"({OF_STREAM}): b.attn.to_q" in table
    assert f"({OF_ATTENTION}): b.attn.to_out.0" in table
    assert made.to_dict()["foldable"] == list(made.foldable)


def test_nothing_is_said_where_nothing_is_gathered():
    table = report(linear("q", "hadamard128 alpha=0.5")).table()
    assert "gather" not in table

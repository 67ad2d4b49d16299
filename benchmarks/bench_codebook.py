"""How well codebooks fit trained weights, layer by layer, at no fewer bits than the twin-log one.

    python -m benchmarks.bench_codebook demo normal-3072 model.safetensors --json fit.json
    python -m benchmarks.bench_codebook model.safetensors --shared-tables 0 16

A model is a testbed of benchmarks.testbeds, a safetensors file, of which every matrix with at least
128 columns counts but embeddings, or normal-K: a random matrix of K columns, which is what rotated
weights come near to. Codebooks as stored, groups with scales of 16 bits:

    twin-log    this package's: 2^b levels of 8 bits and a scale of 32 a row; with shared tables a
                scale of 32 and a byte a row, and the tables
    symmetric   uniform codes, each group clipped at its least squared error
    asymmetric  the same with a zero point of b bits
    nf          quantiles of the normal distribution times the absmax of a group (NF4)
    lloyd-max   the best table for a normal distribution, each group scaled to least squared error

Groups are the largest that cost no fewer bits than twin-log beside its codes: at 4 bits 256 of a
row of 3072 columns, 32 of one of 384, 128 of one of 384 with shared tables. The kernels of this
package take a scale for each row alone: a scale within a row would have to be applied inside the
integer sum. Weights are fitted as they are and rotated (signs and the largest Hadamard block). SQNR
in dB over the whole matrix; of all, and of uniform and nf: layers that twin-log fits best, and its
least lead over the latter three.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.baselines.method import FLOAT_BITS
from benchmarks.baselines.weights import NormalFloat, Uniform
from benchmarks.rows import Row, write_json
from benchmarks.testbeds import load_testbed
from lrq_kernels.codebook import TwinLogCodebook
from lrq_kernels.rotation import Rotation
from lrq_quant.recipe import QuantRecipe
from lrq_quant.rotation_search import largest_block
from lrq_quant.shared_tables import fit_shared_tables, tables_of_rows
from lrq_quant.twin_log import fit_twin_log, sqnr_db

CODEBOOKS = ("twin-log", "symmetric", "asymmetric", "nf", "lloyd-max")
RIVALS = ("symmetric", "asymmetric", "nf")
LEAST_COLUMNS = 128


def weights(model: str) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 [N, K]) of the trained linears of `model`."""
    if columns := re.fullmatch(r"normal-(\d+)", model):
        yield model, torch.randn(128, int(columns[1]), generator=torch.Generator().manual_seed(0))
        return
    if not model.endswith(".safetensors"):
        transformer = load_testbed(model, "cpu").pipeline.transformer
        for linear in QuantRecipe().resolve(transformer).linears:
            yield linear.name, transformer.get_submodule(linear.name).weight.detach().float()
        return
    for name, tensor in sorted(load_file(model).items()):
        if tensor.dim() == 2 and tensor.is_floating_point() and "embedding" not in name:
            if tensor.shape[1] >= LEAST_COLUMNS:
                yield name.removesuffix(".weight"), tensor.float()


def row_bits(codebook: TwinLogCodebook) -> float:
    """What a row takes beside its codes as stored: levels and scale, or, of shared tables, a scale,
    the table's name and a part of the tables."""
    stored = (codebook.levels, codebook.scale, codebook.table_of_row)
    total = sum(8 * t.numel() * t.element_size() for t in stored if t is not None)
    return total / codebook.scale.numel()


def group_of(columns: int, group_bits: int, least: float) -> int:
    """The largest group that divides K and costs, at group_bits each, at least so much a row."""
    divisors = (size for size in range(1, columns + 1) if columns % size == 0)
    return max(size for size in divisors if group_bits * columns >= least * size)


def fits(weight: Tensor, bits: int, tables: int = 0) -> dict[str, float]:
    """SQNR in dB of each codebook, and the tables and real bits of the twin-log one; tables: that
    its rows share at most, 0 for their own."""
    columns = weight.shape[1]
    if tables:
        codebook = fit_shared_tables(weight, bits, tables)
    else:
        codebook = fit_twin_log(weight, bits)
    least = row_bits(codebook)
    values = {"twin-log": codebook.decode(codebook.encode(weight))}
    for name, symmetric in (("symmetric", True), ("asymmetric", False)):
        group = group_of(columns, FLOAT_BITS + (0 if symmetric else bits), least)
        uniform = Uniform(symmetric=symmetric, clip="mse", group=group)
        values[name] = uniform(weight, bits, None).values
    group = group_of(columns, FLOAT_BITS, least)
    values["nf"] = NormalFloat(group)(weight, bits, None).values
    values["lloyd-max"] = scaled_table(weight, lloyd_max_levels(bits), group)
    shared = codebook.levels.shape[0] if tables else 0
    spent = {"tables": shared, "real_bits": bits + least / columns}
    return spent | {name: sqnr_db(weight, values[name]) for name in CODEBOOKS}


@functools.cache
def lloyd_max_levels(bits: int) -> Tensor:
    """Ascending fp32 [2^b]: each is the mean of the normal distribution between its boundaries."""
    normal = torch.distributions.Normal(0.0, 1.0)
    ends = torch.tensor([-torch.inf, torch.inf], dtype=torch.float64)
    levels = normal.icdf((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    for _ in range(2000):
        edges = torch.cat([ends[:1], (levels[1:] + levels[:-1]) / 2, ends[1:]])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        levels = -density.diff() / normal.cdf(edges).diff()
    return levels.float()


def scaled_table(weight: Tensor, levels: Tensor, group: int) -> Tensor:
    """The nearest levels times a scale for each group: the best of 33 multiples of its RMS, made
    better by least squares, with the 11 bits of fp16."""
    parts = weight.unflatten(1, (-1, group))
    rms = parts.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    boundaries = (levels[1:] + levels[:-1]) / 2

    def coded(scale: Tensor) -> Tensor:
        return levels[torch.searchsorted(boundaries, (parts / scale).contiguous())]

    best = torch.full_like(rms, torch.inf)
    values = torch.zeros_like(parts)
    for factor in torch.linspace(0.6, 1.6, 33).tolist():
        codes = coded(rms * factor)
        power = codes.square().sum(-1, keepdim=True)
        scale = (parts * codes).sum(-1, keepdim=True) / power.clamp_min(1e-30)
        scale = (scale / rms).half().float() * rms  # as 16 bits store it
        candidate = coded(scale.clamp_min(1e-12)) * scale
        error = (candidate - parts).square().sum(-1, keepdim=True)
        values = torch.where(error < best, candidate, values)
        best = torch.minimum(best, error)
    return values.flatten(1)


def rotated(weight: Tensor) -> Tensor:
    """By signs and the largest Hadamard block that divides K."""
    columns = weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    return Rotation.hadamard(columns, largest_block(columns), generator=generator).apply(weight)


def measure(model: str, widths: Sequence[int], tables: Sequence[int] = (0,)) -> list[Row]:
    """A row for each linear, width, number of shared tables at most (0: rows' own), and weight as
    it is or rotated."""
    rows: list[Row] = []
    for name, weight in weights(model):
        for kind in ("as trained", "rotated"):
            if kind == "rotated" and not largest_block(weight.shape[1]):
                continue
            fitted = weight if kind == "as trained" else rotated(weight)
            n, k = weight.shape
            facts = {"model": Path(model).name, "linear": name, "weight": kind, "n": n, "k": k}
            for bits, most in itertools.product(widths, tables):
                shared = tables_of_rows(n, most) if most else 0
                key = {"bits": bits, "most_tables": most}
                rows.append({**facts, **key, **fits(fitted, bits, shared)})
    if not rows:
        raise ValueError(f"bench_codebook: {model} has no matrix of {LEAST_COLUMNS} columns")
    return rows


def table(rows: Sequence[Row]) -> str:
    """Medians by model, weight, width and tables, and where twin-log is not the best: of all, and
    of uniform codes and NF4."""
    lines = [
        f"{'model':22}{'weight':12}{'bits':>5}{'tables':>7}{'real':>7}"
        + "".join(f"{name:>12}" for name in CODEBOOKS)
        + f"{'of all':>12}{'of uniform, nf':>16}{'least lead':>12}"
    ]
    for key in dict.fromkeys(map(_kind, rows)):
        group = [r for r in rows if _kind(r) == key]
        leads = [r["twin-log"] - max(r[name] for name in RIVALS) for r in group]
        best = sum(r["twin-log"] >= max(r[name] for name in CODEBOOKS) for r in group)
        wins = (f"{count} of {len(group)}" for count in (best, sum(lead > 0 for lead in leads)))
        medians = [statistics.median(r[name] for r in group) for name in CODEBOOKS]
        real = statistics.median(r["real_bits"] for r in group)
        lines.append(
            f"{key[0]:22}{key[1]:12}{key[2]:>5}{key[3] or 'own':>7}{real:>7.2f}"
            + "".join(f"{value:>12.2f}" for value in medians)
            + "{:>12}{:>16}".format(*wins)
            + f"{min(leads):>+12.2f}"
        )
    return "\n".join(lines)


def _kind(row: Row) -> tuple[str, str, int, int]:
    return row["model"], row["weight"], row["bits"], row["most_tables"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="testbeds, safetensors files, normal-K")
    parser.add_argument("--bits", nargs="+", type=int, choices=(2, 3, 4), default=[4, 3, 2])
    parser.add_argument(
        "--shared-tables",
        nargs="+",
        type=int,
        default=[0],
        metavar="T",
        help="tables that rows share, at most, as the recipe has it; 0 for a table each row",
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args(argv)
    rows: list[Row] = []
    for model in arguments.models:
        rows += measure(model, arguments.bits, arguments.shared_tables)
        if arguments.json:
            write_json(rows, arguments.json)
    print(table(rows))


if __name__ == "__main__":
    main()

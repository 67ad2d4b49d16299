"""Rows of benchmarks.quality as a table, a verdict at equal bits, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import Row

BF16 = "bf16"
# Real bits a weight that two recipes may differ by and still be compared at equal bits.
EQUAL_BITS = 0.1


def row_line(row: Row) -> str:
    return (
        f"{row['testbed']:<13} {row['setting']:<5} {row['recipe']:<22} "
        f"{row['psnr_db']:6.2f} dB  redrawn {row['redrawn']:6.2%}  ssim {row['ssim']:.4f}  "
        f"feat {row['feature_distance']:.4f}  "
        f"frechet {row['frechet_distance']:7.3f}  right {row['prompt_accuracy']:7.2%}  "
        f"{row['weight_bits']:6.3f} bits"
    )


def is_tie(row: Row, other: Row, figure: str = "psnr_db") -> bool:
    """Whether the figure differs by no more than the seeds do; never with a single seed."""

    def spread(r: Row) -> float:
        return float(max(r[f"{figure}_by_seed"]) - min(r[f"{figure}_by_seed"]))

    if min(len(r[f"{figure}_by_seed"]) for r in (row, other)) < 2:
        return False
    return abs(row[figure] - other[figure]) <= max(spread(row), spread(other))


def at_equal_bits(rows: Sequence[Row], recipe: str, peers: Sequence[str]) -> str:
    """How `recipe` stands to each of `peers` whose real bits are within EQUAL_BITS of its own, on
    every testbed and in every setting: a line for each figure in which it is behind, and a sum."""
    pairs = [
        (own, peer)
        for own in rows
        for peer in rows
        if own["recipe"] == recipe
        and peer["recipe"] in peers
        and all(own[key] == peer[key] for key in ("testbed", "setting"))
        and abs(own["weight_bits"] - peer["weight_bits"]) <= EQUAL_BITS
    ]
    lines, lost = [], 0
    for own, peer in pairs:
        for figure in ("psnr_db", "prompt_accuracy"):
            if own[figure] < peer[figure]:
                tie = is_tie(own, peer, figure)
                lost += not tie
                lines.append(
                    f"{own['testbed']:<17} {own['setting']:<5} {peer['recipe']:<22} {figure} "
                    f"{own[figure]:.4f} to {peer[figure]:.4f}, {'a tie' if tie else 'behind'}"
                )
    lines.append(
        f"{recipe} at equal bits: {len(pairs)} comparisons, behind in {len(lines) - lost} figures "
        f"by no more than seeds differ and in {lost} by more"
    )
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    """Rows by testbed and setting, the best PSNR first, each beside this package's default."""
    lines = []
    keys = dict.fromkeys((row["testbed"], row["setting"]) for row in rows)
    for testbed, setting in keys:
        group = [r for r in rows if (r["testbed"], r["setting"]) == (testbed, setting)]
        ours = next((r for r in group if r["recipe"] == "lrq"), None)
        for row in sorted(group, key=lambda r: -r["psnr_db"]):
            note = ""
            if ours is not None and row is not ours:
                note = f"  {row['psnr_db'] - ours['psnr_db']:+.2f} dB to lrq"
                note += ", a tie" if is_tie(row, ours) else ""
            lines.append(row_line(row) + f"  coverage {row['coverage']:.2%}{note}")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """PSNR against real bits a weight: a row of panels a testbed, a column an activation width."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print(f"no plot: matplotlib is not installed; --from-json draws {path} elsewhere")
        return
    rows = [row for row in rows if row["recipe"] != BF16]
    testbeds = list(dict.fromkeys(row["testbed"] for row in rows))
    widths = sorted({row["act_bits"] for row in rows}, reverse=True)
    names = list(dict.fromkeys(row["recipe"] for row in rows))
    figure, axes = pyplot.subplots(
        len(testbeds), len(widths), figsize=(5.5 * len(widths), 4.0 * len(testbeds)),
        squeeze=False, sharex=True, sharey=True,
    )  # fmt: skip
    panels = [(testbed, act_bits) for testbed in testbeds for act_bits in widths]
    for axis, (testbed, act_bits) in zip(axes.flat, panels, strict=True):
        for index, name in enumerate(names):
            own = [r for r in rows if (r["testbed"], r["act_bits"]) == (testbed, act_bits)]
            points = sorted((r["weight_bits"], r["psnr_db"]) for r in own if r["recipe"] == name)
            if points:
                style = {"color": "black", "linewidth": 2.5} if name == "lrq" else {}
                style.setdefault("color", pyplot.get_cmap("tab20")(index % 20))
                axis.plot(*zip(*points, strict=True), marker="o", label=name, **style)
        axis.set_title(f"{testbed}, A{act_bits}")
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("bits a weight, all counted")
    for axis in axes[:, 0]:
        axis.set_ylabel("PSNR to bf16, dB")
    # Of all panels: a recipe may have rows in one alone.
    lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    axes[0][-1].legend(lines.values(), lines.keys(), fontsize=7, **place)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)

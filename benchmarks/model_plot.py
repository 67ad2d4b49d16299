"""Bars of time and memory for each variant that benchmarks.bench_model ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrq_quant.profiling import draw_families


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds of a forward, by family of kernels where every row has those, beside weights and
    peak in GB. A word where matplotlib lacks, or where no variant ran."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        print(f"no plot {path}: matplotlib is not installed")
        return
    rows = [row for row in rows if "ms" in row]
    if not rows:
        print(f"no plot {path}: no variant ran")
        return
    size = (11.0, 1.5 + 0.4 * len(rows))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=size, sharey=True)
    places = range(len(rows))
    colours = ["tab:blue" if row["lrq"] else "0.6" for row in rows]
    lengths, label = [row["ms"] for row in rows], "ms of one forward"
    if all("families" in row for row in rows):
        draw_families(left, [row["families"] for row in rows])
        left.legend(fontsize="x-small", ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
        lengths = [row["recorded_ms"] for row in rows]
        label += "; bars: of one that was recorded"
    else:
        left.barh(places, lengths, color=colours)
    right.barh(places, [row["peak_gb"] or 0.0 for row in rows], color="0.88")
    right.barh(places, [row["weights_gb"] for row in rows], color=colours, height=0.5)
    for place, row in zip(places, rows, strict=True):
        left.annotate(f" {row['ms']:.1f}", (lengths[place], place), va="center", fontsize="small")
        words = {"va": "center", "fontsize": "small"}
        right.annotate(f" {row['weights_gb']:.2f}", (row["weights_gb"], place), **words)
    left.set_yticks(places, [row["variant"] for row in rows])
    left.invert_yaxis()
    left.set(xlabel=label, xlim=(0, 1.12 * max(lengths)))
    right.set(xlabel="GB on the GPU: weights; wide and light, the peak of a forward")
    first = rows[0]
    figure.suptitle(
        f"{first['model']}, {first['size']} x {first['size']}, batch {first['batch']}, "
        f"{first['gpu']}, torch {first['torch']}, {first['date']}",
        fontsize="medium",
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)

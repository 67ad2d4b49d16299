"""Where the time of a forward goes: kernels by family, gaps between them, what lrq's reach.

profile_forward(model, inputs) runs and records; the Profile that it gives prints itself.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from .kernel_families import (
    FAMILIES,
    LAUNCH_GAPS,
    OTHER,
    OTHER_GEMM,
    OUR_A16,
    OUR_A16_AND_OTHER,
    OUR_GEMM,
    counted_work,
    family_of_kernel,
    is_dequantize,
)
from .machine_limits import Limits
from .model_memory import memory_by_kind
from .op_work import Work

WARMUP_S = 1.0
UNKNOWN = Limits()
# How many kernels a report names, the slowest first.
NAMED_KERNELS = 40
_GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")


class Event(NamedTuple):
    """A kernel on the GPU, or an operator on the CPU; microseconds."""

    name: str
    start: float
    duration: float


@dataclass
class Kernel:
    name: str
    family: str
    ms: float
    launches: float


@dataclass
class Family:
    """Of one forward. share: of wall_ms."""

    name: str
    ms: float
    share: float
    launches: float


@dataclass
class Reached:
    """What the kernels of one kind of counted work reach; shares are of the limits, None where
    those or the work are not known."""

    kind: str
    ms: float
    launches: float
    tops: float | None = None
    tops_share: float | None = None
    tbps: float | None = None
    tbps_share: float | None = None


@dataclass
class Profile:
    """forward_ms: median of a forward that was not recorded; wall_ms and busy_ms: of one that was,
    on the GPU from the first kernel to the last, and that part of it in which a kernel ran. On a
    CPU operators stand for kernels, and gaps are what is outside of those of a family."""

    facts: dict[str, Any]
    device: str
    forward_ms: float
    wall_ms: float
    busy_ms: float
    families: list[Family]
    reached: list[Reached]
    kernels: list[Kernel]
    memory_gb: dict[str, float] = field(default_factory=dict)
    limits: Limits = UNKNOWN

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "limits": self.limits._asdict()}

    def table(self) -> str:
        times = "GPU times" if self.device.startswith("cuda") else "CPU times, there is no GPU here"
        lines = [", ".join(f"{key} {value}" for key, value in self.facts.items())]
        lines.append(
            f"{self.forward_ms:.2f} ms a forward; recorded {self.wall_ms:.2f}, busy "
            f"{self.busy_ms:.2f} ({times})"
        )
        lines.append(f"{'family':24}{'ms':>10}{'share':>9}{'launches':>10}")
        lines += [f"{f.name:24}{f.ms:10.3f}{f.share:9.1%}{f.launches:10.0f}" for f in self.families]
        if self.reached:
            lines.append(f"{'reached by':24}{'ms':>10}{'launches':>10}{'TOPS':>14}{'TB/s':>14}")
        for reached in self.reached:
            tops = _with_share(reached.tops, reached.tops_share, 0)
            tbps = _with_share(reached.tbps, reached.tbps_share, 2)
            lines.append(
                f"{reached.kind:24}{reached.ms:10.3f}{reached.launches:10.0f}{tops:>14}{tbps:>14}"
            )
        if any(limit is not None for limit in self.limits):
            copy, tops_8, tops_16 = (0.0 if limit is None else limit for limit in self.limits)
            lines.append(
                f"limits (0: not known): copy {copy / 1e3:.2f} TB/s, {tops_8:.0f} TOPS of 8 bits, "
                f"{tops_16:.0f} of bf16"
            )
        lines.append("GB: " + ", ".join(f"{kind} {gb:.3f}" for kind, gb in self.memory_gb.items()))
        return "\n".join(lines)


def _with_share(value: float | None, share: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if share is None else f" ({share:.0%})")


# ---- from events to a table ---------------------------------------------------------------------


def busy_us(events: Iterable[Event]) -> float:
    """Length of the union of the events' times: kernels of two streams overlap."""
    total, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start):
        stop = event.start + event.duration
        if stop > end:
            total += stop - max(end, event.start)
            end = stop
    return total


def kernels_of(events: Iterable[Event], forwards: int) -> list[Kernel]:
    """By name, per forward, the slowest first."""
    us: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    for event in events:
        us[event.name] += event.duration
        launches[event.name] += 1
    kernels = [
        Kernel(name, family_of_kernel(name), us[name] / forwards / 1e3, launches[name] / forwards)
        for name in us
    ]
    return sorted(kernels, key=lambda kernel: -kernel.ms)


def families_of(kernels: Iterable[Kernel], wall_ms: float, gaps_ms: float) -> list[Family]:
    """Every family that occurs, then the gaps."""
    ms: dict[str, float] = defaultdict(float)
    launches: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        ms[kernel.family] += kernel.ms
        launches[kernel.family] += kernel.launches
    rows = [(name, ms[name], launches[name]) for name in FAMILIES if name in ms]
    rows.append((LAUNCH_GAPS, gaps_ms, 0.0))
    return [Family(name, ms_, ms_ / wall_ms, count) for name, ms_, count in rows]


def reached_of(
    kernels: Iterable[Kernel], work: Mapping[str, Work], limits: Limits
) -> list[Reached]:
    """For each kind of counted work, of the kernels that do it."""
    kernels = list(kernels)
    merged: dict[str | None, str] = {}
    if any(is_dequantize(kernel.name) for kernel in kernels):
        merged = {OUR_A16: OUR_A16_AND_OTHER, OTHER_GEMM: OUR_A16_AND_OTHER}
        work = _summed(work, merged)
    found: dict[str, Reached] = {}
    for kernel in kernels:
        kind = counted_work(kernel.name)
        kind = merged.get(kind, kind)
        if kind is not None:
            reached = found.setdefault(kind, Reached(kind, 0.0, 0.0))
            reached.ms += kernel.ms
            reached.launches += kernel.launches
    for kind, reached in found.items():
        if kind not in work or reached.ms == 0:
            continue
        if work[kind].bytes:
            reached.tbps = work[kind].bytes / reached.ms / 1e9
            reached.tbps_share = _share(reached.tbps * 1e3, limits.copy_gbps)
        if work[kind].operations:
            reached.tops = work[kind].operations / reached.ms / 1e9
            limit = limits.tops_8 if kind == OUR_GEMM else limits.tops_16
            reached.tops_share = _share(reached.tops, limit)
    return list(found.values())


def _summed(work: Mapping[str, Work], names: Mapping[str | None, str]) -> dict[str, Work]:
    """Of kinds with one name there: their sum, its bytes 0 where those of a part are not known."""
    result: dict[str, Work] = {}
    for kind, part in work.items():
        name = names.get(kind, kind)
        whole = result.get(name)
        if whole is not None:
            known = part.bytes and whole.bytes
            part = Work(
                part.calls + whole.calls,
                part.operations + whole.operations,
                part.bytes + whole.bytes if known else 0,
            )
        result[name] = part
    return result


def _share(value: float, limit: float | None) -> float | None:
    return None if limit is None else value / limit


# ---- recording ----------------------------------------------------------------------------------


@dataclass
class Recording:
    """Of one of the forwards that were recorded; wall_ms and busy_ms as Profile has them."""

    kernels: list[Kernel]
    wall_ms: float
    busy_ms: float

    @property
    def families(self) -> list[Family]:
        return families_of(self.kernels, self.wall_ms, self.wall_ms - self.busy_ms)


def record_forwards(
    model: nn.Module, inputs: dict[str, Any], steps: int = 5, *, trace: Path | None = None
) -> Recording:
    """Record `steps` forwards of a model that has run before, on the device of the inputs. trace:
    write a Chrome trace of one more, operators and kernels, to this file.

    Raises RuntimeError where the profiler saw nothing.
    """
    on_gpu = _on_gpu(inputs)

    def run() -> None:
        _forwards(model, inputs, steps)

    if on_gpu:
        events = _record_gpu(run)
        wall = max(e.start + e.duration for e in events) - min(e.start for e in events)
    else:
        events, wall = _record_cpu(run)
    if trace is not None:
        _write_trace(lambda: _forwards(model, inputs, 1), trace, on_gpu)
    return Recording(kernels_of(events, steps), wall / steps / 1e3, busy_us(events) / steps / 1e3)


def _on_gpu(inputs: dict[str, Any]) -> bool:
    device = next(x.device for x in tree_leaves(inputs) if isinstance(x, torch.Tensor))
    return device.type == "cuda"


@torch.no_grad()
def _forwards(model: nn.Module, inputs: dict[str, Any], count: int) -> None:
    for _ in range(count):
        model(**inputs, return_dict=False)
    if _on_gpu(inputs):
        torch.cuda.synchronize()


def profile_forward(
    model: nn.Module,
    inputs: dict[str, Any],
    *,
    steps: int = 5,
    work: Mapping[str, Work] | None = None,
    limits: Limits = UNKNOWN,
    trace: Path | None = None,
    facts: dict[str, Any] | None = None,
) -> Profile:
    """Run `model` on `inputs` for a second, time `steps` forwards, record as many, on the device
    of the inputs. work: what one forward asks of its ops (op_work.count_work). trace: as of
    record_forwards.

    Raises ValueError for steps below 1, and RuntimeError where the profiler saw nothing.
    """
    if steps < 1:
        raise ValueError(f"steps must be positive, got {steps}")
    device = next(x.device for x in tree_leaves(inputs) if isinstance(x, torch.Tensor))
    on_gpu = _on_gpu(inputs)

    def forwards(count: int) -> None:
        _forwards(model, inputs, count)

    _warm_up(forwards)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    forward_ms = _median_ms(forwards, steps)
    memory = {kind: size / 1e9 for kind, size in memory_by_kind(model).items()}
    if on_gpu:
        memory["activations, peak"] = torch.cuda.max_memory_allocated() / 1e9 - sum(memory.values())
    recording = record_forwards(model, inputs, steps, trace=trace)
    return Profile(
        facts=facts or {},
        device=str(device),
        forward_ms=forward_ms,
        wall_ms=recording.wall_ms,
        busy_ms=recording.busy_ms,
        families=recording.families,
        reached=reached_of(recording.kernels, work or {}, limits),
        kernels=recording.kernels[:NAMED_KERNELS],
        memory_gb=memory,
        limits=limits,
    )


def _warm_up(forwards: Callable[[int], None]) -> None:
    start = time.perf_counter()
    forwards(2)
    while time.perf_counter() - start < WARMUP_S:
        forwards(1)


def _median_ms(forwards: Callable[[int], None], steps: int) -> float:
    """Of batches of two, so that the second is issued while the first runs."""
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        forwards(2)
        times.append((time.perf_counter() - start) / 2)
    return 1e3 * statistics.median(times)


def _record_gpu(run: Callable[[], None]) -> list[Event]:
    """Kernels, copies and fills. Operators are not recorded: that would slow their launches."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(file))
        events = gpu_events(json.loads(file.read_text())["traceEvents"])
    if not events:
        raise RuntimeError("profile: the profiler recorded no kernel; is another one active?")
    return events


def gpu_events(trace_events: Iterable[Mapping[str, Any]]) -> list[Event]:
    """What ran on the GPU, of the events of a Chrome trace, in order of time.

    A kernel that may start before the one that it follows has ended (programmatic dependent
    launch) waits for it on the multiprocessors: its time counts from there, so that the times of a
    stream add up to those in which it was busy."""
    found = [
        (float(event["ts"]), float(event["dur"]), event["name"], _stream(event))
        for event in trace_events
        if event.get("ph") == "X" and event.get("cat") in _GPU_CATEGORIES
    ]
    events: list[Event] = []
    ends: dict[Any, float] = {}
    for start, duration, name, stream in sorted(found, key=lambda event: event[0]):
        stop = start + duration
        begin = max(start, ends.get(stream, start))
        events.append(Event(name, begin, max(0.0, stop - begin)))
        ends[stream] = max(stop, ends.get(stream, stop))
    return events


def _stream(event: Mapping[str, Any]) -> tuple[Any, Any]:
    arguments = event.get("args", {})
    return arguments.get("device"), arguments.get("stream")


def _record_cpu(run: Callable[[], None]) -> tuple[list[Event], float]:
    """The outermost operators that are of a family (what they call is theirs), and the microseconds
    of the whole."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        start = time.perf_counter()
        run()
        wall = 1e6 * (time.perf_counter() - start)
    events = [
        Event(event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in recorded.events()
        if family_of_kernel(event.name) != OTHER and not _is_within_a_family(event)
    ]
    return events, wall


def _is_within_a_family(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if family_of_kernel(parent.name) != OTHER:
            return True
        parent = parent.cpu_parent
    return False


def _write_trace(run: Callable[[], None], file: Path, on_gpu: bool) -> None:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        run()
    recorded.export_chrome_trace(str(file))


# ---- picture ------------------------------------------------------------------------------------


def plot(profiles: list[Profile], file: Path) -> None:
    """A stacked bar of families for each profile. A word where matplotlib lacks."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        print(f"no plot {file}: matplotlib is not installed")
        return
    figure, axes = pyplot.subplots(figsize=(10.0, 1.9 + 0.5 * len(profiles)))
    draw_families(axes, [{f.name: f.ms for f in profile.families} for profile in profiles])
    labels = [f"{p.facts.get('model', '')} {p.facts.get('mode', '')}" for p in profiles]
    axes.set_yticks(range(len(profiles)), labels)
    axes.invert_yaxis()
    axes.set(xlabel=f"ms of one forward, {profiles[0].facts.get('machine', '')}")
    axes.legend(fontsize="small", ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def draw_families(axes: Any, bars: Sequence[Mapping[str, float]]) -> None:
    """Stacked bars along the y axis of a matplotlib Axes: of each, ms by family."""
    left = [0.0] * len(bars)
    for index, name in enumerate((*FAMILIES, LAUNCH_GAPS)):
        widths = [bar.get(name, 0.0) for bar in bars]
        if any(widths):
            colour = "0.85" if name == LAUNCH_GAPS else f"C{index}"
            axes.barh(range(len(bars)), widths, left=left, color=colour, label=name)
            left = [at + width for at, width in zip(left, widths, strict=True)]

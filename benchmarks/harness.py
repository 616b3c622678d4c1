"""Time candidates side by side, count their bytes, keep every row.

A benchmark is a question with a peer and a ceiling: all candidates of a case run interleaved in one
process, the medians are compared, and the copy bandwidth of the same run stands beside. On a GPU
times are CUDA events with a cold L2 cache, elsewhere the wall clock.
"""

from __future__ import annotations

import csv
import datetime
import gc
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

_FLUSH_BYTES = 256 << 20  # more than the L2 cache of any GPU meant here


@dataclass(frozen=True)
class Row:
    """One figure of one candidate in one case, as the CSV holds it."""

    bench: str
    impl: str
    mode: str
    metric: str
    unit: str
    x_name: str
    x: float
    p50: float
    p20: float
    p80: float
    config: str
    machine: str
    versions: str
    commit: str
    date: str


class Recorder:
    """Collects the rows of a run."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._commit = _output("git", "rev-parse", "--short", "HEAD")
        self._date = datetime.date.today().isoformat()

    def add(
        self,
        bench: str,
        impl: str,
        mode: str,
        *,
        metric: str,
        unit: str,
        x: tuple[str, float],
        values: Sequence[float],
        config: str = "",
    ) -> None:
        """Add a figure measured once or several times."""
        p20, p50, p80 = (float(f"{p:.6g}") for p in np.percentile(values, [20, 50, 80]))
        self.rows.append(
            Row(
                bench,
                impl,
                mode,
                metric,
                unit,
                x[0],
                x[1],
                p50,
                p20,
                p80,
                config,
                machine(),
                versions(),
                self._commit,
                self._date,
            )  # fmt: skip
        )

    def write(self, path: str | Path) -> None:
        """Append the rows to a CSV, with a header if it is new."""
        path = Path(path)
        is_new = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            if is_new:
                writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)


def device() -> torch.device:
    """Where benchmarks run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    """The machine in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads, {platform.machine()}"


def versions() -> str:
    """What the figures depend on."""
    import transformers
    import triton

    return f"torch {torch.__version__}, triton {triton.__version__}, transformers {transformers.__version__}"


def time_ms(
    candidates: dict[str, Callable[[], Any]], *, rounds: int = 20, warmup: int = 3
) -> dict[str, list[float]]:
    """Milliseconds of every round of every candidate, candidates taking turns."""
    for run in candidates.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    clock = timer()
    for _ in range(rounds):
        for name, run in candidates.items():
            times[name].append(clock(run))
    return times


def measure(
    recorder: Recorder,
    bench: str,
    mode: str,
    candidates: dict[str, Callable[[], Any]],
    *,
    x: tuple[str, float],
    config: str,
    rate: tuple[str, str, float],
    rounds: int,
) -> dict[str, float]:
    """Time the candidates of a case in turn, keep what is found, print it; their median milliseconds.

    `rate` is (metric, unit, amount): the amount of work over the seconds taken stands beside the times,
    in the unit's billions (GB/s) or trillions (TFLOP/s).
    """
    metric, unit, amount = rate
    scale = {"GB/s": 1e6, "TFLOP/s": 1e9}[unit]  # of milliseconds
    medians = {}
    for name, values in time_ms(candidates, rounds=rounds, warmup=min(3, rounds)).items():
        medians[name] = sorted(values)[len(values) // 2]
        figures = {("time", "ms"): values, (metric, unit): [amount / ms / scale for ms in values]}
        for probed, of, probe in (("memory", "MiB", peak_extra_mib), ("syncs", "1", host_syncs)):
            value = probe(candidates[name])
            if value is not None:
                figures[probed, of] = [value]
        for (metric_name, of), found in figures.items():
            recorder.add(
                bench, name, mode, metric=metric_name, unit=of, values=found, x=x, config=config
            )
    line = ", ".join(
        f"{name} {ms:.3f} ms {amount / ms / scale:.3g} {unit}" for name, ms in medians.items()
    )
    print(f"\n{mode} {config}: {line}")
    return medians


def compare(benchmark: Any, medians: dict[str, float], ours: str, **extra: Any) -> None:
    """What pytest-benchmark's table says beside our time: how many times as long the others take."""
    ratios = {f"{name} x": round(median / medians[ours], 2) for name, median in medians.items()}
    benchmark.extra_info.update(ratios, **extra)


def timer() -> Callable[[Callable[[], Any]], float]:
    """Milliseconds of one call: CUDA events after the L2 cache is flushed, or the wall clock."""
    return _cuda_timer() if torch.cuda.is_available() else _wall_ms


def _wall_ms(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _cuda_timer() -> Callable[[Callable[[], Any]], float]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def time_one(run: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return time_one


def peak_extra_mib(run: Callable[[], Any]) -> float | None:
    """Device memory a call needs beyond what was there, its results included; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_mib(run: Callable[[], Any]) -> float | None:
    """Device memory at its highest during a call, all that is there included; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    extra = peak_extra_mib(run)
    assert extra is not None
    return torch.cuda.max_memory_allocated() / 2**20


def kernel_launches(run: Callable[[], Any]) -> int | None:
    """Kernels and copies a call puts on the device; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in prof.events())


def host_syncs(run: Callable[[], Any]) -> int | None:
    """How often a call makes the host wait for the device; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def copy_gb_per_s(rounds: int = 20) -> list[float]:
    """Bandwidth of a large copy, read and write counted: the ceiling of whatever moves bytes."""
    size = (1 << 30) if torch.cuda.is_available() else (64 << 20)
    source = torch.empty(size, dtype=torch.int8, device=device())
    target = torch.empty_like(source)
    times = time_ms({"copy": lambda: target.copy_(source)}, rounds=rounds)["copy"]
    return [2 * size / ms / 1e6 for ms in times]


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

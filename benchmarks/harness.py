"""Times candidates side by side and records all measurements.

A benchmark answers a question with a peer and a ceiling. All candidates of a case run interleaved in one process
and their medians are compared; the ceiling, the best rate in the same run, is recorded as another row. Times are
from CUDA events with a cold L2 cache on a GPU, else from the wall clock.
"""

from __future__ import annotations

import csv
import datetime
import gc
import itertools
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

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHARED = ROOT.parent / "shared" / "data"  # real rows, if they exist
CEILING = "ceiling"  # `impl` in the rows of a ceiling
_FLUSH_BYTES = 256 << 20  # more than any GPU's L2 cache


@dataclass(frozen=True)
class Row:
    """One measurement of one candidate in one case: a row of the CSV."""

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
    test: str  # the test that interleaved the candidates
    machine: str
    versions: str
    commit: str
    date: str


class Recorder:
    """Collects the rows of a run, by `test`; `commit` is recorded if there is no .git."""

    def __init__(self, commit: str = "") -> None:
        self.rows: list[Row] = []
        self.test = ""
        git = ("git", "describe", "--always", "--dirty", "--exclude=*")
        self._commit = (_output(*git) if (ROOT / ".git").exists() else "") or commit or "unknown"
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
        """Add a value measured once or several times."""
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
                self.test,
                machine(),
                versions(),
                self._commit,
                self._date,
            )  # fmt: skip
        )

    def write(self, path: str | Path) -> None:
        """Write the rows to a CSV, replacing its older rows of the same benchmarks."""
        path = Path(path)
        again = {row.bench for row in self.rows}
        kept = [row for row in read_rows(path) if row.bench not in again] if path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in kept + self.rows)


def read_rows(path: str | Path) -> list[Row]:
    """Read the rows of a CSV."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    numbers = ("x", "p50", "p20", "p80")
    return [Row(**{**row, **{name: float(row[name]) for name in numbers}}) for row in rows]


def device() -> torch.device:
    """The device for benchmarks."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    """A description of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}, {platform.machine()}"


def kind_of(machine: str) -> str:
    """A machine's folder in `results`: cpu, or the name of its GPU."""
    return "cpu" if machine.startswith("CPU") else machine.lower().replace(" ", "-")


def versions() -> str:
    """The versions that measurements depend on."""
    import transformers
    import triton

    return f"torch {torch.__version__}, triton {triton.__version__}, transformers {transformers.__version__}"


def time_ms(
    candidates: dict[str, Callable[[], Any]],
    *,
    rounds: int = 20,
    warmup: int = 3,
    on_host: bool = False,
) -> dict[str, list[float]]:
    """Milliseconds of each round of each candidate, interleaved; `on_host`: by the wall clock even if there is a
    GPU, for host work."""
    for run in candidates.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    clock = _wall_ms if on_host else timer()
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
    rounds: int,
    warmup: int = 3,
    config: str = "",
    per: tuple[str, int] = ("ms", 1),
    rate: tuple[str, str, float] | None = None,
    ceiling: float | None = None,
    on_host: bool = False,
) -> dict[str, float]:
    """Time the candidates of a case, interleaved; record and print the results; return the median times.

    `per` is (unit, number): a call processes that many items, and the time per item is recorded, in ms or us.
    `rate` is (metric, unit, amount): the amount of work per second is also recorded, in the unit's billions (GB/s)
    or trillions (TFLOP/s), and so is the ceiling, which is in that unit.
    """
    unit, number = per
    factor = {"ms": 1, "us": 1000}[unit] / number
    common = {"x": x, "config": config}
    medians, told = {}, []
    times = time_ms(candidates, rounds=rounds, warmup=min(warmup, rounds), on_host=on_host)
    for name, taken in times.items():
        figures = {("time", unit): [factor * ms for ms in taken]}
        medians[name] = sorted(figures["time", unit])[len(taken) // 2]
        told.append(f"{name} {medians[name]:.4g} {unit}")
        if rate is not None:
            metric, of, amount = rate
            rates = [amount / ms / {"GB/s": 1e6, "TFLOP/s": 1e9}[of] for ms in taken]
            figures[metric, of] = rates
            told[-1] += f", {sorted(rates)[len(rates) // 2]:.3g} {of}"
        if not on_host:
            for probed, of, probe in (
                ("memory", "MiB", peak_extra_mib),
                ("syncs", "1", host_syncs),
            ):
                value = probe(candidates[name])
                if value is not None:
                    figures[probed, of] = [value]
        for (metric, of), found in figures.items():
            recorder.add(bench, name, mode, metric=metric, unit=of, values=found, **common)
    if ceiling is not None:
        assert rate is not None
        recorder.add(
            bench, CEILING, mode, metric=rate[0], unit=rate[1], values=[ceiling], **common
        )  # fmt: skip
    print(f"\n{bench} {mode} {config}: " + "; ".join(told))
    return medians


def compare(benchmark: Any, medians: dict[str, float], ours: str, **extra: Any) -> None:
    """Add the others' times relative to ours to pytest-benchmark's table."""
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
    """Additional device memory of a call at its peak, including its results; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_tensor_mib(run: Callable[[], Any]) -> float:
    """Like `peak_mib`, but on a CPU from torch's allocations and frees."""
    on_device = peak_extra_mib(run)
    if on_device is not None:
        return on_device
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    found = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(found, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(sizes, initial=0)) / 2**20


def peak_mib(run: Callable[[], Any]) -> float | None:
    """Peak device memory during a call, including everything allocated before; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    extra = peak_extra_mib(run)
    assert extra is not None
    return torch.cuda.max_memory_allocated() / 2**20


def kernel_launches(run: Callable[[], Any]) -> int | None:
    """Number of kernels and copies that a call launches; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in prof.events())


def host_syncs(run: Callable[[], Any]) -> int | None:
    """Number of host synchronizations with the device in a call; None without a GPU."""
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


def gemm_tflops() -> float:
    """Best rate of a large square product, the ceiling of matrix products; bf16 on a GPU, else float32."""
    size, dtype = (8192, torch.bfloat16) if torch.cuda.is_available() else (512, torch.float32)
    left, right = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))
    return 2 * size**3 / _best_ms(lambda: left @ right) / 1e9


def copy_gb_per_s() -> float:
    """Best bandwidth of a large copy, counting reads and writes: the ceiling of memory-bound ops."""
    size = (1 << 30) if torch.cuda.is_available() else (64 << 20)
    source = torch.empty(size, dtype=torch.int8, device=device())
    target = torch.empty_like(source)
    return 2 * size / _best_ms(lambda: target.copy_(source)) / 1e6


def _best_ms(run: Callable[[], Any]) -> float:
    """The fastest of many rounds, because other load can only slow a machine down."""
    return min(time_ms({"": run}, rounds=50)[""])


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()

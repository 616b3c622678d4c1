"""What was measured on this machine's GPU, in the user's cache folder; `mmpack tune` measures.

One file per combination of GPU, driver, torch, Triton, flash-attn packages and the source of `mmpack/ops`, because
each of them can change which implementation is right or fast. Files are replaced as a whole. A file that is torn,
or that was measured with something else, is ignored with a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mmpack.store.records import check, from_record, read_json, schema_of
from mmpack.trials import LIMIT, Outcome, fastest, run_trials

CAPACITY = 8192  # tokens of a pack, by default
_PACKAGES = ("triton", "flash-attn", "flash-attn-3", "flash-attn-4")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShapeClass:
    """What one implementation is chosen for: an op, a dtype, and sizes of a model, as in
    `varlen_attention bfloat16 H=12 Hk=2 K=128 causal=1`."""

    op: str
    dtype: str
    sizes: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        return " ".join([self.op, self.dtype, *(f"{name}={size}" for name, size in self.sizes)])

    @staticmethod
    def parse(text: str) -> ShapeClass:
        """The inverse of `str`."""
        op, dtype, *sizes = text.split()
        pairs = (size.split("=") for size in sizes)
        return ShapeClass(op, dtype, tuple((name, int(size)) for name, size in pairs))


@dataclass(frozen=True)
class Measured:
    """The result for one shape class.

    Attributes:
        default: what is used without a measurement.
        seconds: a forward and backward of each implementation that is right.
        refused: why each other one is not.
        tokens: the size of the packs.
        on: the day, ISO 8601.
    """

    default: str
    seconds: dict[str, float]
    refused: dict[str, str]
    tokens: int
    on: str

    @property
    def choice(self) -> str:
        """The implementation that was fastest here, if by enough (`mmpack.trials.MARGIN`)."""
        return fastest(self.seconds, self.default)


Table = dict[str, Measured]  # by the shape class as text
_SCHEMA = {"machine": {str: str}, "classes": {str: schema_of(Measured)}}


def machine() -> dict[str, str]:
    """What results depend on, of the current CUDA device.

    Raises:
        ValueError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "torch finds none" if built else f"torch {torch.__version__} is built for the CPU"
        raise ValueError(f"kernels are measured on a CUDA device, and {why}")
    facts = {
        "GPU": torch.cuda.get_device_name(),
        "driver": _driver(),
        "torch": torch.__version__,
        "mmpack/ops": _hash_of_ops(),
    }
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "none"
    return facts


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown"
    found = re.search(r"\d+\.\d+[.\d]*", text)
    return found[0] if found else "unknown"


def _hash_of_ops() -> str:
    digest, folder = hashlib.sha256(), Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()} ".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def cache_folder() -> Path:
    """The user's folder for results."""
    from platformdirs import user_cache_path

    return user_cache_path("mmpack") / "tuned"


def cache_file(facts: Mapping[str, str]) -> Path:
    """The file of a machine."""
    name = re.sub(r"\W+", "-", facts["GPU"]).strip("-")
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / f"{name}.{digest}.json"


def read_table(facts: Mapping[str, str]) -> Table:
    """What was measured on a machine; empty if nothing was. Files that cannot be used are ignored with a warning:
    the machine's own if it is damaged, else the newest of the same GPU with other versions."""
    path = cache_file(facts)
    others = path.parent.glob(f"{path.name.partition('.')[0]}.*.json")
    paths = [path] if path.exists() else sorted(others, key=_age)[:1]
    for path in paths:
        try:
            record = read_json(path)
            check(record, _SCHEMA, "")
        except (OSError, ValueError) as error:
            why = f"it is damaged ({error})"
        else:
            changed = [
                f"{name} {record['machine'].get(name, 'none')}, this is {fact}"
                for name, fact in facts.items()
                if record["machine"].get(name) != fact
            ]
            if not changed:
                classes = record["classes"].items()
                return {name: from_record(Measured, one) for name, one in classes}
            why = f"it was measured with {'; '.join(changed)}"
        _log.warning("ignored %s: %s; `mmpack tune` measures again", path, why)
    return {}


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except OSError:
        return 0.0


def write_table(facts: Mapping[str, str], table: Table) -> Path:
    """Replace a machine's file; returns its path.

    Raises:
        OSError: it cannot be written.
    """
    path = cache_file(facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": dict(facts), "classes": {name: asdict(one) for name, one in table.items()}}
    number, new = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        os.unlink(new)
        raise
    return path


def tune(
    classes: Iterable[ShapeClass],
    capacity: int = CAPACITY,
    *,
    make: Any = None,
    limit: float = LIMIT,
) -> Iterator[tuple[ShapeClass, Measured | str]]:
    """Find out, on the current CUDA device, which implementations are right and how fast each is, and keep the
    results in the user's cache folder after each shape class.

    Every implementation runs in a child process, forward and backward, on segments of 1, 127, 130, 64 and 3 rows;
    its error must be within that of a library (`mmpack.ops.op_trials`). Those that are right are timed on a pack
    of `capacity` tokens, rounded up to a power of two.

    Args:
        classes: what to measure; `mmpack.hf.op_choice.shape_classes` lists what a model needs.
        capacity: tokens of a pack.
        make: for tests, makes the trial of "TOKENS SHAPE_CLASS" in the child.
        limit: seconds for one implementation, with compilation.

    Yields:
        (shape class, its result, or why it has none).

    Raises:
        ValueError: there is no CUDA device, or the child process cannot import torch.
        OSError: the cache folder cannot be written.
    """
    if make is None:
        from mmpack.ops.trial_cases import make_trial

        make = make_trial
    facts, tokens = machine(), 1 << max(0, capacity - 1).bit_length()
    jobs = {f"{tokens} {shape}": shape for shape in classes}
    for job, outcome in run_trials(make, list(jobs), limit=limit):
        shape = jobs[job]
        if outcome.failed:
            yield shape, outcome.failed
            continue
        found = _measured(outcome, tokens)
        write_table(facts, {**_read_quietly(facts), str(shape): found})
        yield shape, found


def _measured(outcome: Outcome, tokens: int) -> Measured:
    today = date.today().isoformat()
    return Measured(outcome.default, outcome.seconds, outcome.refused, tokens, today)


def _read_quietly(facts: Mapping[str, str]) -> Table:
    return read_table(facts) if cache_file(facts).exists() else {}


def agreed(tables: Sequence[Table]) -> Table:
    """What all ranks measured: per shape class, the implementations that are right on every rank, each with its
    worst time. Classes that a rank has not measured, or where defaults differ, are left out."""
    first, *others = tables
    found: Table = {}
    for name, one in first.items():
        every = [one, *(table[name] for table in others if name in table)]
        if len(every) < len(tables) or len({each.default for each in every}) > 1:
            continue
        common = set.intersection(*(set(each.seconds) for each in every))
        worst = {impl: max(each.seconds[impl] for each in every) for impl in sorted(common)}
        found[name] = Measured(one.default, worst, {}, one.tokens, one.on)
    return found

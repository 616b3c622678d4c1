"""`mmpack tune`: which implementation of each op is right and fastest on this GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from mmpack.cli.options import TuneOptions
from mmpack.cli.tables import aligned
from mmpack.cli.terminal import one_line, say


def run_tune(configs: Iterable[Any], options: TuneOptions) -> int:
    """Measure what models with these configs need, print it, and keep it in the user's cache folder; returns the
    exit code, 1 if something could not be measured.

    Raises:
        ValueError: there is no CUDA device, a model's family is not supported, or the capacity is not positive.
    """
    if options.capacity < 1:
        raise ValueError(f"--capacity must be positive, got {options.capacity}")
    if (size := options.context_size) < 1:
        raise ValueError(f"--context-size must be positive, got {size}")
    tuning, op_choice = import_module("mmpack.ops.tuning"), import_module("mmpack.hf.op_choice")
    facts = tuning.machine()
    dtype = getattr(import_module("torch"), options.dtype)
    check_heads = import_module("mmpack.hf.context_parallel").check_heads
    classes: dict[Any, None] = {}
    for config in configs:
        classes |= dict.fromkeys(op_choice.shape_classes(config, dtype, size))
        check_heads(config, size)
    print(f"measuring {len(classes)} shape classes on {facts['GPU']}", file=sys.stderr)
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for shape, measured in tuning.tune(classes, options.capacity):
        if isinstance(measured, str):
            failed[str(shape)] = measured
            print(f"{shape}: {one_line(measured)}", file=sys.stderr)
        else:
            found[str(shape)] = as_dict(measured)
            print(f"{shape}: {measured.choice}", file=sys.stderr)
    path = str(tuning.cache_file(facts))
    if options.json:
        print(json.dumps({"machine": facts, "file": path, "classes": found, "failed": failed}))
    else:
        say("\n".join([*tuned_table(found), "", f"kept in {path}"]))
    return 1 if failed else 0


def as_dict(measured: Any) -> dict[str, Any]:
    """A result for JSON."""
    return {
        "choice": measured.choice,
        "default": measured.default,
        "milliseconds": {name: 1000 * each for name, each in measured.seconds.items()},
        "refused": measured.refused,
        "tokens": measured.tokens,
        "on": measured.on,
    }


def tuned_table(classes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Results as lines: per shape class the choice, times, and why others were refused."""
    rows = [("measured by mmpack tune", "choice", "forward and backward, ms")]
    for name, one in classes.items():
        times = [f"{impl} {ms:.3g}" for impl, ms in one["milliseconds"].items()]
        times += [f"{impl}: {one_line(why)}" for impl, why in one["refused"].items()]
        rows.append((name, one["choice"], ", ".join(times)))
    return aligned(rows, left=(0, 1, 2))

"""Planners of other packages, each as (tokens, capacity) -> bins of sample numbers, loaded from their packages.

A package whose dependencies conflict with mmpack's can be put on the path without them (`pip install --no-deps
--target FOLDER trl llamafactory axolotl binpacking numba llvmlite`): only the file with the planner is loaded,
with stand-ins for its logging and reductions.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np

Planner = Callable[[np.ndarray, int], list[list[int]]]

WINDOW = 1000  # rows per call of the planner in LLaMA-Factory and ms-swift, by default


def planners_of(package: str) -> dict[str, Planner]:
    """A package's planners, by package name, version and mode.

    Raises:
        ImportError, OSError: the package is not installed, or its planner is in another file.
    """
    make = {
        "trl": _trl,
        "llamafactory": _llamafactory,
        "axolotl": _axolotl,
        "binpacking": _binpacking,
    }[package]
    return {f"{package} {version(package)} {how}": plan for how, plan in make().items()}


def _file(package: str, path: str) -> ModuleType:
    """Import a module from its file, without its parent packages."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"no package {package}")
    file = Path(spec.submodule_search_locations[0]) / path
    spec = importlib.util.spec_from_file_location(f"_{package}_planner", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _trl() -> dict[str, Planner]:
    import pyarrow as pa

    pack_bfd = _file("trl", "data_utils.py")._pack_bfd

    def plan(tokens: np.ndarray, capacity: int) -> list[list[int]]:
        # One byte per token: it plans by the length of a list, and moves the tokens, too.
        offsets = np.concatenate([[0], tokens.cumsum()])
        values = pa.array(np.zeros(offsets[-1], dtype=np.int8))
        rows = pa.LargeListArray.from_arrays(offsets, values)
        packed = pack_bfd(pa.table({"input_ids": rows}), capacity)
        lengths = packed["seq_lengths"].combine_chunks()
        order = _samples_of_lengths(tokens, lengths.flatten().to_numpy())
        return [bin.tolist() for bin in np.split(order, lengths.offsets.to_numpy()[1:-1])]

    return {"bfd": plan}


def _llamafactory() -> dict[str, Planner]:
    greedy_knapsack = _file("llamafactory", "data/processor/processor_utils.py").greedy_knapsack

    def plan(tokens: np.ndarray, capacity: int) -> list[list[int]]:
        bins = greedy_knapsack(tokens.tolist(), capacity)
        order = _samples_of_lengths(tokens, np.concatenate([np.array(b) for b in bins]))
        ends = np.cumsum([len(b) for b in bins])
        return [bin.tolist() for bin in np.split(order, ends[:-1])]

    return {
        "greedy_knapsack": plan,
        f"greedy_knapsack by {WINDOW}": _windowed(plan),
    }


def _axolotl() -> dict[str, Planner]:
    stand_ins = {
        "axolotl.utils": {},
        "axolotl.utils.distributed": {"reduce_and_broadcast": None},
        "axolotl.utils.logging": {"get_logger": logging.getLogger},
    }
    before = {name: sys.modules.get(name) for name in stand_ins}
    try:
        for name, attributes in stand_ins.items():
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(attributes)
        pack_parallel = _file("axolotl", "utils/samplers/multipack.py").pack_parallel
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
    pack_parallel(np.array([1, 2]), 4, 100_000, 200, num_processes=1)  # numba compiles here

    def plan(tokens: np.ndarray, capacity: int) -> list[list[int]]:
        # Its defaults: groups of 100,000 rows, at most 200 rows per bin.
        return pack_parallel(tokens, capacity, 100_000, 200, num_processes=1)

    return {"multipack": plan}


def _binpacking() -> dict[str, Planner]:
    from binpacking import to_constant_volume

    def plan(tokens: np.ndarray, capacity: int) -> list[list[int]]:
        pairs = list(enumerate(tokens.tolist()))
        bins = to_constant_volume(pairs, capacity, weight_pos=1)
        return [[number for number, _ in bin] for bin in bins if bin]

    return {f"to_constant_volume by {WINDOW}": _windowed(plan)}


def _windowed(plan: Planner) -> Planner:
    def by_window(tokens: np.ndarray, capacity: int) -> list[list[int]]:
        bins = []
        for start in range(0, len(tokens), WINDOW):
            for bin in plan(tokens[start : start + WINDOW], capacity):
                bins.append([start + number for number in bin])
        return bins

    return by_window


def _samples_of_lengths(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Assign sample numbers to bins of lengths, each once, for planners that return lengths."""
    of_length = defaultdict(list)
    for number, length in enumerate(tokens.tolist()):
        of_length[length].append(number)
    return np.array([of_length[length].pop() for length in lengths.tolist()], dtype=np.int64)

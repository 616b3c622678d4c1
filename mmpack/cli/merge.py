"""`mmpack merge`: the parts of a data set, encoded on several machines -> the store one would have made.

Part i of n has every n-th chunk of rows from the i-th on, so that long files and long rows fall on all
parts alike and nobody need count rows first. Taking a chunk from each part in turn gives the very
file that one process writes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmpack.cli.pack import PLANNING, build, parse_shard, report_packs, write_plan
from mmpack.regular_files import open_regular
from mmpack.store.atomic_folder import turn
from mmpack.store.build import different
from mmpack.store.encoded_store import EncodedStore, open_store, write_batches
from mmpack.store.records import damaged

_OF_A_PART = ("part", "chunks", "begun")


def run_merge(options: argparse.Namespace, config_of: Callable[[dict[str, Any]], Any]) -> None:
    """Join, plan as the parts were told to, write and report. `config_of` gives the config of the
    model to count costs with, from their settings."""
    start = time.perf_counter()
    out = Path(options.out)
    parts = _in_order([Path(path) for path in options.parts])
    about = {name: value for name, value in parts[0].about.items() if name not in _OF_A_PART}
    about["begun"] = min(part.about["begun"] for part in parts)
    config = config_of(about)
    with turn(out):
        is_store = (out / "mmpack.json").exists()
        is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
        if not (is_free or (is_store and options.overwrite)):
            raise ValueError(f"{out} is not empty; choose another OUT, or --overwrite a packed set")
        with build(out, is_store) as partial:
            store = write_batches(partial, _joined(parts), parts[0].vision, about)
            lines = b"".join(_joined_bad_rows(parts))
            if lines:
                (partial / "bad_rows.jsonl").write_bytes(lines)
            write_plan(partial, store, argparse.Namespace(**about), config)
    report_packs(out, options, False, start)


def _in_order(folders: Sequence[Path]) -> list[EncodedStore]:
    """The parts opened, from the first to the last.

    Raises:
        ValueError: one is no part, is damaged or was made otherwise than the first; or some are
            missing, or there twice.
    """
    found: dict[int, EncodedStore] = {}
    first = None
    for folder in folders:
        part = open_store(folder)
        if "part" not in part.about:
            raise ValueError(f"{folder} is a whole store, not a part that mmpack pack --shard made")
        if lacking := [
            name for name in (*_OF_A_PART, *PLANNING, "made from") if name not in part.about
        ]:
            raise damaged(folder / "mmpack.json", f"it lacks {' and '.join(lacking[:4])}")
        number, of = parse_shard(part.about["part"])
        if first is None:
            first, num_parts = part, of
        names = different(first.about["made from"], part.about["made from"])
        names += [name for name in PLANNING if part.about[name] != first.about[name]]
        if of != num_parts:
            names.append(f"the number of parts, {of} and {num_parts},")
        if names:
            raise ValueError(
                f"{folder} and {first.folder} do not belong together: {' and '.join(names[:4])} differ; "
                "pack the parts of one data set with the same options"
            )
        if number in found:
            raise ValueError(
                f"part {number} of {of} is there twice, {found[number].folder} and {folder}"
            )
        found[number] = part
    missing = [number for number in range(1, num_parts + 1) if number not in found]
    if missing:
        listed = " and ".join(map(str, missing[:8])) + (" and more" if missing[8:] else "")
        raise ValueError(
            f"{len(missing)} of {num_parts} parts are missing: {listed}; "
            f"mmpack pack --shard {missing[0]}/{num_parts} makes one"
        )
    parts = [found[number] for number in sorted(found)]
    for number, part in enumerate(parts):
        chunks, num_chunks = part.about["chunks"], sum(len(one.about["chunks"]) for one in parts)
        if len(chunks) != len(range(number, num_chunks, num_parts)) or (
            sum(has_samples for has_samples, _ in chunks) != part.num_batches
        ):
            raise damaged(part.folder / "mmpack.json", "its chunks are not those of its samples")
    return parts


def _joined(parts: Sequence[EncodedStore]) -> Iterator[bytes]:
    """The batches of all parts, a chunk of each in turn."""
    for store in parts:
        store.verify()
    batches = [store.batches() for store in parts]
    for part, (has_samples, _) in _chunks(parts):
        if has_samples:
            yield next(batches[part])


def _joined_bad_rows(parts: Sequence[EncodedStore]) -> Iterator[bytes]:
    lines = []
    for store in parts:
        path = store.folder / "bad_rows.jsonl"
        content: list[bytes] = []
        if path.exists():
            with open_regular(path) as file:
                content = file.readlines()
        if len(content) != (written := sum(num_bad for _, num_bad in store.about["chunks"])):
            raise damaged(path, f"it has {len(content):,} lines, {written:,} were written")
        lines.append(iter(content))
    for part, (_, num_bad) in _chunks(parts):
        for _ in range(num_bad):
            yield next(lines[part])


def _chunks(parts: Sequence[EncodedStore]) -> Iterator[tuple[int, tuple[int, int]]]:
    """(part, from 0; whether it has samples and how many bad rows) of every chunk of the data."""
    for place in range(sum(len(part.about["chunks"]) for part in parts)):
        part, row = place % len(parts), place // len(parts)
        yield part, parts[part].about["chunks"][row]

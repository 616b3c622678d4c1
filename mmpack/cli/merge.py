"""`mmpack merge`: parts of a data set, encoded on several machines -> the store that one machine would write.

Part i of n holds every n-th chunk of rows, starting with the i-th, so that all parts get a similar amount of work
and rows need not be counted first. Taking one chunk from each part in turn gives the file that one process would
write. Bad rows are counted in the same order, against `--max-bad` for all parts together.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmpack.cli.options import MergeOptions
from mmpack.cli.pack import build, write_plan
from mmpack.cli.pack_report import report_packs
from mmpack.errors import BadRow, Skip
from mmpack.regular_files import open_regular
from mmpack.store.arrow_schema import Batch
from mmpack.store.atomic_folder import turn
from mmpack.store.build import different
from mmpack.store.encoded_store import EncodedStore, open_store, write_batches
from mmpack.store.manifest import Part, Planning
from mmpack.store.records import damaged


def run_merge(options: MergeOptions, config_of: Callable[[Planning], Any]) -> None:
    """Join the parts, plan with their options, write and report. `config_of` returns the model's config for
    costs."""
    start = time.perf_counter()
    out = Path(options.out)
    parts = _in_order([Path(path) for path in options.parts])
    begun = min(part.about.begun for part in parts)
    about = replace(parts[0].about, part=None, begun=begun)
    assert about.planning is not None
    config = config_of(about.planning)
    max_bad = options.max_bad
    if max_bad is not None and about.made_from["on_error"] == repr("raise"):
        raise ValueError(
            "--max-bad does not apply: the parts have no bad rows, because mmpack pack stopped at the first; "
            "leave it out, or pack the parts with --on-error skip"
        )
    if max_bad is None:
        max_bad = min(_part(store).max_bad for store in parts)
    bad_rows = b"".join(_joined_bad_rows(parts, Skip(max_bad, [])))
    with turn(out):
        is_store = (out / "mmpack.json").exists()
        is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
        if not (is_free or (is_store and options.overwrite)):
            raise ValueError(f"{out} is not empty; choose another OUT, or --overwrite a packed set")
        with build(out, is_store) as partial:
            store = write_batches(partial, _joined(parts), parts[0].vision, about)
            if bad_rows:
                (partial / "bad_rows.jsonl").write_bytes(bad_rows)
            write_plan(partial, store, about.planning, config)
    report_packs(out, options, config, False, start)


def _in_order(folders: Sequence[Path]) -> list[EncodedStore]:
    """Open the parts and order them by number.

    Raises:
        ValueError: a folder is not a part, is damaged or was packed with other options than the first; or parts
            are missing or given twice.
    """
    found: dict[int, EncodedStore] = {}
    first = None
    for folder in folders:
        store = open_store(folder)
        if store.about.part is None:
            raise ValueError(
                f"{folder} is a whole store, not a part written by mmpack pack --shard"
            )
        if store.about.planning is None:
            raise damaged(folder / "mmpack.json", "it has no planning options")
        number, of = store.about.part.number, store.about.part.of
        if first is None:
            first, num_parts = store, of
        names = different(first.about.made_from, store.about.made_from)
        names += different(vars(first.about.planning), vars(store.about.planning))
        if first.about.limits != store.about.limits:
            names.append("num_samples or max_samples of a dataset_info.json")
        if of != num_parts:
            names.append(f"the number of parts, {of} and {num_parts},")
        if names:
            raise ValueError(
                f"{folder} and {first.folder} do not belong together: {' and '.join(names[:4])} "
                f"{'differs' if len(names) == 1 else 'differ'}; pack the parts of one data set with the same "
                f"options"
            )
        if number in found:
            raise ValueError(
                f"part {number} of {of} is given twice, {found[number].folder} and {folder}; leave one out"
            )
        found[number] = store
    missing = [number for number in range(1, num_parts + 1) if number not in found]
    if missing:
        listed = " and ".join(map(str, missing[:8])) + (" and more" if missing[8:] else "")
        raise ValueError(
            f"{len(missing)} of {num_parts} parts are missing: {listed}; "
            f"write them with mmpack pack --shard {missing[0]}/{num_parts}"
        )
    stores = [found[number] for number in sorted(found)]
    num_chunks = sum(len(_part(store).chunks) for store in stores)
    for number, store in enumerate(stores):
        chunks = _part(store).chunks
        if len(chunks) != len(range(number, num_chunks, num_parts)) or (
            sum(has_samples for *_, has_samples in chunks) != store.num_batches
        ):
            raise damaged(store.folder / "mmpack.json", "its chunks are not those of its samples")
    return stores


def _part(store: EncodedStore) -> Part:
    assert store.about.part is not None
    return store.about.part


def _joined(parts: Sequence[EncodedStore]) -> Iterator[Batch]:
    """The batches of all parts, one chunk from each in turn."""
    for store in parts:
        store.verify()
    batches = [store.batches() for store in parts]
    for part, _, _, has_samples in _chunks(parts):
        if has_samples:
            yield next(batches[part])


def _joined_bad_rows(parts: Sequence[EncodedStore], skip: Skip) -> Iterator[bytes]:
    """Lines of `bad_rows.jsonl`, counted as `mmpack pack` would have counted the rows.

    Raises:
        ValueError: too many rows of all parts are bad, or a part's list is damaged.
    """
    lines: list[Iterator[bytes]] = []
    for store in parts:
        path = store.folder / "bad_rows.jsonl"
        content: list[bytes] = []
        if path.exists():
            with open_regular(path) as file:
                content = file.readlines()
        if len(content) != (written := sum(num_bad for _, num_bad, _ in _part(store).chunks)):
            raise damaged(path, f"it has {len(content):,} lines, but {written:,} were written")
        lines.append(iter(content))
    for part, num_rows, num_bad, _ in _chunks(parts):
        skip.saw("merging", num_rows)
        for _ in range(num_bad):
            line = next(lines[part])
            skip.leave_out(_bad_row(line, parts[part].folder / "bad_rows.jsonl"))
            yield line


def _bad_row(line: bytes, path: Path) -> BadRow:
    try:
        saved = json.loads(line)
    except (ValueError, RecursionError):
        saved = None
    match saved:
        case {"source": str(source), "row": int(row), "error": str(error), "advice": str(advice)}:
            return BadRow(source, row, error, advice)
    raise damaged(path, f"{line!a:.60} is not a bad row")


def _chunks(parts: Sequence[EncodedStore]) -> Iterator[tuple[int, int, int, bool]]:
    """(part from 0, rows, bad rows, whether it has samples) for every chunk of the data."""
    for place in range(sum(len(_part(store).chunks) for store in parts)):
        part, row = place % len(parts), place // len(parts)
        yield (part, *_part(parts[part]).chunks[row])

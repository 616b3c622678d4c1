"""`mmpack pack`: data files -> a folder of encoded samples and their plan, built or reused.

An up-to-date store is reused without a lock; else one process builds (`mmpack.store.atomic_folder`). A process
that waited for a build that failed also fails: the rows are bad for it, too. If the builder was killed, the
next process builds.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmpack.cli.options import PackOptions
from mmpack.cli.pack_report import report_packs, report_part
from mmpack.data.encoder import Encoder
from mmpack.data.progress import row_progress
from mmpack.data.readers import RowGroup, limits_of, media_folders
from mmpack.data.row_keys import UnreadByFile
from mmpack.errors import BadRow, Skip, json_line
from mmpack.packing.held_out import SPLITS, held_out, part_of, within_limits
from mmpack.packing.plan_samples import plan_samples
from mmpack.packing.split_documents import image_capacity, split_samples
from mmpack.packing.stored_plan import open_samples
from mmpack.store.arrow_schema import Batch
from mmpack.store.atomic_folder import published, turn
from mmpack.store.build import different, index_rows, made_from, why_outdated
from mmpack.store.encoded_store import (
    EncodedStore,
    open_store,
    reuse_store,
    write_batches,
)
from mmpack.store.file_stamps import changed_files, stamps
from mmpack.store.manifest import About, Part, Planning
from mmpack.store.plan_file import save_plan
from mmpack.vision_spec import VisionSpec


def run_pack(options: PackOptions, encoder: Encoder, config: Any) -> None:
    """Encode, plan, write and report. `config` is the model's, for costs; None: packs are not balanced."""
    begun = time.time_ns()
    pack_groups(list(encoder.groups(options.data)), options, encoder, config, begun, {})


def pack_groups(
    groups: list[RowGroup],
    options: PackOptions,
    encoder: Encoder,
    config: Any,
    begun: int,
    chosen: dict[str, str],
) -> None:
    """Like `run_pack`, with groups that may be some rows of the files of `options.data`.

    Args:
        begun: `time.time_ns()` before the files were looked at.
        chosen: what says which rows they are, for the store's record of what it was made from.
    """
    start = time.perf_counter()
    out = Path(options.out)
    part = None
    if options.shard is not None:
        number, of = parse_shard(options.shard)
        part = Part(number=number, of=of, max_bad=options.max_bad)
    about = About(
        begun=begun,
        made_from=made_from(groups, encoder) | chosen,
        media_folders=tuple(media_folders(groups)),  # mmpack train opens no file outside of them
        tokenizer=_recorded(options.tokenizer),
        planning=options.planning,
        part=part,
        limits=limits_of(groups),
    )

    unread = UnreadByFile()
    found = _look(out, about, options.overwrite)
    if not found.is_done:
        with turn(out) as mine:
            if _mark(out) != found.mark:  # just built: its images need no second check
                found = _look(out, about, options.overwrite, look_at_images=False)
            elif mine.waited_for and not mine.was_killed:
                raise ValueError(
                    f"{mine.waited_for} ended without making {out}; its own message says why"
                )
            if not found.is_done:
                if found.why and not options.json:
                    print(f"encoding anew: {found.why}")
                with build(out, found.mark is not None) as partial:
                    if found.store is not None:
                        store = _reuse(partial, found.store, about)
                    else:
                        store = _encode(partial, groups, encoder, about, options, unread)
                    if part is None:
                        write_plan(partial, store, options.planning, config)
    reused = found.store is not None
    if part is None:
        report_packs(out, options, config, reused, start, unread)
    else:
        report_part(out, options, reused, start, unread)


def _recorded(tokenizer: str) -> str:
    """The tokenizer's name for the manifest, independent of the working directory."""
    return tokenizer if tokenizer.startswith("hf:") else os.path.abspath(tokenizer)


class _Found(NamedTuple):
    """The state of --out before anything is written."""

    store: EncodedStore | None  # None: its samples are not up to date
    is_done: bool  # samples and plan are up to date
    why: str  # why samples are not up to date
    mark: tuple[int, int] | None  # `_mark` of the store; None: there is none


def _look(out: Path, about: About, overwrite: bool, look_at_images: bool = True) -> _Found:
    """Compare what is at `out` with what would be built now.

    Raises:
        ValueError: there is something other than a store, or a store that differs, without `overwrite`.
    """
    mark = _mark(out)
    if mark is None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            torn = " (an unfinished store)" if (out / "samples.arrow").exists() else ""
            if not out.is_dir():
                raise ValueError(f"{out} is a file; choose another --out")
            if overwrite:
                raise ValueError(
                    f"{out} is not empty{torn}; choose another --out: only what mmpack pack wrote is overwritten"
                )
            raise ValueError(
                f"{out} is not empty{torn}; choose another --out, or --overwrite a packed set"
            )
        return _Found(None, False, "", None)
    store, planned = None, []
    try:
        store = open_store(out)
        names = why_outdated(store, about.made_from, look_at_images)
        names += ["part"] if str(about.part) != str(store.about.part) else []
        why = f"{' and '.join(names[:4])} changed since" if names else ""
        planned = different(_settings(store.about), _settings(about))
        if not why and overwrite and look_at_images:
            store.verify()
        if not why and not planned and about.part is None:
            open_samples(out, "warn", "train")
            if about.planning is not None and about.planning.val_size is not None:
                open_samples(out, "warn", "val")
    except ValueError as error:
        why = str(error)
    if not overwrite and (why or planned):
        reason = why or f"{' and '.join(planned[:4])} changed since"
        raise ValueError(f"{out} is not empty; choose another --out, or --overwrite it: {reason}")
    return _Found(None if why else store, not (why or planned), why, mark)


def _settings(about: About) -> dict[str, Any]:
    """The options that a store records and its samples do not depend on, and a Hub tokenizer's commit."""
    planning = {} if about.planning is None else dict(vars(about.planning))
    planning["num_samples or max_samples of a dataset_info.json"] = about.limits
    name = about.tokenizer or ""
    hub = {"the tokenizer's commit": name if name.startswith("hf:") else None}
    return planning | hub | ({} if about.part is None else {"max_bad": about.part.max_bad})


def _mark(out: Path) -> tuple[int, int] | None:
    """An identifier of the store at a path, which changes when it is replaced. None: there is no store."""
    try:
        stat = os.stat(out / "mmpack.json")
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


@contextmanager
def build(out: Path, replaces: bool) -> Iterator[Path]:
    """Like `published`, but reports disk errors as ValueError."""
    try:
        with published(out, replaces) as partial:
            yield partial
    except OSError as error:
        reason = error.strerror or str(error)
        what = f"{out} is unchanged" if replaces else "nothing was left behind"
        raise ValueError(f"cannot write {out}: {reason}; {what}") from None


def _reuse(partial: Path, old: EncodedStore, about: About) -> EncodedStore:
    """A store of the samples of `old`, planned anew."""
    if about.part is not None and old.about.part is not None:
        about.part.chunks.extend(old.about.part.chunks)
    about = replace(about, begun=old.about.begun, files=old.about.files)
    store = reuse_store(partial, old, about)
    if (old.folder / "bad_rows.jsonl").exists():
        shutil.copyfile(old.folder / "bad_rows.jsonl", partial / "bad_rows.jsonl")
    return store


def _encode(
    partial: Path,
    groups: list[RowGroup],
    encoder: Encoder,
    about: About,
    options: PackOptions,
    unread: UnreadByFile,
) -> EncodedStore:
    """Read and encode the rows, or one part of them, into a store."""
    bad_rows: list[BadRow] = []
    if encoder.on_error == "skip":
        encoder = replace(encoder, on_error=Skip(options.max_bad, bad_rows))
    files = [group.file.resolve() for group in groups if group.file is not None]
    about = replace(about, files=stamps(files))
    batches = _batches(groups, encoder, about.part, options, unread)
    may_be_empty = about.part is not None
    store = write_batches(partial, batches, encoder.vision, about, may_be_empty=may_be_empty)
    if changed := changed_files(store):
        raise ValueError(f"{changed[0]} changed while it was read; pack again")
    names = [field.name for field in fields(BadRow)]
    lines = [{name: getattr(row, name) for name in names} for row in bad_rows]
    _write_lines(partial / "bad_rows.jsonl", lines)
    return store


def write_plan(folder: Path, store: EncodedStore, planning: Planning, config: Any) -> None:
    """Plan a store's packs; write the plan and the list of rows longer than a pack."""
    samples, patch_capacity, on_overflow = cut_long(store, store.vision, planning)
    if samples is not store:
        samples.save(folder)
    used = within_limits(samples, store.about.limits)
    splits = {SPLITS["train"]: used}
    if planning.val_size is not None:
        is_val = held_out(samples, planning.val_size, used)
        splits = {SPLITS["train"]: used & ~is_val, SPLITS["val"]: is_val}
    plan = plan_samples(
        samples,
        planning.capacity,
        patch_capacity,
        on_overflow,
        planning.plan_seed,
        config,
        frozen=planning.frozen,
        group_images=planning.group_images,
        side=np.sum([n * own for n, own in enumerate(splits.values(), 1)], axis=0),
    )
    for name, own in splits.items():
        save_plan(plan if own.all() else part_of(plan, own), folder, name)
    overflow = []
    for fate, numbers in (("dropped", plan.dropped), ("cut", plan.truncated)):
        for sample in map(samples.__getitem__, numbers):
            line = {"source": sample.source, "row": sample.row, "tokens": sample.num_tokens}
            overflow.append({**line, "fate": fate})
    _write_lines(folder / "overflow.jsonl", overflow)


def parse_shard(text: str) -> tuple[int, int]:
    """Parse a --shard such as "2/8" into (2, 8).

    Raises:
        ValueError: it is malformed, or there is no such part.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    number, of = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= of:
        raise ValueError(f"--shard takes I/N, part I of N from 1/N to N/N, got {text}")
    return number, of


def cut_long(samples: Any, vision: VisionSpec, planning: Planning) -> tuple[Any, Any, Any]:
    """Split long documents if asked to; returns (samples, patch capacity, on_overflow) for planning."""
    patch_capacity = planning.patch_capacity
    if planning.max_image_share is not None:
        most = image_capacity(planning.max_image_share, planning.capacity, vision)
        patch_capacity = most if patch_capacity is None else min(most, patch_capacity)
    if planning.on_overflow != "split":
        return samples, patch_capacity, planning.on_overflow
    return split_samples(samples, planning.capacity, patch_capacity), patch_capacity, "error"


def _batches(
    groups: list[RowGroup],
    encoder: Encoder,
    part: Part | None,
    options: PackOptions,
    unread: UnreadByFile,
) -> Iterator[Batch]:
    """Yield a store's batches, show progress, and record the chunks of a part and fields that are not read."""
    number, of = (1, 1) if part is None else (part.number, part.of)
    with row_progress("encoding", groups, parts=of) as (groups, bar):
        for indexed in index_rows(
            groups, encoder, jobs=options.jobs, part=(number, of), ray=options.ray
        ):
            bar.update(indexed.num_rows)
            unread.add(indexed.source, indexed.unread)
            if part is not None:
                num_bad, has_samples = len(indexed.bad_rows), indexed.batch is not None
                part.chunks.append((indexed.num_rows, num_bad, has_samples))
            if indexed.batch is not None:
                yield indexed.batch


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        path.write_text("".join(json_line(row) for row in rows), encoding="utf-8")

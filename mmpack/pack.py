"""`mmpack pack`: data files -> a folder of encoded samples and their plan, made or used again."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmpack.dataset import costs_of, plan_samples
from mmpack.errors import BadRow, OnError
from mmpack.files import Row, count_rows
from mmpack.index import changes, index_rows, made_from
from mmpack.pictures import pack_picture
from mmpack.plan import padded_utilization
from mmpack.readers import RowGroup, row_groups
from mmpack.report import balance_lines, balance_report, json_line
from mmpack.split import image_capacity, split_samples
from mmpack.store import open_store, reuse_store, write_batches
from mmpack.types import EncodedSample
from mmpack.vision import VisionSpec

PLANNING = (
    "capacity",
    "patch_capacity",
    "max_image_share",
    "on_overflow",
    "plan_seed",
    "config",
    "frozen",
)


def run_pack(
    options: argparse.Namespace,
    reading: dict[str, Any],
    processor: tuple[Any, VisionSpec],
    config: Any,
) -> None:
    """Encode, plan, write and report. `reading` are the options of `read_samples`, `config` is the
    model's, for costs, or None."""
    start = time.perf_counter()
    out = Path(options.out)
    is_ours = (out / "mmpack.json").exists()
    if out.exists() and any(out.iterdir()) and not is_ours:
        raise ValueError(f"{out} is not empty; choose another --out, or --overwrite a packed set")

    bad_rows: list[BadRow] = []
    about: dict[str, Any] = {
        name: value
        for name, value in vars(options).items()
        if name not in ("command", "json", "quiet", "overwrite", "jobs", "out", "png")
    }
    if Path(options.tokenizer).is_dir():
        about["tokenizer"] = os.path.abspath(options.tokenizer)  # for mmpack inspect, anywhere
    about["begun"] = time.time_ns()
    groups = list(row_groups(options.data, reading.pop("mapping"), reading.pop("media_dir")))
    tokenizer, vision = processor
    encoding = {name: about[name] for name in ("train_on_prompt", "mask_history")}
    settings = {**reading, **encoding, "on_error": options.on_error}
    about["made from"] = made_from(groups, tokenizer, vision, **settings)
    old, why = _packed_before(out, about, options.overwrite) if is_ours else (None, "")
    if why and not options.json:
        print(f"encoding anew: {why}")

    partial = out.with_name(out.name + ".partial")  # what is at `out` is always whole
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if old is not None:
            store = reuse_store(partial, old, {**about, "begun": old.about["begun"]})
            if (out / "bad_rows.jsonl").exists():
                shutil.copyfile(out / "bad_rows.jsonl", partial / "bad_rows.jsonl")
        else:
            on_error: OnError = bad_rows if options.on_error == "skip" else "raise"
            ways = {"reading": reading, "encoding": encoding, "on_error": on_error}
            ways |= {"jobs": options.jobs, "quiet": options.quiet}
            batches = _batches(groups, tokenizer, vision, **ways)
            store = write_batches(partial, batches, vision, about)
            _write_lines(partial / "bad_rows.jsonl", [asdict(row) for row in bad_rows])
        samples, patch_capacity, on_overflow = cut_long(store, vision, options)
        if samples is not store:
            samples.save(partial / "pieces.npz")
        cost = None if config is None else costs_of(samples, config, options.frozen)
        plan = plan_samples(
            samples,
            options.capacity,
            patch_capacity,
            on_overflow,
            options.plan_seed,
            cost,
        )
        plan.save(partial / "plan.npz")
        lost = [(n, "dropped") for n in plan.dropped] + [(n, "cut") for n in plan.truncated]
        overflow = [_overflow_line(samples[number], fate) for number, fate in lost]
        num_bad = _count_lines(partial / "bad_rows.jsonl")
        _write_lines(partial / "overflow.jsonl", overflow)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    report = {
        "rows": len(store) + num_bad,
        "bad_rows": num_bad,
        "reused": old is not None,
        "dropped": plan.num_dropped,
        "truncated": plan.num_truncated,
        "packs": plan.num_packs,
        "tokens": int(plan.pack_tokens.sum()),
        "utilization": round(plan.utilization, 6),
        "padded_utilization": round(padded_utilization(store.num_tokens), 6),
        "max_pixels": vision.max_pixels,
        **balance_report(plan, samples.sources, samples.num_patches // vision.merge_size**2),
        "seconds": round(time.perf_counter() - start, 3),
    }
    if samples is not store:
        report |= {"split": samples.num_split, "pieces": len(samples)}
    if options.png is not None:
        image_tokens = samples.num_patches // vision.merge_size**2
        pack_picture(plan, samples.sources, image_tokens, options.png)
    if options.json:
        print(json.dumps(report))
        return
    if old is not None:
        print(f"nothing encoded anew: {out} was made from the same data, tokenizer and settings")
    print(
        f"{report['rows']:,} rows -> {plan.num_packs:,} packs of {plan.capacity:,} tokens, "
        f"{plan.utilization:.1%} full, in {report['seconds']:.1f} s; images up to "
        f"{vision.max_pixels:,} pixels"
    )
    print(f"padded batches of 8 would be {report['padded_utilization']:.0%} full")
    print("\n".join(balance_lines(report)))
    if report.get("split"):
        cut = report["pieces"] - len(store) + report["split"]
        print(f"{report['split']:,} documents longer than a pack are in {cut:,} pieces")
    if num_bad:
        print(f"{num_bad:,} bad rows left out, listed in {out / 'bad_rows.jsonl'}")
    if lost:
        print(
            f"{plan.num_dropped:,} long rows dropped and {plan.num_truncated:,} cut, listed in "
            f"{out / 'overflow.jsonl'}"
        )
    print(f"written to {out}")


def cut_long(samples: Any, vision: VisionSpec, options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(samples, long documents in pieces, patch capacity, on_overflow), as there is to plan."""
    patch_capacity = options.patch_capacity
    if options.max_image_share is not None:
        most = image_capacity(options.max_image_share, options.capacity, vision)
        patch_capacity = most if patch_capacity is None else min(most, patch_capacity)
    if options.on_overflow != "split":
        return samples, patch_capacity, options.on_overflow
    return split_samples(samples, options.capacity, patch_capacity), patch_capacity, "error"


def _packed_before(out: Path, about: dict[str, Any], overwrite: bool) -> tuple[Any, str]:
    """(the store at `out` if it is what would be made now, else None, and why it is not)"""
    try:
        store = open_store(out)
        names = changes(store, about["made from"])
        why = f"{' and '.join(names[:4])} changed since" if names else ""
        planned = [name for name in PLANNING if about[name] != store.about.get(name)]
    except ValueError as error:
        store, why, planned = None, str(error), []
    if not overwrite and (why or planned):
        reason = why or f"{' and '.join(planned[:4])} changed since"
        raise ValueError(f"{out} is not empty; choose another --out, or --overwrite it: {reason}")
    return (None if why else store), why


def _batches(
    groups: list[RowGroup], tokenizer: Any, vision: VisionSpec, quiet: bool, **options: Any
) -> Iterator[bytes]:
    """Batches for a store, a bar showing rows, rows a second and, where files know how many they
    have, how long it will take."""
    counts = [count_rows(group.file) if group.file is not None else None for group in groups]
    is_array = [group.file is not None and group.file.suffix == ".json" for group in groups]
    is_known = all(array or count is not None for array, count in zip(is_array, counts))
    total = sum(count or 0 for count in counts) if is_known else None
    with tqdm(total=total, unit=" rows", desc="encoding", disable=quiet or None) as bar:

        def counted(rows: Iterable[Row]) -> Iterator[Row]:
            """An array is read whole, so that is when its length is known."""
            rows = list(rows)
            if is_known:
                bar.total += len(rows)
            yield from rows

        groups = [
            group._replace(rows=counted(group.rows)) if array else group
            for group, array in zip(groups, is_array)
        ]
        for indexed in index_rows(groups, tokenizer, vision, **options):
            bar.update(indexed.num_rows)
            if indexed.batch is not None:
                yield indexed.batch


def _overflow_line(sample: EncodedSample, fate: str) -> dict[str, Any]:
    return {"source": sample.source, "row": sample.row, "tokens": sample.num_tokens, "fate": fate}


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        path.write_text("".join(json_line(row) for row in rows), encoding="utf-8")


def _count_lines(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)

"""The summaries that `mmpack pack` and `mmpack merge` print."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from mmpack.cli.options import PackOptions, PictureOptions
from mmpack.cli.plots import pack_picture
from mmpack.cli.tables import balance_lines, balance_report, fewer
from mmpack.cli.terminal import say
from mmpack.data.row_keys import UnreadByFile, unread_line
from mmpack.errors import counted
from mmpack.packing.dataset import PackedDataset
from mmpack.packing.held_out import SPLITS
from mmpack.packing.plan import padded_utilization
from mmpack.packing.sample_images import images_in, pack_costs, patches_in
from mmpack.packing.split_documents import SplitSamples
from mmpack.regular_files import open_regular
from mmpack.store.encoded_store import EncodedStore, open_store
from mmpack.store.plan_file import load_plan


def report_packs(
    out: Path,
    options: PictureOptions,
    config: Any,
    reused: bool,
    start: float,
    unread: UnreadByFile | None = None,
) -> None:
    """Print a summary of the packs at `out`, planned with the costs of `config` (None: without costs), and the
    fields that were not read while they were encoded."""
    dataset = PackedDataset.from_store(out, on_changed_data="warn")
    report = {**_summary(out, dataset, config), "reused": reused, "unread": unread or {}}
    report["seconds"] = round(time.perf_counter() - start, 3)
    if options.png is not None:
        samples: Any = dataset.samples
        image_tokens = samples.num_patches // dataset.vision.merge_size**2
        pack_picture(dataset.plan, samples.sources, image_tokens, options.png)
    if options.json:
        print(json.dumps(report))
    else:
        _tell(out, dataset, report)


def _store_of(dataset: PackedDataset) -> EncodedStore:
    samples = dataset.samples
    store = samples.samples if isinstance(samples, SplitSamples) else samples
    assert isinstance(store, EncodedStore)
    return store


def _summary(out: Path, dataset: PackedDataset, config: Any) -> dict[str, Any]:
    """What there is to say of the packs at `out`."""
    plan, samples, vision, store = dataset.plan, dataset.samples, dataset.vision, _store_of(dataset)
    assert isinstance(samples, EncodedStore | SplitSamples)
    num_bad = _count_lines(out / "bad_rows.jsonl")
    images, planning = images_in(plan, samples), store.about.planning
    assert planning is not None
    costs = None
    if config is not None:
        costs = pack_costs(plan, samples, config, frozen=planning.frozen, images=images)
    in_rows, in_packs = patches_in(plan, images)
    report = {
        "rows": len(store) + num_bad,
        "bad_rows": num_bad,
        "dropped": plan.num_dropped,
        "truncated": plan.num_truncated,
        "packs": plan.num_packs,
        "tokens": int(plan.pack_tokens.sum()),
        "utilization": round(plan.utilization, 6),
        "padded_utilization": round(padded_utilization(store.num_tokens), 6),
        "max_pixels": vision.max_pixels,
        "patches": {"rows": in_rows, "packs": in_packs},
        **balance_report(plan, samples.sources, samples.num_patches // vision.merge_size**2, costs),
    }
    num_unused = len(plan.unused)
    if (out / f"{SPLITS['val']}.json").exists():
        val = load_plan(out, SPLITS["val"])
        report |= {"val_samples": len(val.sample_index), "val_packs": val.num_packs}
        report["dropped"] += val.num_dropped
        report["truncated"] += val.num_truncated
        num_unused -= len(val.sample_index) + val.num_dropped
    if num_unused:
        report["unused"] = num_unused
    if isinstance(samples, SplitSamples):
        report |= {"split": samples.num_split, "pieces": len(samples)}
    return report


def _tell(out: Path, dataset: PackedDataset, report: dict[str, Any]) -> None:
    """Print a summary as text."""
    plan, planning = dataset.plan, _store_of(dataset).about.planning
    if report["reused"]:
        say(f"nothing encoded anew: {out} was made from the same data, tokenizer and settings")
    say(
        f"{counted(report['rows'], 'row')} -> {counted(plan.num_packs, 'pack')} of {plan.capacity:,} tokens, "
        f"{plan.utilization:.1%} full, in {report['seconds']:.1f} s; images up to "
        f"{report['max_pixels']:,} pixels"
    )
    say(f"padded batches of 8 would be {report['padded_utilization']:.0%} full")
    say("\n".join(balance_lines(report)))
    in_rows, in_packs = report["patches"]["rows"], report["patches"]["packs"]
    if in_rows:
        is_grouped = planning is not None and planning.group_images
        how = "; rows of one image are planned together" if is_grouped else ""
        say(
            f"vision tower: {in_rows:,} patches in rows, {in_packs:,} in packs, which encode an image once "
            f"({fewer(in_packs, in_rows)}){how}"
        )
    if report.get("split"):
        cut = report["pieces"] - len(_store_of(dataset)) + report["split"]
        say(f"{report['split']:,} documents longer than a pack are in {cut:,} pieces")
    for source, named in report["unread"].items():
        say(unread_line(source, named))
    unit = "piece" if isinstance(dataset.samples, SplitSamples) else "row"
    if num_unused := report.get("unused", 0):
        say(
            f"{counted(num_unused, unit)} of them {'is' if num_unused == 1 else 'are'} not used, beyond "
            "num_samples or max_samples of dataset_info.json"
        )
    if "val_packs" in report:
        held_out = counted(report["val_samples"], unit)
        say(
            f"held out: {held_out} of them, in {counted(report['val_packs'], 'pack')} more, for --eval-data "
            f"{out}:val"
        )
    if num_bad := report["bad_rows"]:
        say(f"{counted(num_bad, 'bad row')} left out, listed in {out / 'bad_rows.jsonl'}")
    if report["dropped"] or report["truncated"]:
        say(
            f"{counted(report['dropped'], 'long row')} dropped and {report['truncated']:,} cut, listed in "
            f"{out / 'overflow.jsonl'}"
        )
    say(f"written to {out}")


def report_part(
    out: Path, options: PackOptions, reused: bool, start: float, unread: UnreadByFile
) -> None:
    num_bad = _count_lines(out / "bad_rows.jsonl")
    report = {
        "part": options.shard,
        "rows": len(open_store(out)) + num_bad,
        "bad_rows": num_bad,
        "reused": reused,
        "unread": unread,
        "seconds": round(time.perf_counter() - start, 3),
    }
    if options.json:
        print(json.dumps(report))
        return
    for source, named in unread.items():
        say(unread_line(source, named))
    say(
        f"part {options.shard}: {report['rows']:,} rows, {num_bad:,} of them bad, in "
        f"{report['seconds']:.1f} s; mmpack merge joins all parts"
    )
    say(f"written to {out}")


def _count_lines(path: Path) -> int:
    if not path.exists():
        return 0
    with open_regular(path) as file:
        return sum(1 for _ in file)

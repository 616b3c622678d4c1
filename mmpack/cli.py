"""The command line: mmpack check | pack | train | demo."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmpack.errors import BadRow, OnError
from mmpack.media import DATA_URIS
from mmpack.types import EncodedSample
from mmpack.vision import VisionSpec

if TYPE_CHECKING:
    from mmpack.files import Row
    from mmpack.readers import RowGroup

CHECK_EXAMPLE = """exit code: 0 every row is usable, 1 some are refused, 2 usage

examples:
  mmpack check data/train.json
  mmpack check data/train.json --tokenizer Qwen2-VL-2B-Instruct --png lengths.png --bad refused.jsonl
"""
PACK_EXAMPLE = """example:
  mmpack pack data/train.json --tokenizer Qwen2-VL-2B-Instruct --config Qwen2-VL-2B-Instruct \
      --capacity 8192 --out packed
"""
TRAIN_EXAMPLE = """Every option of transformers' TrainingArguments works too (--learning_rate, --bf16, ...).

examples:
  mmpack train --data packed --model Qwen2-VL-2B-Instruct --bf16 --output_dir run1
  mmpack train --data data/train.json --tokenizer Qwen2-VL-2B-Instruct --capacity 8192 \\
      --config tiny_config.json --steps 20
"""


PLANNING = (
    "capacity",
    "patch_capacity",
    "max_image_share",
    "on_overflow",
    "plan_seed",
    "config",
    "frozen",
)
DATA_HELP = ".json, .jsonl, .csv (also .gz, .zst), .parquet or .arrow rows, or a folder of them"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (0 done, 1 refused with a reason, 2 usage, 130 Ctrl-C)."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.run is not _train:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return options.run(options, rest) or 0
    except ValueError as error:
        print(f"mmpack: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mmpack: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmpack", description=sys.modules["mmpack"].__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter

    check = commands.add_parser(
        "check",
        help="read a data set as training would and say what is wrong with it",
        epilog=CHECK_EXAMPLE,
        formatter_class=raw,
    )
    check.add_argument("data", metavar="DATA", nargs="+", help=DATA_HELP)
    _add_reading_options(check)
    check.add_argument("--tokenizer", help="folder of tokenizer and processor: count tokens too")
    check.add_argument("--max-pixels", type=int, help="pixel budget of an image (the processor's)")
    check.add_argument(
        "--bad", metavar="FILE", help="write the refused rows and why, as JSON lines"
    )
    check.add_argument("--png", metavar="FILE", help="draw lengths, images and utilization")
    check.add_argument(
        "--json", action="store_true", help="print a JSON line a row, then the summary"
    )
    check.set_defaults(run=_check)

    pack = commands.add_parser(
        "pack",
        help="encode and plan a data set into packs",
        epilog=PACK_EXAMPLE,
        formatter_class=raw,
    )
    pack.add_argument("data", metavar="DATA", nargs="+", help=DATA_HELP)
    pack.add_argument("--out", required=True, help="folder to write the packed data set to")
    pack.add_argument("--overwrite", action="store_true", help="replace a packed data set in --out")
    pack.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="processes (as many as cores, where the rows are many)",
    )
    pack.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    pack.add_argument(
        "--png", metavar="FILE", help="draw how text and images share packs and files"
    )
    pack.add_argument(
        "--config",
        help="config.json, or the folder, of the model to train: packs then cost the same on it",
    )
    _add_data_options(pack, required=True)
    pack.set_defaults(run=_pack)

    train = commands.add_parser(
        "train",
        help="train on packs with a Hugging Face Trainer",
        epilog=TRAIN_EXAMPLE,
        formatter_class=raw,
        allow_abbrev=False,  # what is not ours goes to TrainingArguments
    )
    train.add_argument(
        "--data", required=True, nargs="+", help="what mmpack pack wrote, or rows to pack now"
    )
    train.add_argument("--model", help="folder of a model with its weights")
    train.add_argument("--config", help="config.json of a model to start with random weights")
    train.add_argument("--steps", type=int, help="optimizer steps; short for --max_steps")
    train.add_argument(
        "--on-bad-image",
        choices=["raise", "drop"],
        default="raise",
        help="an image that can no longer be decoded: stop, or leave its row out of its pack",
    )
    _add_data_options(train, required=False)
    train.set_defaults(run=_train)

    demo = commands.add_parser("demo", help="see it work: data, model and training, nothing needed")
    demo.add_argument(
        "--write", metavar="DIR", help="leave the data set, tokenizer and config here"
    )
    demo.set_defaults(run=_demo)
    return parser


def _add_data_options(parser: argparse.ArgumentParser, required: bool) -> None:
    _add_reading_options(parser)
    parser.add_argument("--tokenizer", required=required, help="folder of tokenizer and processor")
    parser.add_argument("--capacity", type=int, required=required, help="tokens a pack may hold")
    parser.add_argument("--patch-capacity", type=int, help="vision patches a pack may hold")
    parser.add_argument(
        "--max-image-share",
        type=float,
        metavar="SHARE",
        help="most of a pack's capacity that image tokens may take, 0 to 1",
    )
    parser.add_argument("--max-pixels", type=int, help="pixel budget of an image (the processor's)")
    parser.add_argument(
        "--resizer",
        choices=["pillow", "torch"],
        default="pillow",
        help="pillow resizes bit for bit as transformers' PIL processor, torch faster",
    )
    parser.add_argument(
        "--on-error", choices=["raise", "skip"], default="raise", help="what to do with a bad row"
    )
    parser.add_argument(
        "--on-overflow",
        choices=["error", "drop", "truncate", "split"],
        help="what to do with a row longer than a pack (error; documents: split)",
    )
    parser.add_argument("--train-on-prompt", action="store_true", help="supervise all text")
    parser.add_argument(
        "--mask-history", action="store_true", help="supervise the last answer only"
    )
    parser.add_argument(
        "--frozen",
        action="append",
        default=[],
        choices=["vision", "merger", "language"],
        help="part of the model that is not trained, for its cost; repeatable",
    )
    parser.add_argument("--plan-seed", type=int, default=0, help="seed of the plan")


def _add_reading_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stage",
        choices=["sft", "pretrain"],
        default="sft",
        help="rows are conversations, or documents: text with images, without a template",
    )
    parser.add_argument("--dataset", metavar="NAME", help="entry of the dataset_info.json in DATA")
    parser.add_argument(
        "--media-dir",
        action="append",
        default=[],
        metavar="DIR",
        help="folder images may lie in, repeatable; relative paths are looked up in the first "
        "(default: the data file's folder)",
    )
    parser.add_argument(
        "--allow-data-uri",
        action="store_true",
        help="take images that stand in the row as data URIs",
    )
    parser.add_argument(
        "--missing-marker",
        choices=["refuse", "prepend"],
        default="refuse",
        help="images but no <image> in a row: refuse it, or put them in front",
    )
    parser.add_argument(
        "--decode", action="store_true", help="decode every image to find damaged ones (slower)"
    )


def _check(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from tqdm import tqdm

    from mmpack.check import Summary, bad_row_line, check_rows, row_line
    from mmpack.readers import row_groups
    from mmpack.report import check_picture, check_table

    reading = _reading(options)
    groups = row_groups(options.data, reading.pop("mapping"), reading.pop("media_dir"))
    if options.tokenizer is not None:
        from mmpack.hf.training import load_processor

        tokenizer, vision = load_processor(options.tokenizer, options.max_pixels)
        reading.update(tokenizer=tokenizer, vision=vision)
    summary = Summary(hash_files=options.decode)
    for checked in tqdm(check_rows(groups, **reading), unit=" rows", desc="checking", disable=None):
        summary.add(checked)
        if options.json:
            print(_json_line(row_line(checked)), end="")
    if options.bad is not None:
        lines = [_json_line(bad_row_line(bad)) for bad in summary.bad_rows]
        Path(options.bad).write_text("".join(lines), encoding="utf-8")
    if options.json:
        print(_json_line({"summary": summary.as_dict()}), end="")
    else:
        print(check_table(summary))
    if options.png is not None:
        check_picture(summary, options.png)
    return 1 if summary.bad_rows else 0


def _pack(options: argparse.Namespace, rest: Sequence[str]) -> None:
    start = time.perf_counter()
    out = Path(options.out)
    is_ours = (out / "mmpack.json").exists()
    if out.exists() and any(out.iterdir()) and not is_ours:
        raise ValueError(f"{out} is not empty; choose another --out, or --overwrite a packed set")

    from mmpack.dataset import costs_of, plan_samples
    from mmpack.hf.training import load_processor
    from mmpack.index import made_from
    from mmpack.plan import padded_utilization
    from mmpack.readers import row_groups
    from mmpack.report import balance_lines, balance_report, pack_picture
    from mmpack.store import reuse_store, write_batches

    _settle(options)
    config = _config(options.config, options.frozen)
    bad_rows: list[BadRow] = []
    about: dict[str, Any] = {
        name: value
        for name, value in vars(options).items()
        if name not in ("run", "json", "overwrite", "jobs", "out", "png")
    }
    about["begun"] = time.time_ns()
    reading = _reading(options)
    groups = list(row_groups(options.data, reading.pop("mapping"), reading.pop("media_dir")))
    tokenizer, vision = load_processor(options.tokenizer, options.max_pixels, options.resizer)
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
            batches = _batches(groups, tokenizer, vision, jobs=options.jobs, **ways)
            store = write_batches(partial, batches, vision, about)
            _write_lines(partial / "bad_rows.jsonl", [asdict(row) for row in bad_rows])
        samples, patch_capacity, on_overflow = _cut(store, vision, options)
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


def _packed_before(out: Path, about: dict[str, Any], overwrite: bool) -> tuple[Any, str]:
    """(the store at `out` if it is what would be made now, else None, and why it is not)"""
    from mmpack.index import changes
    from mmpack.store import open_store

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
    groups: list[RowGroup], tokenizer: Any, vision: VisionSpec, **options: Any
) -> Iterator[bytes]:
    """Batches for a store, a bar showing rows, rows a second and, where files know how many they
    have, how long it will take."""
    from tqdm import tqdm

    from mmpack.files import count_rows
    from mmpack.index import index_rows

    counts = [count_rows(group.file) if group.file is not None else None for group in groups]
    is_array = [group.file is not None and group.file.suffix == ".json" for group in groups]
    is_known = all(array or count is not None for array, count in zip(is_array, counts))
    total = sum(count or 0 for count in counts) if is_known else None
    with tqdm(total=total, unit=" rows", desc="encoding", disable=None) as bar:

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


def _encode(options: argparse.Namespace, bad_rows: list[BadRow]) -> tuple[Iterable[Any], Any]:
    """(encoded samples with a progress bar, VisionSpec)"""
    from tqdm import tqdm

    from mmpack.encode import encode_samples
    from mmpack.hf.training import load_processor
    from mmpack.readers import read_documents, read_samples

    reading = _reading(options)
    read = read_documents if reading.pop("stage") == "pretrain" else read_samples
    on_error: OnError = bad_rows if options.on_error == "skip" else "raise"
    tokenizer, vision = load_processor(options.tokenizer, options.max_pixels, options.resizer)
    samples = read(options.data, on_error=on_error, **reading)
    encoded = encode_samples(
        samples,
        tokenizer,
        vision,
        train_on_prompt=options.train_on_prompt,
        mask_history=options.mask_history,
        on_error=on_error,
    )
    return tqdm(encoded, unit=" rows", desc="encoding", disable=None), vision


def _cut(samples: Any, vision: VisionSpec, options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(samples, long documents in pieces, patch capacity, on_overflow), as there is to plan."""
    from mmpack.split import image_capacity, split_samples

    patch_capacity = options.patch_capacity
    if options.max_image_share is not None:
        most = image_capacity(options.max_image_share, options.capacity, vision)
        patch_capacity = most if patch_capacity is None else min(most, patch_capacity)
    if options.on_overflow != "split":
        return samples, patch_capacity, options.on_overflow
    return split_samples(samples, options.capacity, patch_capacity), patch_capacity, "error"


def _config(path: str | None, frozen: Sequence[str]) -> Any:
    """The config to count costs with, None where none is named."""
    if path is None:
        if frozen:
            raise ValueError("--frozen says what a step costs; pass the model's --config too")
        return None
    from mmpack.hf.training import load_config

    return load_config(path)


def _reading(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `read_samples`, but for `on_error`."""
    return {
        "mapping": options.dataset,
        "media_dir": [*options.media_dir, *([DATA_URIS] if options.allow_data_uri else [])],
        "missing_marker": options.missing_marker,
        "verify": "decode" if options.decode else "header",
        "stage": options.stage,
    }


def _settle(options: argparse.Namespace) -> None:
    """What follows from other options: documents are split, conversations are not."""
    if options.on_overflow is None:
        options.on_overflow = "split" if options.stage == "pretrain" else "error"
    if options.stage == "sft" and options.on_overflow == "split":
        raise ValueError("a conversation cannot be split; --on-overflow split is for documents")
    if options.stage == "pretrain" and (options.train_on_prompt or options.mask_history):
        raise ValueError("documents have no turns; leave out --train-on-prompt and --mask-history")


def _train(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from mmpack.dataset import PackedDataset, costs_of
    from mmpack.hf.training import load_model, parse_training_arguments, train

    steps = [] if options.steps is None else ["--max_steps", str(options.steps)]
    args = parse_training_arguments([*steps, *rest])
    if len(options.data) == 1 and (Path(options.data[0]) / "mmpack.json").exists():
        dataset = PackedDataset.from_store(options.data[0])
    elif options.tokenizer is None or options.capacity is None:
        raise ValueError(
            f"{' '.join(options.data)} is not what mmpack pack writes; to pack rows now, pass --tokenizer and "
            "--capacity"
        )
    else:
        _settle(options)
        bad_rows: list[BadRow] = []
        config = _config(options.model or options.config, options.frozen)
        encoded, vision = _encode(options, bad_rows)
        samples, patch_capacity, on_overflow = _cut(list(encoded), vision, options)
        dataset = PackedDataset.from_samples(
            samples,
            options.capacity,
            None if config is None else costs_of(samples, config, options.frozen),
            patch_capacity=patch_capacity,
            on_overflow=on_overflow,
            seed=options.plan_seed,
        )
        for row in bad_rows:
            print(f"left out {row}", file=sys.stderr)
    dataset.on_bad_image = options.on_bad_image
    model = load_model(options.model, options.config, args.seed)
    print(f"{len(dataset):,} packs, {dataset.plan.utilization:.1%} full")
    print(json.dumps(train(model, dataset, args)))


def _demo(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from mmpack.demo import run_demo

    run_demo(options.write)


def _overflow_line(sample: EncodedSample, fate: str) -> dict[str, Any]:
    return {"source": sample.source, "row": sample.row, "tokens": sample.num_tokens, "fate": fate}


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        path.write_text("".join(_json_line(row) for row in rows), encoding="utf-8")


def _count_lines(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _json_line(value: dict[str, Any]) -> str:
    """Any row as a line: bytes and pictures abridged, half characters escaped."""
    try:
        return json.dumps(value, default=lambda other: f"{other!r:.100}") + "\n"
    except RecursionError:
        return json.dumps({**value, "content": "nested too deeply to write"}) + "\n"


if __name__ == "__main__":
    sys.exit(main())

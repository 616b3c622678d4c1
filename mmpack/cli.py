"""The command line: mmpack check | pack | train | demo."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmpack.errors import BadRow, OnError
from mmpack.media import DATA_URIS

if TYPE_CHECKING:
    pass

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
--resume_from_checkpoint FOLDER continues a run; `last` is the newest whole checkpoint of --output_dir, or the start.

examples:
  mmpack train --data packed --model Qwen2-VL-2B-Instruct --bf16 --output_dir run1
  mmpack train --data packed --model Qwen2-VL-2B-Instruct --bf16 --output_dir run1 \\
      --resume_from_checkpoint last
  mmpack train --data data/train.json --tokenizer Qwen2-VL-2B-Instruct --capacity 8192 \\
      --config tiny_config.json --steps 20
"""


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
    _add_video_options(check)
    check.add_argument(
        "--config", help="config.json, or the folder, of the model (Qwen2.5-VL videos)"
    )
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
        help="an image or video that can no longer be decoded: stop, or leave its row out of its pack",
    )
    _add_data_options(train, required=False)
    train.set_defaults(run=_train)

    demo = commands.add_parser("demo", help="see it work: data, model and training, nothing needed")
    demo.add_argument(
        "--write", metavar="DIR", help="leave the data set, tokenizer and config here"
    )
    demo.set_defaults(run=_demo)
    return parser


def _add_video_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--video-fps", type=float, help="frames sampled a second (the processor's, or 2)"
    )
    parser.add_argument(
        "--video-max-frames", type=int, help="most frames sampled (the processor's)"
    )
    parser.add_argument(
        "--video-max-pixels",
        type=int,
        help="pixel budget of a frame, for Qwen3-VL of all frames together (the processor's)",
    )


def _processor(options: argparse.Namespace) -> tuple[Any, Any]:
    """(tokenizer, VisionSpec) as the options say."""
    from mmpack.hf.training import load_config, load_processor

    model = options.config or getattr(options, "model", None)
    return load_processor(
        options.tokenizer,
        options.max_pixels,
        getattr(options, "resizer", "pillow"),
        None if model is None else load_config(model),
        {
            "fps": options.video_fps,
            "max_frames": options.video_max_frames,
            "max_pixels": options.video_max_pixels,
        },
    )


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
    _add_video_options(parser)
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
        help="folder images and videos may lie in, repeatable; relative paths are looked up in the first "
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
        help="images but no <image> in a row, or videos but no <video>: refuse it, or put them in front",
    )
    parser.add_argument(
        "--decode",
        action="store_true",
        help="decode every image and video to find damaged ones (slower)",
    )


def _check(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from tqdm import tqdm

    from mmpack.check import Summary, bad_row_line, check_rows, row_line
    from mmpack.readers import row_groups
    from mmpack.report import check_picture, check_table, json_line

    reading = _reading(options)
    groups = row_groups(options.data, reading.pop("mapping"), reading.pop("media_dir"))
    if options.tokenizer is not None:
        tokenizer, vision = _processor(options)
        reading.update(tokenizer=tokenizer, vision=vision)
    summary = Summary(hash_files=options.decode)
    for checked in tqdm(check_rows(groups, **reading), unit=" rows", desc="checking", disable=None):
        summary.add(checked)
        if options.json:
            print(json_line(row_line(checked)), end="")
    if options.bad is not None:
        lines = [json_line(bad_row_line(bad)) for bad in summary.bad_rows]
        Path(options.bad).write_text("".join(lines), encoding="utf-8")
    if options.json:
        print(json_line({"summary": summary.as_dict()}), end="")
    else:
        print(check_table(summary))
    if options.png is not None:
        check_picture(summary, options.png)
    return 1 if summary.bad_rows else 0


def _pack(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from mmpack.pack import run_pack

    _settle(options)
    config = _config(options.config, options.frozen)
    run_pack(options, _reading(options), _processor(options), config)


def _encode(options: argparse.Namespace, bad_rows: list[BadRow]) -> tuple[Iterable[Any], Any]:
    """(encoded samples with a progress bar, VisionSpec)"""
    from tqdm import tqdm

    from mmpack.encode import encode_samples
    from mmpack.readers import read_documents, read_samples

    reading = _reading(options)
    read = read_documents if reading.pop("stage") == "pretrain" else read_samples
    on_error: OnError = bad_rows if options.on_error == "skip" else "raise"
    tokenizer, vision = _processor(options)
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
    from mmpack.hf.resuming import last_checkpoint
    from mmpack.hf.training import load_model, parse_training_arguments, train
    from mmpack.pack import cut_long

    steps = [] if options.steps is None else ["--max_steps", str(options.steps)]
    args = parse_training_arguments([*steps, *rest])
    if args.resume_from_checkpoint == "last":
        args.resume_from_checkpoint = last_checkpoint(args.output_dir)
        where = args.resume_from_checkpoint or f"the start, {args.output_dir} holds no checkpoint"
        print(f"continuing from {where}", file=sys.stderr)
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
        samples, patch_capacity, on_overflow = cut_long(list(encoded), vision, options)
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


if __name__ == "__main__":
    sys.exit(main())

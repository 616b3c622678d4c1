"""What the command line takes: a command, its options, examples of it; `mmpack.cli.main` does the work."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mmpack.errors import MAX_BAD

CODES = "exit code: 0 done, 1 refused with a reason, 2 usage, 130 Ctrl-C, 141 nobody reads on"
CHECK_EXAMPLES = """exit code: 0 every row is usable, 1 some are refused, 2 usage

examples:
  mmpack check data/train.json
  mmpack check data/train.json --tokenizer Qwen2-VL-2B-Instruct --png lengths.png --bad refused.jsonl
  mmpack check data/train.json --quiet --bad refused.jsonl
"""
PACK_EXAMPLES = """examples:
  mmpack pack data/train.json --tokenizer Qwen2-VL-2B-Instruct --capacity 8192 --out packed
  mmpack pack data/train.json --tokenizer Qwen2-VL-2B-Instruct --config Qwen2-VL-2B-Instruct \\
      --capacity 8192 --out packed --json
  mmpack pack data --tokenizer Qwen2-VL-2B-Instruct --capacity 8192 --out parts/3 --shard 3/8
  mmpack pack docs.jsonl --stage pretrain --tokenizer Qwen2-VL-2B --capacity 8192 --out packed
"""
MERGE_EXAMPLES = """Machine I of N makes a part: mmpack pack ... --shard I/N --out parts/I

examples:
  mmpack merge packed parts/1 parts/2 parts/3
  mmpack merge packed parts/* --overwrite
"""
INSPECT_EXAMPLES = """Supervised tokens are green, or between [[ and ]] where the output is no terminal; an image's
placeholders are one word. --json has every token's place exactly.

examples:
  mmpack inspect packed
  mmpack inspect packed --row 1843
  mmpack inspect packed --pack 17 --png pack17.png | less
  mmpack inspect packed --pack 0-19 --html packs.html
  mmpack inspect packed --pack 17 --segment 3 --tokenizer Qwen2-VL-2B-Instruct
"""
TRAIN_EXAMPLES = """Every option of transformers' TrainingArguments works too (--learning_rate, --bf16, ...).
--resume_from_checkpoint FOLDER continues a run; `last` is the newest whole checkpoint of --output_dir,
or the start.
The last line printed is a JSON object; with --json the only one, and Trainer's log goes to stderr.

examples:
  mmpack train --data packed --model Qwen2-VL-2B-Instruct --bf16 --output_dir run1
  mmpack train --data packed --model Qwen2-VL-2B-Instruct --bf16 --output_dir run1 \\
      --resume_from_checkpoint last
  mmpack train --data data/train.json --tokenizer Qwen2-VL-2B-Instruct --capacity 8192 \\
      --config tiny_config.json --steps 20
"""
DEMO_EXAMPLES = """examples:
  mmpack demo
  mmpack demo --write demo_data
"""
ENV_EXAMPLES = """Paste it into a bug report. It never fails: what is missing or broken is named.

examples:
  mmpack env
  mmpack env --json
"""
DATA_HELP = ".json, .jsonl, .csv (also .gz, .zst), .parquet or .arrow rows, or a folder of them"
TOKENIZER_HELP = "folder of tokenizer and processor"


def command_line() -> argparse.ArgumentParser:
    """The parser of `mmpack`; `command` names the one chosen."""
    package = sys.modules["mmpack"]
    parser = argparse.ArgumentParser(
        prog="mmpack",
        description=package.__doc__,
        epilog=f"{CODES}\n\nmmpack COMMAND --help has examples of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mmpack {package.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def command(name: str, help: str, examples: str, **kwargs: Any) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(
            name,
            help=help,
            description=help,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )
        output = added.add_mutually_exclusive_group()
        output.add_argument("--json", action="store_true", help="print JSON instead of text")
        output.add_argument("--quiet", action="store_true", help="print errors only")
        return added

    check = command(
        "check", "read a data set as training would and say what is wrong with it", CHECK_EXAMPLES
    )
    check.add_argument("data", metavar="DATA", nargs="+", help=DATA_HELP)
    _add_reading_options(check)
    check.add_argument("--tokenizer", metavar="FOLDER", help=f"{TOKENIZER_HELP}: count tokens too")
    _add_media_sizes(check)
    check.add_argument("--config", help="config.json, or the folder, of the model (its videos)")
    check.add_argument(
        "--bad", metavar="FILE", help="write the refused rows and why, as JSON lines"
    )
    check.add_argument("--png", metavar="FILE", help="draw lengths, images and utilization")

    pack = command("pack", "encode and plan a data set into packs", PACK_EXAMPLES)
    pack.add_argument("data", metavar="DATA", nargs="+", help=DATA_HELP)
    pack.add_argument(
        "--out", metavar="FOLDER", required=True, help="write the packed data set here"
    )
    pack.add_argument("--overwrite", action="store_true", help="replace a packed data set in --out")
    pack.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="processes (as many as cores, where the rows are many)",
    )
    pack.add_argument(
        "--shard", metavar="I/N", help="encode part I of N, as one of N machines; then mmpack merge"
    )
    _add_mix_picture(pack)
    pack.add_argument(
        "--config",
        help="config.json, or the folder, of the model to train: packs then cost the same on it",
    )
    _add_data_options(pack, required=True)

    merge = command("merge", "join what mmpack pack --shard wrote, and plan", MERGE_EXAMPLES)
    merge.add_argument("out", metavar="OUT", help="folder to write the packed data set to")
    merge.add_argument(
        "parts", metavar="PART", nargs="+", help="folders of all parts, in any order"
    )
    merge.add_argument("--overwrite", action="store_true", help="replace a packed data set in OUT")
    _add_mix_picture(merge)

    inspect = command(
        "inspect", "show a pack: segments, text, images, what is supervised", INSPECT_EXAMPLES
    )
    inspect.add_argument("data", metavar="PACKED", help="folder that mmpack pack wrote")
    which = inspect.add_mutually_exclusive_group()
    which.add_argument(
        "--pack",
        type=_pack_range,
        metavar="K",
        help="which one (0); with --html also the first and last of several, K-L (the first 10)",
    )
    which.add_argument(
        "--row",
        metavar="N",
        help="the one with this row of the data, N or FILE:N, and its text alone",
    )
    inspect.add_argument("--segment", type=int, metavar="N", help="the text of this one alone")
    inspect.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="folder of the tokenizer, if it is no longer where it was when the data was packed",
    )
    picture = inspect.add_mutually_exclusive_group()
    picture.add_argument(
        "--png", metavar="FILE", help="draw its tokens, images and attention blocks"
    )
    picture.add_argument(
        "--html", metavar="FILE", help="write packs to a page for a browser, with small images"
    )

    train = command(
        "train",
        "train on packs with a Hugging Face Trainer",
        TRAIN_EXAMPLES,
        allow_abbrev=False,  # what is not ours goes to TrainingArguments
    )
    train.add_argument(
        "--data", required=True, nargs="+", help="what mmpack pack wrote, or rows to pack now"
    )
    train.add_argument("--model", metavar="FOLDER", help="a model with its weights")
    train.add_argument("--config", help="config.json of a model to start with random weights")
    train.add_argument(
        "--steps", type=int, metavar="N", help="optimizer steps; short for --max_steps"
    )
    train.add_argument(
        "--on-bad-image",
        choices=["raise", "drop"],
        default="raise",
        help="an image or video that can no longer be decoded: stop, or leave its row out of its pack",
    )
    train.add_argument(
        "--on-changed-data",
        choices=["raise", "warn"],
        default="raise",
        help="data files that changed after they were packed: stop, or train on the rows as they were",
    )
    train.add_argument(
        "--weights-dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="what weights are kept and saved in, with --bf16 too; small updates are lost in bfloat16",
    )
    _add_data_options(train, required=False)

    demo = command("demo", "see it work: data, model and training, nothing needed", DEMO_EXAMPLES)
    demo.add_argument(
        "--write", metavar="FOLDER", help="leave the data set, tokenizer and config here"
    )
    command("env", "versions, GPUs, and which implementations are available here", ENV_EXAMPLES)
    return parser


def _pack_range(text: str) -> range:
    """K or K-L, the last one included."""
    first, _, last = text.partition("-")
    if (
        not (first + last).isdecimal()
        or not first
        or text.endswith("-")
        or int(last or first) < int(first)
    ):
        raise argparse.ArgumentTypeError(f"{text!r} is no pack K, nor packs K-L")
    return range(int(first), int(last or first) + 1)


def _add_mix_picture(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--png", metavar="FILE", help="draw how text and images share packs and files"
    )


def _add_media_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-pixels", type=int, metavar="N", help="pixel budget of an image (the processor's)"
    )
    parser.add_argument(
        "--video-fps",
        type=float,
        metavar="N",
        help="frames sampled a second (the processor's, or 2)",
    )
    parser.add_argument(
        "--video-max-frames", type=int, metavar="N", help="most frames sampled (the processor's)"
    )
    parser.add_argument(
        "--video-max-pixels",
        type=int,
        metavar="N",
        help="pixel budget of a frame, for Qwen3-VL of all frames together (the processor's)",
    )


def _add_data_options(parser: argparse.ArgumentParser, required: bool) -> None:
    _add_reading_options(parser)
    parser.add_argument("--tokenizer", metavar="FOLDER", required=required, help=TOKENIZER_HELP)
    parser.add_argument(
        "--capacity", type=int, metavar="N", required=required, help="tokens a pack may hold"
    )
    parser.add_argument(
        "--patch-capacity", type=int, metavar="N", help="vision patches a pack may hold"
    )
    parser.add_argument(
        "--max-image-share",
        type=float,
        metavar="SHARE",
        help="most of a pack's capacity that image tokens may take, 0 to 1",
    )
    _add_media_sizes(parser)
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
        "--max-bad",
        type=float,
        metavar="SHARE",
        default=MAX_BAD,
        help="most rows that may be skipped, or dropped for their images, 0 to 1; judged from 1,000 rows on "
        f"({MAX_BAD})",
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
        help="part of the model that is not trained: packing counts its cost, mmpack train freezes it; "
        "repeatable",
    )
    parser.add_argument("--plan-seed", type=int, metavar="N", default=0, help="seed of the plan")


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
        metavar="FOLDER",
        help="folder images and videos may lie in, repeatable; relative paths are looked up in the first "
        "(default: the data file's folder); training on packs: instead of those recorded there",
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

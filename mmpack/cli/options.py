"""What the command line takes: for each command a dataclass of its options, and examples.

A field is an option, with its help: the parser is made of the fields, so an option is added in one place.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mmpack.errors import MAX_BAD, check_max_bad
from mmpack.store.manifest import Planning
from mmpack.store.records import check, schema_of

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
_METAVARS = {int: "N", float: "N", str: "PATH"}


def option(help: str, default: Any = MISSING, **argument: Any) -> Any:
    """A field that is an option: `max_pixels` is `--max-pixels`; its type says what it takes (`_taken`), and
    without a default it is required.

    Args:
        argument: what argparse is told besides; `positional=True`: it has no name, only a place;
            `either="a"`: of those with the same one may be given.
    """
    return field(default=default, metadata={"help": help, **argument})


@dataclass(frozen=True, kw_only=True)
class Options:
    """output"""

    json: bool = option("print JSON instead of text", False, either="output")
    quiet: bool = option("print errors only", False, either="output")


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """reading rows"""

    stage: Literal["sft", "pretrain"] = option(
        "rows are conversations (sft), or documents (pretrain): text with images, without a template",
        "sft",
    )
    dataset: str | None = option("entry of the dataset_info.json in DATA", None, metavar="NAME")
    media_dir: tuple[str, ...] = option(
        "folder images and videos may lie in, repeatable; relative paths are looked up in the first "
        "(default: the data file's folder); training on packs: instead of those recorded there",
        (),
        metavar="FOLDER",
    )
    allow_data_uri: bool = option("take images that stand in the row as data URIs", False)
    missing_marker: Literal["refuse", "prepend"] = option(
        "images but no <image> in a row, or videos but no <video>: refuse it, or put them in front",
        "refuse",
    )
    decode: bool = option("decode every image and video to find damaged ones (slower)", False)


@dataclass(frozen=True, kw_only=True)
class ProcessorOptions:
    """tokens and pixels"""

    tokenizer: str | None = option(TOKENIZER_HELP, None, metavar="FOLDER")
    config: str | None = None  # what it is for differs by command
    max_pixels: int | None = option("pixel budget of an image (the processor's)", None)
    video_fps: float | None = option("frames sampled a second (the processor's, or 2)", None)
    video_max_frames: int | None = option("most frames sampled (the processor's)", None)
    video_max_pixels: int | None = option(
        "pixel budget of a frame, for Qwen3-VL of all frames together (the processor's)", None
    )


@dataclass(frozen=True, kw_only=True)
class PackingOptions(ReadingOptions, ProcessorOptions):
    """packing

    Raises:
        ValueError: they contradict each other, or no store could record them.
    """

    capacity: int | None = option("tokens a pack may hold", None)
    patch_capacity: int | None = option("vision patches a pack may hold", None)
    max_image_share: float | None = option(
        "most of a pack's capacity that image tokens may take, 0 to 1", None, metavar="SHARE"
    )
    resizer: Literal["pillow", "torch"] = option(
        "pillow resizes bit for bit as transformers' PIL processor, torch faster", "pillow"
    )
    on_error: Literal["raise", "skip"] = option("what to do with a bad row", "raise")
    max_bad: float = option(
        "most rows that may be skipped, or dropped for their images, 0 to 1; judged from 1,000 rows on "
        f"({MAX_BAD})",
        MAX_BAD,
        metavar="SHARE",
    )
    on_overflow: Literal["error", "drop", "truncate", "split"] | None = option(
        "what to do with a row longer than a pack (error; documents: split)", None
    )
    train_on_prompt: bool = option("supervise all text", False)
    mask_history: bool = option("supervise the last answer only", False)
    frozen: tuple[Literal["vision", "merger", "language"], ...] = option(
        "part that is not trained, repeatable: packing counts its cost, mmpack train freezes it",
        (),
    )
    plan_seed: int = option("seed of the plan (0)", 0)

    def __post_init__(self) -> None:
        if self.on_overflow is None:
            settled = "split" if self.stage == "pretrain" else "error"
            object.__setattr__(self, "on_overflow", settled)
        check_max_bad(self.max_bad)
        for name, values in schema_of(Planning).items():
            if isinstance(given := getattr(self, name), (int, float)):
                check(given, values, _name(name))
        if self.stage == "sft" and self.on_overflow == "split":
            raise ValueError("a conversation cannot be split; --on-overflow split is for documents")

    @property
    def planning(self) -> Planning:
        """Those of them that say which samples share a pack, as a store records them."""
        return Planning(**{one.name: getattr(self, one.name) for one in fields(Planning)})


@dataclass(frozen=True, kw_only=True)
class PictureOptions(Options):
    """output"""

    png: str | None = option("draw how text and images share packs and files", None, metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class CheckOptions(ReadingOptions, ProcessorOptions, Options):
    """read a data set as training would and say what is wrong with it"""

    data: tuple[str, ...] = option(DATA_HELP, positional=True, nargs="+", metavar="DATA")
    tokenizer: str | None = option(f"{TOKENIZER_HELP}: count tokens too", None, metavar="FOLDER")
    config: str | None = option("config.json, or the folder, of the model (its videos)", None)
    bad: str | None = option("write the refused rows and why, as JSON lines", None, metavar="FILE")
    png: str | None = option("draw lengths, images and utilization", None, metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class PackOptions(PackingOptions, PictureOptions):
    """encode and plan a data set into packs"""

    data: tuple[str, ...] = option(DATA_HELP, positional=True, nargs="+", metavar="DATA")
    out: str = option("write the packed data set here", metavar="FOLDER")
    tokenizer: str = option(TOKENIZER_HELP, metavar="FOLDER")
    capacity: int = option("tokens a pack may hold")
    config: str | None = option(
        "config.json, or the folder, of the model to train: packs then cost the same on it", None
    )
    overwrite: bool = option("replace a packed data set in --out", False)
    jobs: int | None = option("processes (as many as cores, where the rows are many)", None)
    shard: str | None = option(
        "encode part I of N, as one of N machines; then mmpack merge", None, metavar="I/N"
    )


@dataclass(frozen=True, kw_only=True)
class MergeOptions(PictureOptions):
    """join what mmpack pack --shard wrote, and plan"""

    out: str = option("folder to write the packed data set to", positional=True, metavar="OUT")
    parts: tuple[str, ...] = option(
        "folders of all parts, in any order", positional=True, nargs="+", metavar="PART"
    )
    overwrite: bool = option("replace a packed data set in OUT", False)
    max_bad: float | None = option(
        "most rows of all parts that may have been skipped, 0 to 1 (the least of the parts')",
        None,
        metavar="SHARE",
    )


@dataclass(frozen=True, kw_only=True)
class InspectOptions(Options):
    """show a pack: segments, text, images, what is supervised"""

    data: str = option("folder that mmpack pack wrote", positional=True, metavar="PACKED")
    pack: str | None = option(
        "which one (0); with --html also K-L (the first 10)", None, either="which", metavar="K"
    )
    row: str | None = option(
        "the one with this row, N or FILE:N, and its text alone", None, either="which", metavar="N"
    )
    segment: int | None = option("the text of this one alone", None)
    tokenizer: str | None = option(
        "the tokenizer's folder, if it moved since the data was packed", None, metavar="FOLDER"
    )
    png: str | None = option("draw tokens and attention", None, either="picture", metavar="FILE")
    html: str | None = option("write packs to a web page", None, either="picture", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(PackingOptions, Options):
    """train on packs with a Hugging Face Trainer"""

    data: tuple[str, ...] = option(
        "what mmpack pack wrote, or rows to pack now", nargs="+", metavar="DATA"
    )
    model: str | None = option("a model with its weights", None, metavar="FOLDER")
    config: str | None = option("config.json of a model to start with random weights", None)
    steps: int | None = option("optimizer steps; short for --max_steps", None)
    on_bad_image: Literal["raise", "drop"] = option(
        "an image or video that can no longer be decoded: stop, or leave its row out of its pack",
        "raise",
    )
    on_changed_data: Literal["raise", "warn"] = option(
        "data files that changed after they were packed: stop, or train on the rows as they were",
        "raise",
    )
    weights_dtype: Literal["float32", "bfloat16"] = option(
        "what weights are kept and saved in, with --bf16 too; small updates are lost in bfloat16",
        "float32",
    )
    training: tuple[str, ...] = ()  # words that are no option of ours: TrainingArguments'


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Options):
    """see it work: data, model and training, nothing needed"""

    write: str | None = option("leave data, tokenizer and config here", None, metavar="FOLDER")


@dataclass(frozen=True, kw_only=True)
class EnvOptions(Options):
    """versions, GPUs, and which implementations are available here"""


COMMANDS: dict[str, tuple[type[Options], str]] = {  # their options, and examples
    "check": (CheckOptions, CHECK_EXAMPLES),
    "pack": (PackOptions, PACK_EXAMPLES),
    "merge": (MergeOptions, MERGE_EXAMPLES),
    "inspect": (InspectOptions, INSPECT_EXAMPLES),
    "train": (TrainOptions, TRAIN_EXAMPLES),
    "demo": (DemoOptions, DEMO_EXAMPLES),
    "env": (EnvOptions, ENV_EXAMPLES),
}


def parse(words: Sequence[str] | None = None) -> tuple[str, Options]:
    """(command, its options); a dash and an underscore in an option's name are alike.

    Raises:
        ValueError: options contradict each other.
        SystemExit: there are no such options, or help was asked for.
    """
    parser = command_line()
    known = {_name(one.name) for kind, _ in COMMANDS.values() for one in fields(kind)}
    dashed = []
    for word in sys.argv[1:] if words is None else words:
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        dashed.append(name + equals + value if name in known else word)
    namespace, rest = parser.parse_known_args(dashed)
    given: dict[str, Any] = vars(namespace)
    given |= {name: tuple(one) for name, one in given.items() if isinstance(one, list)}
    command: str = given.pop("command")
    kind = COMMANDS[command][0]
    if kind is TrainOptions:
        given["training"] = tuple(rest)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return command, kind(**given)


def command_line() -> argparse.ArgumentParser:
    """The parser of `mmpack`, made of `COMMANDS`; `command` names the one chosen."""
    package = sys.modules["mmpack"]
    parser = argparse.ArgumentParser(
        prog="mmpack",
        description=package.__doc__,
        epilog=f"{CODES}\n\nmmpack COMMAND --help has examples of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mmpack {package.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, (kind, examples) in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=kind.__doc__,
            description=kind.__doc__,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,  # the defaults are the dataclass's
        )
        _add_options(added, kind)
    return parser


def _add_options(parser: argparse.ArgumentParser, kind: type[Options]) -> None:
    """A command's own options first, then a group for each class that brings some, named by its docstring."""
    hints = get_type_hints(kind)
    left = {one.name: one for one in fields(kind) if one.metadata}
    groups: dict[str, Any] = {str(kind.__doc__): parser}
    either: dict[str, Any] = {}
    for part in kind.__mro__:
        title = str(part.__doc__).partition("\n")[0]
        for name in [name for name in inspect.get_annotations(part) if name in left]:
            one = left.pop(name)
            argument = {**_taken(hints[name]), **one.metadata}
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            place = groups[title]
            if which := argument.pop("either", ""):
                if which not in either:
                    either[which] = place.add_mutually_exclusive_group()
                place = either[which]
            if "nargs" in argument:  # all at once, not one each time
                del argument["action"]
            if argument.pop("positional", False):
                place.add_argument(name, **argument)
            else:
                place.add_argument(_name(name), required=one.default is MISSING, **argument)


def _name(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _taken(kind: Any) -> dict[str, Any]:
    """What argparse is told of a field's type: bool is a flag, a tuple an option that is repeated."""
    if kind is bool:
        return {"action": "store_true"}
    inner = [one for one in get_args(kind) if one is not NoneType]
    if get_origin(kind) is Literal:
        return {"choices": inner}
    if get_origin(kind) is tuple:
        return {**_taken(inner[0]), "action": "append"}
    return _taken(inner[0]) if inner else {"type": kind, "metavar": _METAVARS[kind]}

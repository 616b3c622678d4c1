"""Options of the command line: a dataclass for each command, whose fields are its options with their help texts
(`mmpack.cli.command_line` builds the parser from them)."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mmpack.data.remote_roots import require_local
from mmpack.errors import MAX_BAD, check_max_bad
from mmpack.packing.held_out import check_size
from mmpack.packing.overflow import check_split
from mmpack.store.manifest import Planning
from mmpack.store.ray_chunks import check_ray
from mmpack.store.records import check, schema_of

DATA_HELP = ".json, .jsonl, .csv (also .gz, .zst), .parquet, .arrow or .tar rows, a folder of them, or a URL"
TOKENIZER_HELP = "tokenizer and processor: a folder, or a Hugging Face name (owner/name)"


def option(help: str, default: Any = MISSING, **argument: Any) -> Any:
    """A dataclass field that is an option: `max_pixels` is `--max-pixels`. Its type determines its values
    (`command_line._taken`), and without a default it is required.

    Args:
        argument: further arguments of `add_argument`; `positional=True` makes it a positional argument, and
            options with the same `either` exclude each other.
    """
    return field(default=default, metadata={"help": help, **argument})


def flag(name: str) -> str:
    """The option of a field, `max_pixels` -> `--max-pixels`."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class Options:
    """output"""

    json: bool = option("print JSON instead of text", False, either="output")
    quiet: bool = option("print errors only", False, either="output")
    given: frozenset[str] = frozenset()  # the options that were passed, whatever their values


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """reading rows"""

    stage: Literal["sft", "pretrain"] = option(
        "rows are conversations (sft) or documents (pretrain): text with images, without a chat template",
        "sft",
    )
    dataset: tuple[str, ...] = option("entry of dataset_info.json, repeatable", (), metavar="NAME")
    media_dir: tuple[str, ...] = option(
        "folder or URL that images and videos must be in, repeatable; a relative path must be in only one "
        "(default: the data file's folder; training on packs: the recorded folders)",
        (),
        metavar="FOLDER",
    )
    allow_data_uri: bool = option("accept images given as data URIs in the row", False)
    missing_marker: Literal["refuse", "prepend"] = option(
        "for a row with images but no <image>, or videos but no <video>: refuse it, or put them first",
        "refuse",
    )
    decode: bool = option("decode every image and video to find damaged ones (slower)", False)


@dataclass(frozen=True, kw_only=True)
class ProcessorOptions:
    """tokens and pixels"""

    tokenizer: str | None = option(TOKENIZER_HELP, None, metavar="FOLDER")
    config: str | None = None  # its purpose differs by command
    typed_tokens: Literal["ids", "text"] = option(
        "special tokens in rows, other than those of turns and images: their ids, or plain text",
        "ids",
    )
    template_arg: tuple[str, ...] = option(
        "argument of the chat template, repeatable; VALUE is JSON or text", (), metavar="NAME=VALUE"
    )
    max_pixels: int | None = option("maximum pixels per image (default: processor's)", None)
    min_pixels: int | None = option("minimum pixels per image (default: processor's)", None)
    video_fps: float | None = option("frames sampled per second (default: processor's, or 2)", None)
    video_max_frames: int | None = option("maximum frames per video (default: processor's)", None)
    video_max_pixels: int | None = option(
        "maximum pixels per frame; Qwen3-VL: of all frames together (default: processor's)", None
    )


@dataclass(frozen=True, kw_only=True)
class PackingOptions(ReadingOptions, ProcessorOptions):
    """packing

    Raises:
        ValueError: options contradict each other or are out of range.
    """

    capacity: int | None = option("maximum tokens per pack", None)
    patch_capacity: int | None = option("maximum vision patches per pack", None)
    max_image_share: float | None = option(
        "maximum share of a pack's capacity for image tokens, 0 to 1", None, metavar="SHARE"
    )
    on_error: Literal["raise", "skip"] = option("what to do with a bad row", "raise")
    max_bad: float = option(
        "maximum share of rows skipped, or dropped for their images, 0 to 1; checked from 1,000 rows on "
        f"(default: {MAX_BAD})",
        MAX_BAD,
        metavar="SHARE",
    )
    on_overflow: Literal["error", "drop", "truncate", "split"] | None = option(
        "what to do with a row longer than a pack (default: error; for documents: split)", None
    )
    train_on_prompt: bool = option("supervise all text", False)
    mask_history: bool = option("supervise the last answer only", False)
    mask_thinking: bool = option("leave thoughts and their <think> tags unsupervised", False)
    frozen: tuple[Literal["vision", "merger", "language"], ...] = option(
        "part of the model that is frozen, repeatable: lowers the cost of packs; mmpack train freezes it",
        (),
    )
    plan_seed: int = option("seed of the plan (default: 0)", 0)
    group_images: bool = option(
        "plan rows that show the same image together: a pack encodes an image once; rows are less mixed",
        False,
    )

    def __post_init__(self) -> None:
        if self.on_overflow is None:
            settled = "split" if self.stage == "pretrain" else "error"
            object.__setattr__(self, "on_overflow", settled)
        check_max_bad(self.max_bad)
        for name, values in schema_of(Planning).items():
            if isinstance(given := getattr(self, name, None), (int, float)):
                check(given, values, flag(name))
        check_split(str(self.on_overflow), self.stage)

    @property
    def planning(self) -> Planning:
        """The options that determine which samples share a pack, as a store records them."""
        names = [one.name for one in fields(Planning) if hasattr(self, one.name)]
        return Planning(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class PictureOptions(Options):
    """output"""

    png: str | None = option(
        "draw shares of text and images per pack and file", None, metavar="FILE"
    )


@dataclass(frozen=True, kw_only=True)
class CheckOptions(ReadingOptions, ProcessorOptions, Options):
    """check a data set: read it as training would, and report what is wrong"""

    data: tuple[str, ...] = option(DATA_HELP, positional=True, nargs="+", metavar="DATA")
    tokenizer: str | None = option(f"{TOKENIZER_HELP}; also count tokens", None, metavar="FOLDER")
    config: str | None = option("config.json, folder or name of the model, for its videos", None)
    bad: str | None = option("write refused rows with reasons, as JSON lines", None, metavar="FILE")
    png: str | None = option("draw lengths, images per row and utilization", None, metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class PackOptions(PackingOptions, PictureOptions):
    """encode and plan a data set into packs"""

    data: tuple[str, ...] = option(DATA_HELP, positional=True, nargs="+", metavar="DATA")
    out: str = option("write the packed data set here", metavar="FOLDER")
    tokenizer: str = option(TOKENIZER_HELP, metavar="FOLDER")
    capacity: int = option("maximum tokens per pack")
    config: str | None = option("config.json, folder or name of the model, to balance packs", None)
    overwrite: bool = option("replace a packed data set in --out", False)
    jobs: int | None = option("processes (default: one per core if there are many rows)", None)
    ray: str | None = option(
        "encode as tasks of Ray (extra ray): of the cluster at ADDRESS, HOST:PORT or auto; without ADDRESS, of a "
        "Ray on this machine",
        None,
        nargs="?",
        const="local",
        metavar="ADDRESS",
    )
    shard: str | None = option("encode part I of N; then mmpack merge", None, metavar="I/N")
    val_size: float | None = option(
        "hold out this many rows, or this share of them, below 1: a second plan, for mmpack train --eval-data "
        "FOLDER:val",
        None,
        metavar="N",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_local(self.out, "--out")
        if self.val_size is not None:
            check_size(self.val_size)
        if self.ray is not None:
            check_ray(self.ray)


@dataclass(frozen=True, kw_only=True)
class MergeOptions(PictureOptions):
    """join the parts that mmpack pack --shard wrote, and plan packs"""

    out: str = option("folder to write the packed data set to", positional=True, metavar="OUT")
    parts: tuple[str, ...] = option(
        "folders of all parts, in any order", positional=True, nargs="+", metavar="PART"
    )
    overwrite: bool = option("replace a packed data set in OUT", False)
    max_bad: float | None = option(
        "maximum share of rows skipped in all parts, 0 to 1 (default: the smallest of the parts')",
        None,
        metavar="SHARE",
    )

    def __post_init__(self) -> None:
        require_local(self.out, "OUT")


@dataclass(frozen=True, kw_only=True)
class InspectOptions(Options):
    """show a pack: segments, text, images, supervision"""

    data: str = option(
        "folder that mmpack pack wrote; FOLDER:val: its rows held out",
        positional=True,
        metavar="PACKED",
    )
    pack: str | None = option(
        "pack to show (default: 0); with --html also K-L (default: the first 10)",
        None,
        either="which",
        metavar="K",
    )
    row: str | None = option(
        "show the text of this row, N or FILE:N, and its pack", None, either="which", metavar="N"
    )
    segment: int | None = option("show only the text of this segment", None)
    tokenizer: str | None = option(
        "tokenizer, if the recorded one has moved: folder or Hub name", None, metavar="FOLDER"
    )
    png: str | None = option("draw tokens and attention", None, either="picture", metavar="FILE")
    html: str | None = option("write packs to an HTML page", None, either="picture", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(PackingOptions, Options):
    """train on packs with a Hugging Face Trainer"""

    data: tuple[str, ...] = option(
        "folder written by mmpack pack, or rows to pack now", nargs="+", metavar="DATA"
    )
    mix: tuple[float, ...] = option(
        "mix the --data in these shares, one number for each; an epoch then repeats the smaller ones",
        (),
        nargs="+",
        metavar="WEIGHT",
    )
    mix_by: Literal["tokens", "samples"] = option(
        "what the weights of --mix are shares of (default: tokens)", "tokens"
    )
    epoch_tokens: int | None = option(
        "tokens of an epoch of --mix (default: until the source with the most tokens per weight is through)",
        None,
    )
    eval_data: tuple[str, ...] = option(
        "evaluate on this: a folder written by mmpack pack, or rows (default: after every epoch); NAME=DATA for "
        "several sets, each with an eval_NAME_loss",
        (),
        nargs="+",
        metavar="DATA",
    )
    early_stopping_patience: int | None = option(
        "end after this many evaluations in a row without a smaller eval_loss, and keep the best model",
        None,
    )
    model: str | None = option(
        "model with weights: a folder, or a Hugging Face name (owner/name)", None, metavar="FOLDER"
    )
    config: str | None = option("config.json, folder or name, to start with random weights", None)
    lora_rank: int | None = option(
        "train LoRA adapters of this rank on the text model's linear layers, and freeze the rest",
        None,
    )
    steps: int | None = option("optimizer steps; short for --max_steps", None)
    options: str | None = option(
        "YAML file of options, these and TrainingArguments'; those passed replace the file's",
        None,
        metavar="FILE",
    )
    on_bad_image: Literal["raise", "drop"] = option(
        "if an image or video can no longer be decoded: stop, or drop its row from the pack",
        "raise",
    )
    on_changed_data: Literal["raise", "warn"] = option(
        "if data files changed after packing: stop, or train on the packed rows",
        "raise",
    )
    weights_dtype: Literal["float32", "bfloat16"] = option(
        "dtype of the stored weights, also with --bf16; in bfloat16, small updates are lost",
        "float32",
    )
    impl: Literal["auto", "libraries", "triton"] = option(
        "ops: what mmpack tune chose on this GPU (else libraries'), libraries', or mmpack's kernels",
        "auto",
    )
    loss_reduction: Literal["token", "sample", "sqrt"] = option(
        "what counts once in the loss: each supervised token, or each row; sqrt: a row of n tokens sqrt(n) times",
        "token",
    )
    context_size: int = option(
        "ranks that share each pack, whose --capacity is theirs together (default: 1); needs a multiple of as "
        "many processes (torchrun)",
        1,
        metavar="N",
    )
    source_weight: tuple[str, ...] = option(
        "factor of the loss of a data file's rows, repeatable; NAME is the file's name",
        (),
        metavar="NAME=FACTOR",
    )
    training: tuple[str, ...] = ()  # other words, for TrainingArguments
    words: tuple[str, ...] = ()  # all words, to print the command that continues the run

    def eval_sets(self) -> dict[str, tuple[str, ...]]:
        """The words of --eval-data by the set's name, "" for the one set without a name.

        Raises:
            ValueError: some of them have a name, others have none.
        """
        sets: dict[str, tuple[str, ...]] = {}
        for word in self.eval_data:
            name, path = "", word
            if (named := re.fullmatch(r"([\w-]+)=(.+)", word)) and not Path(word).exists():
                name, path = named.groups()
            sets[name] = (*sets.get(name, ()), path)
        if "" in sets and len(sets) > 1:
            raise ValueError(
                f"--eval-data {sets[''][0]} has no name, others have; write NAME={sets[''][0]}"
            )
        return sets


@dataclass(frozen=True, kw_only=True)
class TuneOptions(Options):
    """measure mmpack's kernels and libraries' on this GPU; training then takes the fastest that are right"""

    models: tuple[str, ...] = option(
        "config.json, folder or Hugging Face name of a model, for its sizes",
        positional=True,
        nargs="+",
        metavar="MODEL",
    )
    capacity: int = option("tokens per pack, for timing (default: 8192)", 8192)
    context_size: int = option(
        "ranks that share each pack, as in mmpack train (default: 1): each has a part of the heads",
        1,
        metavar="N",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = option(
        "dtype of computations, that of mixed precision if it is used", "bfloat16"
    )


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Options):
    """a complete run on synthetic data: packing, training, comparison with padding"""

    write: str | None = option("keep data, tokenizer and config here", None, metavar="FOLDER")


@dataclass(frozen=True, kw_only=True)
class EnvOptions(Options):
    """versions, GPUs and available implementations, for bug reports"""

"""The command line: mmpack check | pack | merge | inspect | train | tune | demo | env.

`ValueError`, `OSError` and a missing extra print one line and exit with 1. Any other exception is a bug in mmpack
and shows its traceback.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmpack.cli.command_line import parse
from mmpack.cli.options import (
    CheckOptions,
    DemoOptions,
    EnvOptions,
    InspectOptions,
    MergeOptions,
    PackingOptions,
    PackOptions,
    ReadingOptions,
    TrainOptions,
    TuneOptions,
)
from mmpack.cli.refused_options import check_applies
from mmpack.cli.terminal import escaped_streams, is_colored, one_line, say, unescaped, width
from mmpack.data.encoder import Encoder
from mmpack.data.media_paths import DATA_URIS
from mmpack.data.model_folder import local_path, pinned
from mmpack.data.processor_folder import load_config
from mmpack.data.progress import row_progress
from mmpack.data.readers import Reader, limits_of
from mmpack.errors import OnError, json_line

# What mmpack[train] installs.
_TRAIN = {"transformers", "huggingface_hub", "accelerate", "pyarrow", "filelock", "tqdm"}
_TRAIN |= {"tokenizers", "safetensors", "yaml"}  # with transformers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 refused with a reason, 2 usage, 130 Ctrl-C, 141 broken
    pipe."""
    with escaped_streams():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # text that the terminal cannot encode
    command = ""
    try:
        command, options = parse(arguments)
        check_applies(options)
        with ExitStack() as stack:
            if options.quiet:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(_without_progress())
            code = _COMMANDS[command](options) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as interrupt:
        print("; ".join(["mmpack: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130
    except BrokenPipeError:  # `mmpack ... | head`
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # for Python's own last flush
        return 141
    except ValueError as error:
        reason = str(error)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package == "mmpack":
            raise
        needs = (
            f"mmpack {command} needs mmpack[train]"
            if package in _TRAIN
            else f"pip install {package}"
        )
        reason = f"{package} is not installed; {needs}"
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    print(f"mmpack: {one_line(reason)}", file=sys.stderr)
    return 1


@contextmanager
def _without_progress() -> Iterator[None]:
    logger = logging.getLogger("mmpack.data.progress")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _encoder(
    options: CheckOptions | PackOptions | TrainOptions, on_error: OnError = "raise"
) -> Encoder:
    """The encoder described by the options."""
    assert options.tokenizer is not None
    model = options.config or getattr(options, "model", None)
    packing: dict[str, Any] = {}
    if isinstance(options, PackingOptions):
        names = ("train_on_prompt", "mask_history", "mask_thinking")
        packing = {name: getattr(options, name) for name in names}
    return Encoder.from_folder(
        options.tokenizer,
        None if model is None else load_config(local_path(model)),
        max_pixels=options.max_pixels,
        min_pixels=options.min_pixels,
        video={
            "fps": options.video_fps,
            "max_frames": options.video_max_frames,
            "max_pixels": options.video_max_pixels,
        },
        on_error=on_error,
        typed_tokens=options.typed_tokens,
        template_args=_template_args(options.template_arg),
        **_reading(options),
        **packing,
    )


def _template_args(words: Sequence[str]) -> dict[str, Any] | None:
    arguments: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name or name in arguments:
            raise ValueError(f"--template-arg takes NAME=VALUE, each name once, got {word!r:.80}")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments or None


def _check(options: CheckOptions) -> int:
    from mmpack.cli.check import Summary, bad_row_line, check_rows, row_line
    from mmpack.cli.tables import check_table

    reader = Reader(**_reading(options)) if options.tokenizer is None else _encoder(options)
    if options.config is not None and isinstance(reader, Encoder):
        video = reader.vision.video
        if video is not None and video.tokens_per_second is None:
            raise ValueError(
                "--config does not apply: only Qwen2.5-VL's videos depend on the model's config; leave it out"
            )
    groups = list(reader.groups(options.data))
    limits_of(groups)  # what packing would refuse of the entries
    summary = Summary(hash_files=options.decode)
    summary.add_files(group.file for group in groups)
    with row_progress("checking", groups) as (groups, bar):
        for checked in bar.each(check_rows(groups, reader)):
            summary.add(checked)
            if options.json:
                print(json_line(row_line(checked)), end="")
    if options.bad is not None:
        lines = [json_line(bad_row_line(bad)) for bad in summary.bad_rows]
        Path(options.bad).write_text("".join(lines), encoding="utf-8")
    if options.json:
        print(json_line({"summary": summary.as_dict()}), end="")
    else:
        say(check_table(summary))
    if options.png is not None:
        from mmpack.cli.plots import check_picture  # imports torch, two seconds

        check_picture(summary, options.png)
    return 1 if summary.bad_rows else 0


def _pack(options: PackOptions) -> None:
    from mmpack.cli.pack import run_pack

    # The store records which commit these were.
    options = replace(
        options,
        tokenizer=pinned(options.tokenizer),
        config=None if options.config is None else pinned(options.config),
    )
    config = _config(options.config, options.frozen)
    run_pack(options, _encoder(options, options.on_error), config)


def _inspect(options: InspectOptions) -> None:
    from mmpack.cli import inspect
    from mmpack.cli.plots import inspect_picture
    from mmpack.packing.dataset import PackedDataset

    dataset = PackedDataset.from_store(options.data, "warn")
    packs = None if options.pack is None else inspect.pack_range(options.pack)
    segment = options.segment
    if options.row is not None:
        (number, segment), *others = inspect.find_row(dataset, options.row)
        packs = range(number, number + 1)
        for pack, piece in others:
            print(f"mmpack: continued in pack {pack}, segment {piece}", file=sys.stderr)
    number, *more = packs or [0]
    if more and options.html is None:
        raise ValueError(f"--pack {number}-{more[-1]} needs --html FILE; without it, pass one pack")
    view = inspect.view_pack(dataset, number)
    chosen = range(len(view.samples))
    if segment is not None:
        if segment not in chosen:
            raise ValueError(
                f"pack {number} has no segment {segment}; its segments are 0 to {len(chosen) - 1}"
            )
        chosen = range(segment, segment + 1)
    decode, note = inspect.find_tokenizer(dataset, options.tokenizer)
    if note:
        print(f"mmpack: {note}", file=sys.stderr)
    if options.html is not None:
        _inspect_html(options, dataset, packs, segment, decode)
        return
    if options.png is not None:
        inspect_picture(view, options.png)
    if options.json:
        print(json.dumps(inspect.as_dict(view, decode, chosen)))
        return
    say(inspect.table(view, width()))
    color = is_colored(sys.stdout)
    file = unescaped(sys.stdout) if color else sys.stdout
    for segment in chosen:
        print(f"\n{inspect.text(view, segment, decode, color)}", file=file)


def _inspect_html(
    options: InspectOptions, dataset: Any, packs: range | None, segment: int | None, decode: Any
) -> None:
    from mmpack.cli.inspect_html import write_page

    name, path = Path(options.data).resolve().name, str(options.html)
    page = write_page(dataset, packs, decode, path, name=name, segment=segment)
    for problem in page["problems"]:
        print(f"mmpack: {problem}", file=sys.stderr)
    if options.json:
        print(json.dumps(page))
        return
    first, last = page["packs"][0], page["packs"][-1]
    which = f"pack {first}" if first == last else f"packs {first} to {last}"
    following = f"; --pack {page['next']} has the next" if page["next"] else ""
    print(
        f"{path}: {which} of {dataset.plan.num_packs:,}, {page['images']:,} images and videos, "
        f"{page['bytes'] / 1000:,.0f} kB{following}"
    )


def _merge(options: MergeOptions) -> None:
    from mmpack.cli.merge import run_merge

    run_merge(options, lambda planning: _config(planning.config, planning.frozen, download=False))


def _config(name: str | None, frozen: Sequence[str], download: bool = True) -> Any:
    """The model's config for costs; None if no name is given."""
    if name is None:
        if frozen:
            raise ValueError("--frozen affects costs, which need the model; pass --config too")
        return None
    return load_config(local_path(name, download=download))


def _reading(options: ReadingOptions) -> dict[str, Any]:
    """The options of `Reader`, except `on_error`."""
    return {
        "mapping": options.dataset or None,
        "media_dir": [*options.media_dir, *([DATA_URIS] if options.allow_data_uri else [])],
        "missing_marker": options.missing_marker,
        "verify": "decode" if options.decode else "header",
        "stage": options.stage,
    }


def _train(options: TrainOptions) -> None:
    from mmpack.cli.train import run_train

    run_train(options, _encoder, _config)


def _tune(options: TuneOptions) -> int:
    from mmpack.cli.tune import run_tune

    configs = [load_config(local_path(model)) for model in options.models]
    return run_tune(configs, options)


def _demo(options: DemoOptions) -> None:
    from mmpack.cli.demo import run_demo

    with redirect_stdout(sys.stderr if options.json else sys.stdout):
        figures = run_demo(options.write)
    if options.json:
        print(json.dumps(figures))


def _env(options: EnvOptions) -> None:
    from mmpack.cli.env import env_table, environment

    found = environment()
    if options.json:
        print(json.dumps(found))
    else:
        say(env_table(found))


_COMMANDS: dict[str, Callable[[Any], int | None]] = {
    "check": _check,
    "pack": _pack,
    "merge": _merge,
    "inspect": _inspect,
    "train": _train,
    "tune": _tune,
    "demo": _demo,
    "env": _env,
}

if __name__ == "__main__":
    sys.exit(main())

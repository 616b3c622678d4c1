"""The command line: mmpack check | pack | merge | inspect | train | demo | env.

`ValueError`, `OSError` and a missing extra print one line and exit with 1. Any other exception is a bug in mmpack
and shows its traceback.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    parse,
)
from mmpack.cli.refused_options import check_applies, is_packed
from mmpack.cli.terminal import escaped_streams, is_colored, one_line, say, unescaped, width
from mmpack.data.encoder import Encoder
from mmpack.data.media_paths import DATA_URIS
from mmpack.data.model_folder import local_path, pinned
from mmpack.data.processor_folder import load_config
from mmpack.data.progress import row_progress
from mmpack.data.readers import Reader, media_folders
from mmpack.errors import BadRow, OnError, Skip
from mmpack.store.manifest import Planning

# What mmpack[train] installs.
_TRAIN = {"transformers", "huggingface_hub", "accelerate", "pyarrow", "filelock", "tqdm"}
_TRAIN |= {"tokenizers", "safetensors"}  # with transformers


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
        names = ("resizer", "train_on_prompt", "mask_history")
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
        **_reading(options),
        **packing,
    )


def _check(options: CheckOptions) -> int:
    from mmpack.cli.check import Summary, bad_row_line, check_rows, row_line
    from mmpack.cli.plots import check_picture
    from mmpack.cli.tables import check_table, json_line

    reader = Reader(**_reading(options)) if options.tokenizer is None else _encoder(options)
    groups = list(reader.groups(options.data))
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
    from mmpack.cli.pack import cut_long
    from mmpack.hf.checkpoints import last_checkpoint
    from mmpack.hf.loading import load_model
    from mmpack.hf.model_parts import freeze
    from mmpack.hf.training import train
    from mmpack.hf.training_options import parse_training_arguments
    from mmpack.packing.cost import costs_of
    from mmpack.packing.dataset import PackedDataset

    ours = [] if options.steps is None else ["--max_steps", str(options.steps)]
    args = parse_training_arguments([*ours, *options.training], options.quiet)
    if args.resume_from_checkpoint == "last":
        args.resume_from_checkpoint = last_checkpoint(args.output_dir)
        where = args.resume_from_checkpoint or f"the start, {args.output_dir} holds no checkpoint"
        print(f"continuing from {where}", file=sys.stderr)
    if is_packed(options.data):
        dataset = PackedDataset.from_store(options.data[0], options.on_changed_data)
        if options.media_dir:
            dataset.media_folders = options.media_dir
        store: Any = getattr(dataset.samples, "samples", dataset.samples)
        _tell_other_costs(store.about.planning, options.frozen)
    elif options.tokenizer is None or options.capacity is None:
        raise ValueError(
            f"{' '.join(options.data)} is not a folder written by mmpack pack; to pack rows now, pass "
            "--tokenizer and --capacity"
        )
    else:
        bad_rows: list[BadRow] = []
        config = _config(options.model or options.config, options.frozen)
        skip = Skip(options.max_bad, bad_rows)
        encoder = _encoder(options, skip if options.on_error == "skip" else "raise")
        groups = list(encoder.groups(options.data))
        with row_progress("encoding", groups) as (groups, bar):
            found = list(bar.each(encoder.encode(encoder.read_groups(groups))))
        samples, patch_capacity, on_overflow = cut_long(found, encoder.vision, options.planning)
        dataset = PackedDataset.from_samples(
            samples,
            options.capacity,
            None if config is None else costs_of(samples, config, options.frozen),
            patch_capacity=patch_capacity,
            on_overflow=on_overflow,
            seed=options.plan_seed,
        )
        dataset.media_folders = media_folders(groups)
        for row in bad_rows:
            print(f"left out {one_line(row)}", file=sys.stderr)
    dataset.on_bad_image, dataset.max_bad = options.on_bad_image, options.max_bad
    model = load_model(options.model, options.config, args.seed, options.weights_dtype)
    freeze(model, options.frozen)
    with redirect_stdout(sys.stderr if options.json else sys.stdout):
        full = f"{len(dataset):,} packs, {dataset.plan.utilization:.1%} full"
        print(f"{full}; weights in {options.weights_dtype}")
        folders = dataset.media_folders
        if folders is None:
            print("images and videos are read from anywhere; --media-dir FOLDER confines them")
        else:
            print(f"images and videos are read from {' and '.join(folders)}")
        try:
            result = train(model, dataset, args)
        except KeyboardInterrupt:
            if args.process_index:
                raise
            raise KeyboardInterrupt(_how_to_continue(options.words, args)) from None
    print(json.dumps(result))


def _how_to_continue(words: Sequence[str], args: Any) -> str:
    """How to resume an interrupted run, in words."""
    from mmpack.hf.checkpoints import last_checkpoint

    last = last_checkpoint(args.output_dir)
    if last is None:
        return (
            f"no checkpoint was saved in {args.output_dir} yet; the same command starts over "
            "(--save_steps N saves earlier)"
        )
    if args.world_size > 1:
        return f"to continue from {last}: the same command with --resume_from_checkpoint last"
    name, kept = "resume_from_checkpoint", list(words)
    places = [n for n, word in enumerate(kept) if word.lstrip("-").replace("-", "_") == name]
    for place in reversed(places):
        del kept[place : place + 2]
    command = shlex.join(["mmpack", *kept, f"--{name}", "last"])
    return f"to continue from {last}:\n  {command}"


def _tell_other_costs(planning: Planning | None, frozen: Sequence[str]) -> None:
    """Warn if a store's packs were balanced for other frozen parts."""
    if planning is not None and planning.config is not None and set(planning.frozen) != set(frozen):
        words = [
            f"--frozen {' --frozen '.join(p)}" if p else "no --frozen"
            for p in (planning.frozen, frozen)
        ]
        print(
            f"mmpack: the packs were planned for {words[0]}, but this run has {words[1]}: their costs are not "
            "balanced, and ranks will wait for each other; pack again with the same --frozen options",
            file=sys.stderr,
        )


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
    "demo": _demo,
    "env": _env,
}

if __name__ == "__main__":
    sys.exit(main())

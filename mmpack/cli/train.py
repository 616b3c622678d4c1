"""`mmpack train`: packs, or rows packed now, and a model -> a run of `mmpack.hf.training`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any

from mmpack.cli.options import TrainOptions
from mmpack.cli.refused_options import is_packed
from mmpack.cli.terminal import one_line
from mmpack.data.encoder import Encoder
from mmpack.data.progress import row_progress
from mmpack.data.readers import media_folders
from mmpack.errors import BadRow, OnError, Skip
from mmpack.store.manifest import Planning


def run_train(
    options: TrainOptions,
    encoder_of: Callable[[TrainOptions, OnError], Encoder],
    config_of: Callable[[str | None, Sequence[str]], Any],
) -> None:
    """Train on packs, or on rows packed now; print the figures as the last line. `encoder_of` and `config_of` make
    the encoder and the model's config for costs."""
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
        config = config_of(options.model or options.config, options.frozen)
        skip = Skip(options.max_bad, bad_rows)
        encoder = encoder_of(options, skip if options.on_error == "skip" else "raise")
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
    dataset.on_bad_image = options.on_bad_image
    if options.on_bad_image == "drop":  # else --max-bad is about rows
        dataset.max_bad = options.max_bad
    dataset.source_weights = _source_weights(options.source_weight)
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
            result = train(model, dataset, args, options.impl, options.loss_reduction)
        except KeyboardInterrupt:
            if args.process_index:
                raise
            raise KeyboardInterrupt(_how_to_continue(options.words, args)) from None
    print(json.dumps(result))


def _source_weights(words: Sequence[str]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for word in words:
        name, equals, value = word.rpartition("=")
        try:
            if name in weights or not name:
                raise ValueError
            weights[name] = float(value)
        except ValueError:
            raise ValueError(
                f"--source-weight takes NAME=FACTOR, each name once, got {word!r:.80}"
            ) from None
    return weights


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

"""`mmpack train`: packs, or rows packed now, and a model -> a run of `mmpack.hf.training`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from mmpack.cli.options import TrainOptions, flag
from mmpack.cli.refused_options import is_packed
from mmpack.cli.tables import mixture_lines
from mmpack.cli.terminal import one_line
from mmpack.data.encoder import Encoder
from mmpack.data.model_folder import local_path
from mmpack.data.path_patterns import is_pattern
from mmpack.data.progress import row_progress
from mmpack.data.readers import limits_of, media_folders
from mmpack.data.remote_roots import is_url, shown
from mmpack.errors import BadRow, OnError, Skip
from mmpack.store.manifest import Planning, packed_split


def run_train(
    options: TrainOptions,
    encoder_of: Callable[[TrainOptions, OnError], Encoder],
    config_of: Callable[[str | None, Sequence[str]], Any],
) -> None:
    """Train on packs, or on rows packed now; print the figures as the last line. `encoder_of` and `config_of` make
    the encoder and the model's config for costs."""
    from mmpack.hf.loading import load_model
    from mmpack.hf.lora import FROZEN as LORA_FROZEN
    from mmpack.hf.lora import add_lora
    from mmpack.hf.model_parts import freeze
    from mmpack.hf.model_patch import patch_model
    from mmpack.hf.training import train

    sets, patience = options.eval_sets(), options.early_stopping_patience
    args = _training_arguments(options, sets)
    frozen = options.frozen if options.lora_rank is None else (*options.frozen, *LORA_FROZEN)
    frozen = tuple(dict.fromkeys(frozen))
    context = context_group(options, args, config_of)
    read = _Reading(options, encoder_of, config_of, frozen)
    dataset = read.mixture() if options.mix else read.dataset(options.data, "--data")
    dataset.source_weights = _source_weights(options.source_weight)
    evaluated = {
        name: read.dataset(data, "--eval-data", dataset.capacity) for name, data in sets.items()
    }
    for eval_dataset in evaluated.values():
        tell_other_settings(dataset, eval_dataset)
    model = load_model(options.model, options.config, args.seed, options.weights_dtype)
    if options.lora_rank is not None:
        model = add_lora(model, options.lora_rank, str(options.model), args.seed)
    freeze(model, options.frozen)
    with redirect_stdout(sys.stderr if options.json else sys.stdout):
        _tell_data(options, dataset, evaluated)
        try:
            result = train(
                patch_model(model, options.impl, context),
                dataset,
                args,
                options.loss_reduction,
                eval_dataset=evaluated.get("", evaluated or None),
                patience=patience,
                processor=read.files,
            )
        except KeyboardInterrupt:
            if args.process_index:
                raise
            raise KeyboardInterrupt(_how_to_continue(options.words, args)) from None
        if not args.process_index:
            print(f"written to {args.output_dir}")
    print(json.dumps(result))


def _training_arguments(options: TrainOptions, sets: dict[str, tuple[str, ...]]) -> Any:
    """transformers' TrainingArguments, with the folder to resume from."""
    from mmpack.hf.checkpoints import last_checkpoint
    from mmpack.hf.training_options import parse_training_arguments

    ours = [] if options.steps is None else ["--max_steps", str(options.steps)]
    patience = options.early_stopping_patience
    args = parse_training_arguments(
        [*ours, *options.training],
        options.quiet,
        bool(sets),
        sets=[name for name in sets if name],
        stops_early=patience is not None,
        own=[flag(one.name) for one in fields(options) if one.metadata],
    )
    if patience is not None and patience < 1:
        raise ValueError(f"--early-stopping-patience must be positive, got {patience}")
    if options.lora_rank is not None and options.lora_rank < 1:
        raise ValueError(f"--lora-rank must be positive, got {options.lora_rank}")
    check_context_size(options.context_size, args)
    if args.resume_from_checkpoint == "last":
        args.resume_from_checkpoint = last_checkpoint(args.output_dir)
        where = args.resume_from_checkpoint or f"the start, {args.output_dir} holds no checkpoint"
        print(f"continuing from {where}", file=sys.stderr)
    elif not args.resume_from_checkpoint and not args.process_index:
        _tell_earlier_run(str(args.output_dir))
    return args


def _tell_data(options: TrainOptions, dataset: Any, evaluated: dict[str, Any]) -> None:
    full = f"{len(dataset):,} packs, {dataset.plan.utilization:.1%} full"
    if options.context_size > 1:
        full = f"{full}, each over {options.context_size} ranks"
    print(f"{full}; weights in {options.weights_dtype}")
    if options.mix:
        print("\n".join(mixture_lines(dataset.report())))
    for name, one in evaluated.items():
        words = f"evaluation{name and f' of {name}'}"
        print(f"{words}: {len(one):,} packs, {one.plan.utilization:.1%} full")
    folders = dataset.media_folders
    if folders is None:
        print("images and videos are read from anywhere; --media-dir FOLDER confines them")
    else:
        print(f"images and videos are read from {' and '.join(folders)}")


class _Reading:
    """`--data` and `--eval-data` -> data sets.

    Attributes:
        files: the tokenizer and processor of the training data, which is read first.
    """

    def __init__(
        self,
        options: TrainOptions,
        encoder_of: Callable[[TrainOptions, OnError], Encoder],
        config_of: Callable[[str | None, Sequence[str]], Any],
        frozen: Sequence[str],
    ) -> None:
        self.files: Any = None
        self._options, self._frozen = options, frozen
        self._encoder_of, self._config_of = encoder_of, config_of

    def dataset(
        self, data: Sequence[str], flag: str, capacity: int | None = None
    ) -> Any:  # a PackedDataset, whose module imports torch
        """The data set of an option. `capacity`: tokens per pack of rows, by default `--capacity`."""
        return self._with_policy(self._read(data, flag, capacity))

    def _read(self, data: Sequence[str], flag: str, capacity: int | None) -> Any:
        from mmpack.packing.mixed_dataset import joined

        if not is_packed(data, flag):
            return self._rows(data, flag, self._options.capacity or capacity)
        found = [self._packed(word, flag == "--data") for word in data]
        if len(found) == 1:
            return found[0]
        return joined(dict(zip(_source_names(data), found)))  # of an evaluation

    def _with_policy(self, dataset: Any) -> Any:
        dataset.on_bad_image = self._options.on_bad_image
        if dataset.on_bad_image == "drop":  # else --max-bad is about rows
            dataset.max_bad = self._options.max_bad
        return dataset

    def mixture(self) -> Any:
        """The sources of `--data` in the shares of `--mix`."""
        from mmpack.packing.dataset import PackedDataset
        from mmpack.packing.mixed_dataset import costs_of_sources

        options = self._options
        sources = [self._read([data], "--data", None) for data in options.data]
        config = self._config_of(options.model or options.config, self._frozen)
        dataset = PackedDataset.mixed(
            dict(zip(_source_names(options.data), zip(sources, options.mix))),
            None if config is None else costs_of_sources(sources, config, self._frozen),
            by=options.mix_by,
            epoch_tokens=options.epoch_tokens,
            seed=options.plan_seed,
        )
        return self._with_policy(dataset)

    def _packed(self, word: str, is_training: bool) -> Any:
        from mmpack.hf.processor_files import recorded_files
        from mmpack.packing.dataset import PackedDataset
        from mmpack.packing.split_documents import unsplit

        dataset = PackedDataset.from_store(word, self._options.on_changed_data)
        if self._options.media_dir:
            dataset.media_folders = self._options.media_dir
        if is_training:
            store = unsplit(dataset.samples)
            is_lora = self._options.lora_rank is not None
            if not self._options.mix:  # a mixture is planned now, for this run's frozen parts
                tell_other_costs(store.about.planning, self._frozen, is_lora)
            found, why = recorded_files(store.about, dataset.vision)
            self.files = self.files or found
            if why and self.files is None:
                print(f"mmpack: {why}", file=sys.stderr)
        return dataset

    def _rows(self, data: Sequence[str], flag: str, capacity: int | None) -> Any:
        from mmpack.cli.pack import cut_long
        from mmpack.hf.processor_files import ProcessorFiles
        from mmpack.packing.dataset import PackedDataset
        from mmpack.packing.held_out import part_of, within_limits
        from mmpack.packing.plan_samples import plan_samples

        options = self._options
        for one in data:
            if not (is_url(one) or is_pattern(one) or Path(one).exists()):
                raise ValueError(f"cannot read {flag} {one}: no such file or folder; fix the path")
        if options.tokenizer is None or capacity is None:
            lacks = {"--tokenizer": options.tokenizer is None, "--capacity": capacity is None}
            needed = " and ".join(name for name, is_missing in lacks.items() if is_missing)
            raise ValueError(
                f"{' '.join(map(shown, data))} is not a folder written by mmpack pack; to pack rows now, pass "
                f"{needed}"
            )
        bad_rows: list[BadRow] = []
        config = self._config_of(options.model or options.config, self._frozen)
        skip = Skip(options.max_bad, bad_rows)
        encoder = self._encoder_of(options, skip if options.on_error == "skip" else "raise")
        groups = list(encoder.groups(data))
        with row_progress("encoding", groups) as (groups, bar):
            found = list(bar.each(encoder.encode(encoder.read_groups(groups))))
        planning = replace(options.planning, capacity=capacity)
        samples, patch_capacity, on_overflow = cut_long(found, encoder.vision, planning)
        used = within_limits(samples, limits_of(groups))
        plan = plan_samples(
            samples,
            capacity,
            patch_capacity,
            on_overflow,
            options.plan_seed,
            config,
            frozen=self._frozen,
            group_images=options.group_images,
            side=used,
        )
        dataset = PackedDataset(samples, plan if used.all() else part_of(plan, used))
        dataset.media_folders = media_folders(groups)
        for row in bad_rows:
            print(f"left out {one_line(row)}", file=sys.stderr)
        if flag == "--data":
            self.files = ProcessorFiles(local_path(options.tokenizer), encoder.vision)
        return dataset


def _source_names(paths: Sequence[str]) -> list[str]:
    """A name for each path: its last part, with a number if it is another's, too."""
    names: list[str] = []
    for path in paths:
        folder, _ = packed_split(path) or (path, "")
        name = Path(folder).resolve().name.replace("::", "_").rstrip(":")
        same = sum(one == name or one.startswith(f"{name}-") for one in names)
        names.append(f"{name}-{same + 1}" if name in names else name)
    return names


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


def _tell_earlier_run(folder: str) -> None:
    """Warn if a run that starts over writes into the folder of another, whose checkpoints might be continued for
    it."""
    found = [path.name for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdecimal()]
    if found:
        last = max(found, key=lambda name: int(name[11:]))
        print(
            f"mmpack: {folder} has checkpoints of an earlier run, up to {last}, and this run starts over: until "
            "it has saved later ones, --resume_from_checkpoint last continues the earlier run; choose another "
            "--output_dir",
            file=sys.stderr,
        )


def check_context_size(size: int, args: Any) -> None:
    """Refuse a `--context-size` that the processes of the run do not divide into.

    Raises:
        ValueError: it is.
    """
    if size < 1:
        raise ValueError(f"--context-size must be positive, got {size}")
    if args.world_size % size:
        raise ValueError(
            f"--context-size {size} does not apply: the run's processes, {args.world_size}, do not divide into "
            f"groups of {size}; start a multiple of {size}: torchrun --nproc_per_node {size} -m mmpack train ..."
        )


def context_group(
    options: TrainOptions, args: Any, config_of: Callable[[str | None, Sequence[str]], Any]
) -> Any:
    """This process's `ContextGroup`; None: it has packs of its own.

    Raises:
        ValueError: the model's heads do not divide among its ranks, which is told before rows are encoded.
    """
    if options.context_size == 1:
        return None
    from mmpack.hf.context_parallel import check_heads
    from mmpack.packing.context_group import ContextGroup

    config = config_of(options.model or options.config, ())
    if hasattr(config, "text_config"):
        check_heads(config, options.context_size)
    return ContextGroup.of(args.process_index, args.world_size, options.context_size)


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


def tell_other_costs(planning: Planning | None, frozen: Sequence[str], is_lora: bool) -> None:
    """Warn if a store's packs were balanced for other frozen parts than this run's."""
    if planning is not None and planning.config is not None and set(planning.frozen) != set(frozen):
        words = [
            f"--frozen {' --frozen '.join(p)}" if p else "no --frozen"
            for p in (planning.frozen, frozen)
        ]
        if is_lora:
            words[1] += " (--lora-rank freezes vision and merger)"
        print(
            f"mmpack: the packs were planned for {words[0]}, but this run has {words[1]}: their costs are not "
            "balanced, and ranks will wait for each other; pack again with the same --frozen options",
            file=sys.stderr,
        )


def tell_other_settings(dataset: Any, eval_dataset: Any) -> None:
    """Warn if the evaluation set was encoded with other settings than the training data."""
    from mmpack.packing.mixed_dataset import text_settings

    ours, theirs = asdict(dataset.vision), asdict(eval_dataset.vision)
    names = [name for name in ours if ours[name] != theirs[name]]
    if names:
        listed = ", ".join(f"{name} {theirs[name]} instead of {ours[name]}" for name in names)
        print(
            f"mmpack: --eval-data was encoded with other settings than --data: {listed}; its loss is that of "
            "other images, so encode both alike",
            file=sys.stderr,
        )
    ours, theirs = text_settings(dataset), text_settings(eval_dataset)
    names = [name for name in ours if theirs.get(name, ours[name]) != ours[name]]
    if names:
        print(
            f"mmpack: --eval-data was encoded with other text settings than --data: {', '.join(names)}; its loss "
            "is that of other tokens, so encode both alike",
            file=sys.stderr,
        )

"""Refuses options that would do nothing, with the reason: whatever is passed acts, or is an error.

Whether an option was passed is known from the parser (`Options.given`), not from its value, so a passed default is
refused, too. Options whose effect depends on a store's content are checked where it is read (`mmpack.cli.merge`),
those of transformers in `mmpack.hf.training_options`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields

from mmpack.cli.options import (
    CheckOptions,
    InspectOptions,
    Options,
    PackingOptions,
    PackOptions,
    ProcessorOptions,
    TrainOptions,
    flag,
)
from mmpack.errors import counted
from mmpack.store.manifest import packed_split

_VIDEO = ("video_fps", "video_max_frames", "video_max_pixels")
# What an option that is also one of mmpack pack does when training on packs.
_ON_PACKS = {"media_dir", "config", "frozen", "max_bad"}


def check_applies(options: Options) -> None:
    """Refuse the first group of passed options that would have no effect.

    Raises:
        ValueError: names all options of the group, why they do nothing, and what to do.
    """
    for names, error, advice in _rules(options):
        passed = [flag(name) for name in names if name in options.given]
        if passed:
            listed = " and ".join(filter(None, [", ".join(passed[:-1]), passed[-1]]))
            do = "does" if len(passed) == 1 else "do"
            raise ValueError(f"{listed} {do} not apply: {error}; {advice}")


def is_packed(data: Iterable[str], option: str = "--data") -> bool:
    """Whether `--data` (or `option`) is a folder that `mmpack pack` wrote, or for evaluation several.

    Raises:
        ValueError: it is one among others, or has rows that are held out of training.
    """
    folders = list(data)
    packed = [folder for folder in folders if packed_split(folder) is not None]
    for folder in packed if option == "--data" else ():
        if packed_split(folder) != (folder, "train"):
            raise ValueError(
                f"{option} {folder} are the rows held out for evaluation; pass the folder, and {folder} to "
                f"--eval-data"
            )
    is_joined = option != "--data" and len(packed) == len(folders)
    if packed and len(folders) > 1 and not is_joined:
        mix = "; mix them with --mix WEIGHT ..., or" if option == "--data" else ";"
        raise ValueError(
            f"{packed[0]} is one of {len(folders)} {option}, but a packed folder must be the only one{mix} pack "
            "the data files of all of them together with mmpack pack"
        )
    return bool(packed)


def _rules(options: Options) -> Iterator[tuple[Iterable[str], str, str]]:
    """(options, why they do nothing, advice), for the options as they were passed."""
    if isinstance(options, TrainOptions):
        yield from _training_rules(options)
    if isinstance(options, CheckOptions) and options.tokenizer is None:
        names = [one.name for one in fields(ProcessorOptions) if one.name != "tokenizer"]
        why = "mmpack check counts no tokens without a tokenizer"
        yield names, why, "pass --tokenizer too"
    if isinstance(options, (CheckOptions, PackingOptions)) and options.stage == "pretrain":
        names = [*_VIDEO, "config"] if isinstance(options, CheckOptions) else _VIDEO
        yield names, "documents have no videos (--stage pretrain)", "leave it out"
    if isinstance(options, PackingOptions):
        drops = isinstance(options, TrainOptions) and options.on_bad_image == "drop"
        if options.on_error == "raise" and not drops:
            skip = "--on-error skip" + (
                " or --on-bad-image drop" if isinstance(options, TrainOptions) else ""
            )
            yield (
                ["max_bad"],
                "the first bad row stops the command",
                f"pass {skip} to leave rows out",
            )
    if isinstance(options, PackOptions) and options.shard is not None:
        why = "a part has no packs to draw yet"
        yield ["png"], why, "pass it to mmpack merge"
    if isinstance(options, PackOptions) and options.ray is not None:
        yield ["jobs"], "Ray gives each chunk a core (--ray)", "leave one of the two out"
    if isinstance(options, InspectOptions) and options.row is not None:
        yield ["segment"], "--row shows the segment of its row", "leave one of the two out"


def _training_rules(options: TrainOptions) -> Iterator[tuple[Iterable[str], str, str]]:
    sets = [("--data", options.data)]
    if options.mix:
        sets = [("--data", (data,)) for data in options.data]
        if len(options.mix) != len(options.data):
            raise ValueError(
                f"--mix has {counted(len(options.mix), 'weight')} for {len(options.data)} --data; pass one for "
                f"each"
            )
    else:
        yield ["mix_by", "epoch_tokens"], "there is one source of data", "pass --mix too"
    sets += [("--eval-data", data) for data in options.eval_sets().values()]
    if not options.eval_data:
        yield ["early_stopping_patience"], "there is no evaluation set", "pass --eval-data too"
    packed = [data[0] for flag, data in sets if is_packed(data, flag)]
    if not packed:
        why = "rows are read and packed now, so they cannot differ from earlier packs"
        yield ["on_changed_data"], why, "leave it out"
    if options.lora_rank is not None:
        why = "LoRA adapts trained weights (--lora-rank)"
        yield [] if options.model else ["config"], why, "pass --model"
    if options.context_size > 1 and options.on_bad_image == "drop":
        why = (
            "a rank that cannot read a file would have another pack than the ranks it shares it with "
            "(--context-size)"
        )
        yield ["on_bad_image"], why, "find broken images first: mmpack check --decode"
    if len(packed) < len(sets):  # some are rows
        return
    acts = {*_ON_PACKS, "plan_seed"} if options.mix else _ON_PACKS  # a mixture is planned now
    packing = [one.name for one in fields(PackingOptions) if one.name not in acts]
    why = f"{' and '.join(packed)} {'is' if len(packed) == 1 else 'are'} packed, and mmpack pack has settled this"
    yield packing, why, "pack again with it, or leave it out"
    if options.on_bad_image == "raise":
        why = "the first bad image stops the run"
        yield ["max_bad"], why, "pass --on-bad-image drop to leave rows out"

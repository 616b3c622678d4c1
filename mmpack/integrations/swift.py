"""Packs in ms-swift's `swift sft` and `swift pt`, as a plugin (docs/ms_swift.md):

    # packs.py, for `swift sft --dataset packed --external_plugins packs.py`
    from mmpack.integrations.swift import install
    install()

ms-swift loads model and processor, adds adapters, freezes parts, makes optimizer, checkpoints and logs;
`--dataset` and `--val_dataset` are folders of `mmpack pack`. From mmpack come the data sets, collator, loss, the
patched model and `PackingCallback`.

A plugin file of the user's, because ms-swift puts a plugin's folder first in `sys.path`, where this file would
hide ms-swift itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from transformers import Trainer

from mmpack.hf.callbacks import PackingCallback
from mmpack.hf.collator import PackCollator
from mmpack.hf.model_patch import patch_model
from mmpack.hf.processor_files import ProcessorFiles
from mmpack.integrations.packed_folders import open_packs
from mmpack.integrations.replaced_names import replaced
from mmpack.packing.dataset import PackedDataset
from mmpack.store.manifest import packed_split

try:
    from swift.pipelines.train.sft import SwiftSft
    from swift.trainers import Seq2SeqTrainer
    from swift.trainers.trainer_factory import TrainerFactory
except ModuleNotFoundError as error:
    if str(error.name).partition(".")[0] != "swift":
        raise
    raise ModuleNotFoundError(
        "mmpack.integrations.swift needs ms-swift 4, which is not installed; pip install ms-swift (the package "
        "swift is something else)",
        name=error.name,
    ) from None

__all__ = ["PackedTrainer", "install", "packs"]

REPLACED = {  # what `packs` replaces -> why; tests/test_swift.py checks each
    "SwiftSft._prepare_dataset": "it loads rows, tokenizes them and makes a data set of its own",
    "TrainerFactory.TRAINER_MAPPING['causal_lm']": "ms-swift's table of trainer classes",
}
OVERRIDDEN = {  # what `PackedTrainer` replaces by transformers', extends or leaves out of ms-swift's -> why
    "get_train_dataloader": "it splits batches itself, without skipping packs when a run is resumed",
    "_prepare_inputs": "it cuts labels to the rows that it asks logits of",
    "compute_loss": "it needs logits, and weights a batch's mean by a count that synchronizes with the device",
    "_save": "it saves the model's processor, with other pixel budgets than the packs'",
    "template.register_post_encode_hook": "it embeds tokens before the model sees that a batch is packed",
}

_ENCODED = "the packs are encoded; "
_PLANNED = "packs are planned before the trainer is made"
_LOSS = "the loss is mmpack's"
_OF_ROWS = (  # options that read or tokenize rows
    "lazy_tokenize", "dataset_num_proc", "load_from_cache_file", "strict", "val_dataset_shuffle", "download_mode",
    "shuffle_buffer_size", "stopping_strategy", "disable_auto_column_mapping", "custom_dataset_info", "model_name",
    "model_author", "remove_unused_columns", "decision_drop_instructions", "decision_subsample_options",
    "decision_state_as_text", "decision_shuffle_fields",
)  # fmt: skip
_TEXT = (_ENCODED + "the tokenizer's chat template wrote their text", "pack with --template-arg")
# Options of data and templates that act, or are compared with the packs.
APPLIED = ("dataset", "val_dataset", "max_length", "template")
# Values that ms-swift gives options that the user leaves out, whose default is None.
_FILLED_IN = {
    "truncation_strategy": "delete",
    "columns": {},
    "lazy_tokenize": True,
    "use_chat_template": True,
}
_OF_THOUGHTS = "+ignore_empty_think"  # appended to `loss_scale` for hybrid thinking models
# Options that would do nothing, or not what they say: (why, what to do instead).
REFUSED_OPTIONS = {
    "packing": (_PLANNED, "leave it out"),
    "packing_length": (_PLANNED, "leave it out, or pack with --capacity"),
    "packing_num_proc": (_PLANNED, "leave it out"),
    "packing_strategy": (_PLANNED, "leave it out"),
    "padding_free": ("a pack has no padding", "leave it out"),
    "streaming": ("packs are in a folder", "leave it out"),
    "cached_dataset": ("it would be trained on instead", "pass the packed folder as --dataset"),
    "cached_val_dataset": ("it holds rows", "pass a packed folder as --val_dataset"),
    "split_dataset_ratio": ("packs are not split", "pack two sets, and pass --val_dataset"),
    "interleave_prob": (_PLANNED, "leave it out"),
    "columns": (
        _ENCODED + "fields are chosen when rows are packed",
        "name them in an entry of dataset_info.json, and pack with --dataset",
    ),
    "group_by_length": (_PLANNED, "leave it out"),
    "system": (_ENCODED + "a system prompt would not apply", "write it into the rows"),
    "truncation_strategy": (_ENCODED + "rows are cut when packed", "pack with --on-overflow"),
    "max_pixels": (_ENCODED + "images are sized when packed", "pack with --max-pixels"),
    "agent_template": (_ENCODED + "another template would not apply", "leave it out"),
    "norm_bbox": (_ENCODED + "boxes are written when rows are packed", "leave it out"),
    "response_prefix": (_ENCODED + "a prefix would not apply", "leave it out"),
    "use_chat_template": (
        _ENCODED + "they have the turns of conversations or are documents",
        "leave it out, or pack with --stage pretrain",
    ),
    "template_backend": _TEXT,
    "enable_thinking": _TEXT,
    "preserve_thinking": _TEXT,
    "add_non_thinking_prefix": _TEXT,
    "disable_ignore_empty_think": (
        "labels are the packs', where a template's empty thought has none",
        "leave it out",
    ),
    "padding_side": ("a pack has no padding", "leave it out"),
    "is_binary_loss_scale": ("labels and weights are the packs'", "leave it out"),
    "loss_scale": ("labels and weights are the packs'", "pack rows with weights"),
    "router_aux_loss_coef": (
        _LOSS + ", to which ms-swift would add the load balancing loss of a mixture of experts",
        "leave it out, or use TRL with mmpack.integrations.trl",
    ),
    "loss_type": (_LOSS, "leave it out"),
    "enable_dft_loss": (_LOSS, "leave it out, or use TRL with mmpack.integrations.trl"),
    "enable_channel_loss": (_LOSS, "leave it out; pack/loss/NAME is logged for each source"),
    "label_smoothing_factor": ("it needs the logits of every token", "leave it out"),
    "eval_metric": ("it needs the logits of every token", "leave it out"),
    "acc_strategy": ("token_acc needs logits, and is not logged", "leave it out"),
    "predict_with_generate": ("packs hold answers, too", "leave it out"),
    "use_logits_to_keep": ("only supervised tokens reach the head", "leave it out"),
    "sequence_parallel_size": (
        "the plugin does not split a pack over ranks",
        "leave it out, or use mmpack train --context-size",
    ),
    "data_seed": ("the plan determines the order of packs", "pack with --plan-seed"),
    "dataset_shuffle": ("the plan determines the order of packs", "leave it out"),
    "train_dataloader_shuffle": ("the plan determines the order of packs", "leave it out"),
    **dict.fromkeys(_OF_ROWS, ("no row is read", "leave it out")),
    "tuner_backend": ("unsloth replaces the forwards that mmpack patches", "leave it out"),
}


class PackedTrainer(Seq2SeqTrainer):
    """ms-swift's trainer on packs: its tuners, optimizers, checkpoints and logs, with transformers' loader and
    loss."""

    def __init__(self, model: Any, args: Any, template: Any, **kwargs: Any) -> None:
        args.data_seed = None  # of ms-swift's order of rows
        super().__init__(patch_model(model), args, template, **kwargs)
        self.template.register_post_encode_hook = _nothing
        self.model_accepts_loss_kwargs = True
        self.data_collator = PackCollator(model=self.model)
        self.vision = self.train_dataset.vision
        PackingCallback(self.train_dataset).attach(self)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """ms-swift's, and the processor with the budgets trained on: it saves the model's, and none of
        adapters."""
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if not (folder / "tokenizer_config.json").exists():
            self.template.processor.save_pretrained(folder)
        ProcessorFiles(folder, self.vision).save_pretrained(folder)

    def get_train_dataloader(self, skip_batches: int = 0) -> Any:
        return Trainer.get_train_dataloader(self)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return Trainer._prepare_inputs(self, inputs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return Trainer.compute_loss(self, *args, **kwargs)


@contextmanager
def packs() -> Iterator[None]:
    """ms-swift trains on packs inside; for a process that calls `sft_main` itself.

    Raises:
        ValueError: this ms-swift lacks a name of `REPLACED`.
    """
    with (
        replaced(SwiftSft, {"_prepare_dataset": lambda theirs: _packed_sets}),
        replaced(TrainerFactory, {"TRAINER_MAPPING": _with_packed_trainer}),
    ):
        yield


def _with_packed_trainer(trainers: dict[str, str]) -> dict[str, str]:
    if "causal_lm" not in trainers:
        raise ValueError(
            "TrainerFactory.TRAINER_MAPPING has no causal_lm, which mmpack replaces; use a version that "
            "docs/ms_swift.md lists"
        )
    name = f"{PackedTrainer.__module__}.{PackedTrainer.__qualname__}"
    return {**trainers, "causal_lm": name}


_for_good = ExitStack()  # its contexts last as long as the process


def install() -> None:
    """Make ms-swift train on packs from now on; for a file given to `--external_plugins`."""
    if SwiftSft._prepare_dataset is not _packed_sets:
        _for_good.enter_context(packs())


def check_arguments(args: Any, capacity: int) -> None:
    """Refuse options of `swift sft` that do not apply to packs.

    Raises:
        ValueError: names the first one.
    """
    if hasattr(args, "rlhf_type") or args.task_type != "causal_lm":
        kind = getattr(args, "rlhf_type", args.task_type)
        raise ValueError(
            f"mmpack trains swift sft and swift pt, not {kind}; leave the plugin of mmpack out"
        )
    defaults = {
        one.name: one.default if one.default_factory is MISSING else one.default_factory()
        for one in fields(args)
    }
    for name, (why, advice) in REFUSED_OPTIONS.items():
        value, default = getattr(args, name, None), defaults.get(name)
        if name == "loss_scale" and _thinks_or_not(args):
            value = str(value).removesuffix(_OF_THOUGHTS)
        if value not in (default, _FILLED_IN.get(name) if default is None else default):
            raise ValueError(f"--{name} {value} does not apply: {why}; {advice}")
    longest = args.model_info.max_model_len
    if args.max_length not in (None, longest, capacity):
        raise ValueError(
            f"--max_length {args.max_length} does not apply: the packs have up to {capacity:,} tokens; leave it "
            f"out, or pack with --capacity {args.max_length}"
        )


def _thinks_or_not(args: Any) -> bool:
    """Whether ms-swift takes the model for a hybrid thinking one, by its template."""
    meta = args.template_meta
    return meta is not None and meta.is_thinking and bool(meta.non_thinking_prefix)


def _packed_sets(self: Any) -> list[Any]:
    """In place of ms-swift's `_prepare_dataset`: [training set, set to evaluate, a dict of several, or None]."""
    args = self.args
    if len(args.dataset) != 1:
        raise ValueError(
            f"--dataset has {len(args.dataset)} values ({' '.join(args.dataset)}); with mmpack's plugin pass one "
            "folder of mmpack pack, which packs several files together"
        )
    train = _opened("--dataset", args.dataset[0], is_training=True)
    check_arguments(args, train.capacity)
    held_out = {
        Path(name).name.replace(":", "_"): _opened("--val_dataset", name, is_training=False)
        for name in args.val_dataset
    }
    if len(held_out) < len(args.val_dataset):
        raise ValueError(
            f"two folders of --val_dataset have one name ({' '.join(args.val_dataset)}); rename one"
        )
    if len(held_out) == 1:
        return [train, *held_out.values()]
    if held_out and args.metric_for_best_model == "loss":
        raise ValueError(
            "--metric_for_best_model loss is of one set, and --val_dataset has "
            f"{len(held_out)}; pass --metric_for_best_model {next(iter(held_out))}_loss"
        )
    return [train, held_out or None]


def _opened(option: str, name: str, is_training: bool) -> PackedDataset:
    if packed_split(name) is None:
        raise ValueError(
            f"{option} {name} is not a folder of mmpack pack, which mmpack's plugin needs; mmpack pack {name} "
            "--tokenizer MODEL --capacity 8192 --out packed, then pass packed"
        )
    return open_packs(name, is_training)


def _nothing(models: Any) -> None:
    """In place of a template's hook that embeds tokens."""

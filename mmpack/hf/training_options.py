"""The options of transformers' `TrainingArguments` in `mmpack train`: parsed, and refused where they do nothing.

`REFUSED` are options that training on packs ignores or decides itself, `EVALUATION` those that act with
`--eval-data`, `NEEDED` those that only act with another one. All other options act as in a script of one's own.
`tests/test_options.py` lists every field, so that a new one in transformers is noticed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments, logging

from mmpack.errors import counted
from mmpack.hf.unavailable import unavailable

_USAGE = "mmpack train --data PACKED --model FOLDER [options]; see mmpack train --help"
_NO_EVALUATION = ("there is no evaluation set", "pass --eval-data too")
_NO_METRICS = (
    "mmpack train evaluates the loss alone, in the precision of training",
    "leave it out, or evaluate in a script: Trainer(eval_dataset=PackedDataset.from_store(FOLDER), ...)",
)
_THE_LOSS = ("loss", "eval_loss")
_NO_COLUMNS = ("packs have no columns", "leave it out")
_PLANNED = (
    "the plan determines the order of packs",
    "for another one, pass --plan-seed to mmpack pack",
)

# option -> (values that are accepted because they say what happens anyway, why others do nothing, advice)
REFUSED: dict[str, tuple[tuple[Any, ...], str, str]] = {
    **dict.fromkeys(
        ("do_predict", "batch_eval_metrics", "eval_use_gather_object", "bf16_full_eval", "fp16_full_eval",
         "greater_is_better"),
        ((False,), *_NO_METRICS),
    ),
    "prediction_loss_only": ((True,), *_NO_METRICS),
    **dict.fromkeys(
        ("eval_do_concat_batches", "eval_accumulation_steps", "include_for_metrics", "label_names"),
        ((), *_NO_METRICS),
    ),
    "metric_for_best_model": (_THE_LOSS, *_NO_METRICS),
    "remove_unused_columns": ((False,), *_NO_COLUMNS),
    "length_column_name": ((), *_NO_COLUMNS),
    "train_sampling_strategy": ((), *_PLANNED),
    "data_seed": ((), *_PLANNED),
    "dataloader_in_order": (
        (True,),
        "a step's packs follow from its number, so they are not taken in the order in which workers finish",
        "leave it out",
    ),
    "dataloader_drop_last": (
        (False,),
        "empty packs fill the last batch, and nothing is dropped",
        "leave it out",
    ),
    "do_train": ((True,), "mmpack train always trains", "leave it out"),
    "logging_nan_inf_filter": (
        (False,),
        "a run ends when its loss is not finite",
        "leave it out",
    ),
    "auto_find_batch_size": (
        (False,),
        "a smaller batch would have other packs per step",
        "set --per_device_train_batch_size, or pack with a smaller --capacity",
    ),
    "label_smoothing_factor": (
        (0.0,),
        "a packed batch has logits of supervised tokens only",
        "leave it out",
    ),
}  # fmt: skip

# option -> values that are accepted without --eval-data
EVALUATION: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("do_eval", "eval_on_start", "load_best_model_at_end"), (False,)),
    **dict.fromkeys(
        ("eval_steps", "eval_delay", "per_device_eval_batch_size", "metric_for_best_model"), ()
    ),
    "eval_strategy": ("no",),
}
_EVALUATED = {"save_strategy": ("best",), "lr_scheduler_type": ("reduce_lr_on_plateau", "greedy")}
_NEVER = {"do_eval": (False,), "eval_strategy": ("no",)}  # refused with --eval-data
_TRACKERS = {"wandb", "mlflow", "comet_ml", "trackio", "swanlab"}  # that have names for runs
# (options, whether the other arguments let them act, why they do not apply)
NEEDED: list[tuple[tuple[str, ...], Callable[[TrainingArguments], bool], str]] = [
    (
        ("hub_model_id", "hub_token", "hub_strategy", "hub_always_push", "hub_revision"),
        lambda args: args.push_to_hub,
        "it needs --push_to_hub",
    ),
    (
        ("hub_private_repo",),
        lambda args: args.push_to_hub or "trackio" in args.report_to,
        "it needs --push_to_hub or --report_to trackio",
    ),
    (
        ("run_name",),
        lambda args: bool(_TRACKERS & set(args.report_to)),
        f"it needs --report_to with one of {', '.join(sorted(_TRACKERS))}",
    ),
    (
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        lambda args: "trackio" in args.report_to,
        "it needs --report_to trackio",
    ),
    (("num_train_epochs",), lambda args: args.max_steps <= 0, "--steps (--max_steps) decides"),
    (("save_steps",), lambda args: args.save_strategy == "steps", "it needs --save_strategy steps"),
    (("eval_steps",), lambda args: args.eval_strategy == "steps", "it needs --eval_strategy steps"),
    (
        ("metric_for_best_model",),
        lambda args: (
            args.load_best_model_at_end
            or args.save_strategy == "best"
            or args.lr_scheduler_type in _EVALUATED["lr_scheduler_type"]
        ),
        "it needs --load_best_model_at_end or --save_strategy best",
    ),
    (
        ("logging_steps",),
        lambda args: args.logging_strategy == "steps",
        "it needs --logging_strategy steps",
    ),
    (
        ("save_total_limit", "save_only_model", "save_on_each_node", "push_to_hub"),
        lambda args: args.save_strategy != "no",
        "--save_strategy no saves nothing",
    ),
    (
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        lambda args: bool(args.gradient_checkpointing),
        "it needs --gradient_checkpointing",
    ),
    (
        ("optim_target_modules",),
        lambda args: args.optim.value.startswith(("galore", "apollo")),
        "it needs --optim galore_adamw, apollo_adamw or one like them",
    ),
    (
        ("ignore_data_skip", "restore_callback_states_from_checkpoint"),
        lambda args: args.resume_from_checkpoint is not None,
        "it needs --resume_from_checkpoint",
    ),
]


def argument_names() -> list[str]:
    """The names of all options of `TrainingArguments`."""
    return [one.name for one in dataclasses.fields(TrainingArguments)]


def parse_training_arguments(
    options: Sequence[str],
    quiet: bool = False,
    evaluates: bool = False,
    *,
    sets: Sequence[str] = (),
    stops_early: bool = False,
    own: Sequence[str] = (),
) -> TrainingArguments:
    """`TrainingArguments` from command line options.

    The default batch is one pack, because a pack is already a full batch. `quiet`: without progress bars.
    `evaluates`: there is an evaluation set; `sets`: the names of several. By default it is evaluated when
    checkpoints are saved, if --save_strategy says when, and else after every epoch; the best model can only be
    kept if both agree, so --load_best_model_at_end also saves when it evaluates. `stops_early`: the run ends when
    the loss of an evaluation no longer falls; then it also keeps the best model, if it saves any. `own`: options
    of `mmpack train` itself, for the error on a misspelt one.

    Raises:
        ValueError: an option would do nothing, contradicts another one, or needs a package that is not installed.
        SystemExit: an option is unknown or malformed.
    """
    names = argument_names()
    parser = HfArgumentParser(
        TrainingArguments, prog="mmpack train", usage=_USAGE, allow_abbrev=False
    )
    not_given = argparse.Namespace(
        **dict.fromkeys(names, dataclasses.MISSING)
    )  # instead of defaults
    namespace, unknown = parser.parse_known_args(list(options), not_given)
    if unknown:
        known = {f"--{name}": f"--{name}" for name in names}
        known |= {name.replace("-", "_").replace("__", "--", 1): name for name in own}
        word = unknown[0].partition("=")[0].replace("-", "_").replace("__", "--", 1)
        close = get_close_matches(word, known, 1)
        guess = f"; did you mean {known[close[0]]}?" if close else ""
        parser.error(f"{unknown[0]} is not an option of mmpack train or TrainingArguments{guess}")
    words = Counter(
        word.partition("=")[0].replace("-", "_") for word in options if word[:2] == "--"
    )
    for word in [word for word, times in words.items() if times > 1]:
        short = " (--steps is short for it)" if word == "__max_steps" else ""
        parser.error(f"--{word[2:]} is given twice{short}; pass it once")
    given = {n: v for n, v in vars(namespace).items() if v is not dataclasses.MISSING}
    _refuse(given, evaluates, sets)
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "logging_steps": 1,
        "report_to": "none",
        "output_dir": "mmpack-output",
        # without an accelerator, torch warns that it cannot pin
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "disable_tqdm": quiet or not sys.stderr.isatty(),
    }
    if evaluates:
        saves = given.get("save_strategy")
        evaluated = given.get("eval_strategy", saves if saves in ("steps", "epoch") else "epoch")
        defaults |= {"eval_strategy": evaluated, "per_device_eval_batch_size": 1}
        if evaluated == "steps":  # instead of Trainer's default, logging_steps
            defaults["eval_steps"] = given.get("save_steps", TrainingArguments.save_steps)
        if stops_early:
            defaults["load_best_model_at_end"] = given.get("save_strategy") != "no"
            defaults["metric_for_best_model"] = "loss"
        if {**defaults, **given}.get("load_best_model_at_end"):
            defaults |= {"save_strategy": evaluated, "save_steps": given.get("eval_steps", 500)}
    if given.get("deepspeed") is not None:
        _require("--deepspeed", "deepspeed")
    with unavailable():
        try:
            args = TrainingArguments(**{**defaults, **given})
        except ValueError as error:
            if "ddp_backend" not in given or "process group" not in str(error):
                raise
            raise ValueError(
                f"--ddp_backend {given['ddp_backend']} does not apply: there is one process; start several with "
                "torchrun --nproc_per_node N -m mmpack train ..., or leave it out"
            ) from error
    if sets and args.metric_for_best_model in _THE_LOSS:
        named = " or ".join(f"eval_{name}_loss" for name in sets)
        raise ValueError(
            "the best model is the one with the smallest loss of one set, and --eval-data has "
            f"{counted(len(sets), 'named set')}; pass --metric_for_best_model {named}"
        )
    _require_packages(args)
    for group, acts, why in NEEDED:
        for name in group:
            if name == "metric_for_best_model" and stops_early:
                continue
            if given.get(name) not in (None, False) and not acts(args):
                raise ValueError(
                    f"--{name} does not apply: {why}; leave one of them out, or pass both"
                )
    if args.disable_tqdm:
        logging.disable_progress_bar()  # those of loading and saving weights
    return args


def _refuse(given: dict[str, Any], evaluates: bool, sets: Sequence[str]) -> None:
    """
    Raises:
        ValueError: an option was passed that does nothing.
    """
    for name, value in given.items():
        accepted, why, advice = REFUSED.get(name, ((value,), "", ""))
        if name == "metric_for_best_model":
            accepted = (*accepted, *(f"eval_{one}_loss" for one in sets))
        if value not in accepted:
            raise ValueError(f"--{name} {value} does not apply: {why}; {advice}")
        why, advice = _NO_EVALUATION
        if not evaluates and (
            value in _EVALUATED.get(name, ()) or value not in EVALUATION.get(name, (value,))
        ):
            raise ValueError(f"--{name} {value} does not apply: {why}; {advice}")
        if evaluates and value in _NEVER.get(name, ()):
            raise ValueError(
                f"--{name} {value} does not apply: --eval-data would never be evaluated; leave one of them out"
            )


def _require_packages(args: TrainingArguments) -> None:
    """Look for the packages of common options before anything is loaded; transformers looks for others when it
    trains (`mmpack.hf.unavailable`).

    Raises:
        ValueError: one of them is not installed.
    """
    for name in args.report_to:
        if name in {*_TRACKERS, "neptune", "dagshub"} or (
            name == "tensorboard" and find_spec("tensorboardX") is None
        ):
            _require(f"--report_to {name}", name)
    optimizer = str(args.optim.value)
    if "torch" not in optimizer and any(
        part in optimizer for part in ("8bit", "32bit", "bnb", "ademamix")
    ):
        _require(f"--optim {optimizer}", "bitsandbytes")
    if args.use_liger_kernel:
        _require("--use_liger_kernel", "liger_kernel")


def _require(option: str, module: str) -> None:
    spec = find_spec(module)
    if spec is None or spec.origin is None:  # a folder of this name, as wandb makes for its runs
        package = module.replace("_", "-")
        raise ValueError(f"{option} needs {package}, which is not installed; pip install {package}")

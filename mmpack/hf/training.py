"""Training for `mmpack train`: a stock Trainer on packs, with readable errors."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from mmpack.hf.callbacks import PackingCallback
from mmpack.hf.checkpoints import FinishedError, check_checkpoint
from mmpack.hf.collator import PackCollator
from mmpack.hf.fit import check_fit
from mmpack.hf.model_parts import inner_model
from mmpack.hf.processor_files import ProcessorFiles
from mmpack.hf.unavailable import unavailable
from mmpack.packing.dataset import PackedDataset
from mmpack.packing.loss_weights import LossReduction


class _BarLines(ProgressCallback):
    """Trainer's progress bar, with one line per log; reporters and `log_history` get all values."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and logs:  # only the first rank has a bar
            self.training_bar.write(log_line(state.global_step, state.max_steps, logs))


class _Lines(PrinterCallback):
    """One line per log, without a progress bar."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            print(log_line(state.global_step, state.max_steps, logs), flush=True)


class _EarlyStopping(EarlyStoppingCallback):
    """Ends a run whose evaluations no longer improve; a resumed run continues the count."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The state of a run that began without the option has no entry, and Trainer's saving needs one.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step and isinstance(saved, dict):
            self.early_stopping_patience_counter = saved["attributes"][
                "early_stopping_patience_counter"
            ]

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        name = str(args.metric_for_best_model)
        name = name if name.startswith("eval_") else f"eval_{name}"
        if metrics and name in metrics:  # else another set's
            super().on_evaluate(args, state, control, metrics, **kwargs)


def log_line(step: int, steps: int, logs: dict[str, Any]) -> str:
    """Trainer's log as one line. For a step: loss, gradient norm, learning rate, tokens/s, utilization, MFU, and
    the losses of up to 4 sources; for other logs, all values except times and rates."""
    line = [f"step {step:,}/{steps:,}"]
    if "loss" not in logs:
        hidden = ("runtime", "per_second", "epoch", "total_flos")
        line += [f"{n} {v:.4g}" for n, v in logs.items() if not n.endswith(hidden)]
        return "  ".join(line)
    for name, words in (
        ("loss", "loss {:.4g}"),
        ("grad_norm", "grad_norm {:.3g}"),
        ("learning_rate", "lr {:.3g}"),
        ("pack/tokens_per_second", "{:,.0f} tokens/s"),
        ("pack/utilization", "{:.0%} full"),
        ("pack/mfu", "MFU {:.0%}"),
    ):
        if name in logs:
            line.append(words.format(logs[name]))
    parts = [(name, loss) for name, loss in logs.items() if name.startswith("pack/loss/")]
    line += [f"{name.removeprefix('pack/loss/')} {loss:.4g}" for name, loss in parts[:4]]
    return "  ".join(line)


def _machine_failure(error: Exception, args: TrainingArguments) -> str | None:
    """The cause of an error of the machine and what to do; None for other errors. torch reports a full disk as a
    position in a file, so the disk is checked here."""
    if "DataLoader worker" in str(error):
        return (
            f"{str(error).strip(' .')}. The machine or /dev/shm is probably out of memory; lower "
            "dataloader_num_workers"
        )
    folder = Path(args.output_dir or ".")
    if folder.is_dir() and shutil.disk_usage(folder).free < 2**20:
        return (
            f"the disk of {folder} is full; free space (save_total_limit keeps fewer checkpoints)"
        )
    return None


def train(
    model: nn.Module,
    dataset: PackedDataset,
    args: TrainingArguments,
    loss_reduction: LossReduction = "token",
    *,
    eval_dataset: PackedDataset | dict[str, PackedDataset] | None = None,
    patience: int | None = None,
    processor: ProcessorFiles | None = None,
) -> dict[str, Any]:
    """Train a patched model on the packs in a stock Trainer and save it. `args.resume_from_checkpoint` is a folder
    to resume from; `loss_reduction` as in `PackCollator`. `patience`: end after this many evaluations in a row
    that are no better than the best. `processor` is saved with the model.

    Returns:
        `steps`, `first_loss`, `last_loss`, `seconds`; with an evaluation set `eval_loss`, the last one (of several
        sets a dict by name), and `best_checkpoint`, the folder of the best model, or None where no best model is
        kept.

    Raises:
        ValueError: the data was encoded for another model; the folder is not a complete checkpoint, or belongs to
            another run; a DataLoader worker was killed; the disk is full.
    """
    sets = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    for data in (dataset, *sets.values()):
        if data is not None:
            check_fit(inner_model(model), data)
    with unavailable():
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            data_collator=PackCollator(model=model, loss_reduction=loss_reduction),
            processing_class=processor,  # only saved
        )
    for theirs, ours in ((ProgressCallback, _BarLines), (PrinterCallback, _Lines)):
        if trainer.pop_callback(theirs) is not None:
            trainer.add_callback(ours)
    if patience is not None:
        trainer.add_callback(_EarlyStopping(patience))
    PackingCallback(dataset).attach(trainer)
    if args.resume_from_checkpoint is not None:
        check_checkpoint(args.resume_from_checkpoint)
    start = time.perf_counter()
    try:
        with (
            unavailable(),
            contextlib.suppress(FinishedError),
        ):  # the weights are loaded, and saved below
            trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        seconds = time.perf_counter() - start
        if args.save_strategy != "no":
            trainer.save_model()
    except ValueError as error:
        last = str(error).strip().rpartition("\n")[2]
        if "Original Traceback" not in str(error):  # not from a DataLoader worker
            raise
        raise ValueError(last.partition(": ")[2]) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = _machine_failure(error, args)
        if reason is None:
            raise
        raise ValueError(f"{reason}; then pass --resume_from_checkpoint last") from error
    return _figures(trainer, seconds, None if eval_dataset is None else list(sets))


def _figures(trainer: Trainer, seconds: float, sets: list[str] | None) -> dict[str, Any]:
    """What `train` returns; `sets`: the names of the evaluation sets."""
    log = trainer.state.log_history
    losses = [entry["loss"] for entry in log if "loss" in entry]
    result = {
        "steps": trainer.state.global_step,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "seconds": round(seconds, 3),
    }
    if sets is not None:
        names = {one: f"eval_{one}_loss" if one else "eval_loss" for one in sets}
        found = {
            one: next((entry[name] for entry in reversed(log) if name in entry), None)
            for one, name in names.items()
        }
        result["eval_loss"] = found.get("", found)
        result["best_checkpoint"] = trainer.state.best_model_checkpoint
    return result

"""What `mmpack train` runs: a stock Trainer on packs, and what its errors mean."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments

from mmpack.hf.callbacks import PackingCallback
from mmpack.hf.checkpoints import FinishedError, check_checkpoint
from mmpack.hf.collator import PackCollator
from mmpack.hf.fit import check_fit
from mmpack.hf.model_parts import inner_model
from mmpack.hf.model_patch import patch_model
from mmpack.packing.dataset import PackedDataset

_USAGE = "mmpack train --data PACKED --model FOLDER [options]; see mmpack train --help"


def parse_training_arguments(options: Sequence[str]) -> TrainingArguments:
    """`TrainingArguments` from command line options; every option of transformers works.

    One pack a step is the default, as a pack is a full batch already.
    """
    defaults = ["--per_device_train_batch_size", "1", "--logging_steps", "1", "--report_to", "none"]
    defaults += ["--output_dir", "mmpack-output"]
    parser = HfArgumentParser(
        TrainingArguments, prog="mmpack train", usage=_USAGE, allow_abbrev=False
    )
    args, unknown = parser.parse_args_into_dataclasses(
        [*defaults, *options], return_remaining_strings=True
    )
    if unknown:
        known = [f"--{field.name}" for field in dataclasses.fields(TrainingArguments)]
        close = get_close_matches(unknown[0].split("=")[0], known, 1)
        guess = f"; did you mean {close[0]}?" if close else ""
        parser.error(f"{unknown[0]} is no option of it or of TrainingArguments{guess}")
    return args


def _machine_failure(error: Exception, args: TrainingArguments) -> str | None:
    """What to do about an error that is the machine's, None for others. torch names a full disk by a
    position in a file, so the disk is asked."""
    if "DataLoader worker" in str(error):
        return (
            f"{str(error).strip(' .')}. Most often memory is short, the machine's or /dev/shm's: fewer "
            "dataloader_num_workers need less"
        )
    folder = Path(args.output_dir or ".")
    if folder.is_dir() and shutil.disk_usage(folder).free < 2**20:
        return f"the disk of {folder} is full; make room (save_total_limit keeps fewer checkpoints)"
    return None


def train(model: nn.Module, dataset: PackedDataset, args: TrainingArguments) -> dict[str, Any]:
    """Patch the model, train it on the packs in a stock Trainer and save it. `resume_from_checkpoint` of
    the arguments is a folder that training continues from.

    Returns:
        `steps`, `first_loss`, `last_loss`, `seconds`.

    Raises:
        ValueError: the model is not the data's; the folder is no complete checkpoint, or of another run; a
            DataLoader worker was killed; the disk is full.
    """
    check_fit(inner_model(model), dataset)
    patch_model(model)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=PackCollator(model=model),
    )
    PackingCallback(dataset).attach(trainer)
    if args.resume_from_checkpoint is not None:
        check_checkpoint(args.resume_from_checkpoint)
    start = time.perf_counter()
    try:
        with contextlib.suppress(FinishedError):  # its weights are loaded, and saved below
            trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        seconds = time.perf_counter() - start
        if args.save_strategy != "no":
            trainer.save_model()
    except ValueError as error:
        last = str(error).strip().rpartition("\n")[2]
        if "Original Traceback" not in str(error):  # of a DataLoader worker
            raise
        raise ValueError(last.partition(": ")[2]) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = _machine_failure(error, args)
        if reason is None:
            raise
        raise ValueError(f"{reason}; then --resume_from_checkpoint last continues") from error
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "seconds": round(seconds, 3),
    }

"""A checkpoint's files: which belong to it, and whether all of them are complete.

After all ranks have written their files, rank 0 writes `mmpack_files.json`, with all names and sizes. A checkpoint
without it (saved without `PackingCallback`, or interrupted just before) is checked part by part: weights,
optimizer, scheduler, random states and a stream's state, whose formats show truncation.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from mmpack.hf.compat import TRAINER_STATE_NAME
from mmpack.hf.gather import gathered

KEY = "mmpack"  # in `TrainerState.stateful_callbacks`, which is saved in trainer_state.json
STREAM_FILE = "mmpack_stream_{rank}.json"  # a rank's position in its stream
LIST = "mmpack_files.json"
_WEIGHTS = (  # of transformers, PEFT, FSDP and DeepSpeed
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "*/adapter_model.safetensors",
    "pytorch_model_fsdp.bin",
    "pytorch_model_fsdp_*/.metadata",
    "global_step*/*",
)
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_*/.metadata", "global_step*/*")


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint folder of the current step, which need not exist."""
    assert args.output_dir is not None
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def begin_writing(folder: Path) -> None:
    """Remove the markers of completeness from a checkpoint of an earlier run, which is now overwritten."""
    for name in (LIST, TRAINER_STATE_NAME):
        (folder / name).unlink(missing_ok=True)


def write_list(folder: Path, is_writer: bool) -> None:
    """List a checkpoint's files after every rank has written its own. A collective: all ranks call it.

    Every rank reports all files it sees, because on a network file system others may not see them yet.
    """
    ranks = gathered(_sizes(folder))
    if not is_writer:
        return
    every: dict[str, int] = {}
    for seen in ranks:
        every |= {name: max(size, every.get(name, 0)) for name, size in seen.items()}
    written = folder / f"{LIST}.tmp"
    with open(written, "w", encoding="utf-8") as file:
        json.dump({"files": dict(sorted(every.items()))}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    written.replace(folder / LIST)


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in files
        if path.name not in (LIST, f"{LIST}.tmp")
    }


def lacking(folder: Path, ignored: str = "") -> str | None:
    """Why a checkpoint cannot be resumed, in words; None: it is complete. The file `ignored` may be missing."""
    try:
        state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:  # a rank writes it last
        return f"{TRAINER_STATE_NAME} is missing, saving was interrupted"
    except (OSError, ValueError):
        return f"{TRAINER_STATE_NAME} is truncated, saving was interrupted"
    return _wrong_size(folder, ignored) or _missing_part(folder, state, ignored)


def _wrong_size(folder: Path, ignored: str) -> str | None:
    try:
        files = json.loads((folder / LIST).read_text(encoding="utf-8"))["files"]
        files = {str(name): int(size) for name, size in files.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{LIST} is damaged"
    for name, size in files.items():
        if name in (TRAINER_STATE_NAME, ignored):
            continue
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found:,} bytes, but {size:,} were written"
    return None


def _missing_part(folder: Path, state: dict[str, Any], ignored: str) -> str | None:
    record = (state.get("stateful_callbacks") or {}).get(KEY, {})
    ranks = record.get("ranks", 1)
    names = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    if not any(folder.glob("global_step*")):  # DeepSpeed's holds the scheduler
        names.append("scheduler.pt")
    names += [name for name in ("optimizer.pt", "optimizer.bin") if (folder / name).exists()]
    for name in names:
        if not zipfile.is_zipfile(folder / name):
            return f"{name} is missing or truncated"
    if record.get("is a stream"):
        for name in (STREAM_FILE.format(rank=rank) for rank in range(ranks)):
            if name != ignored and not (folder / name).is_file():
                return f"{name} is missing"
    for part, patterns in (("optimizer.pt", _OPTIMIZERS), ("model.safetensors", _WEIGHTS)):
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            return f"{part} is missing"
    try:
        shards = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        for name in set(shards["weight_map"].values()):
            if not (folder / name).is_file():
                return f"{name} is missing"
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, AttributeError):
        return "model.safetensors.index.json is damaged"
    for path in sorted(folder.glob("*.safetensors")):
        if not _is_whole(path):
            return f"{path.name} is truncated"
    return None


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        ends = [
            entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
        ]
        return path.stat().st_size == 8 + length + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        return False

"""Faults of `mmpack train`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.faults.command import mmpack, pack, reason
from mmpack.hf import last_checkpoint


def train(data: Path, *arguments: object) -> list[object]:
    """Options of a short run: a checkpoint every 2 of 6 steps."""
    config = [
        "--data",
        data / "packed",
        "--config",
        data / "config.json",
        "--output_dir",
        data / "run",
    ]
    steps = ["--steps", 6, "--save_strategy", "steps", "--save_steps", 2]
    return ["train", *config, *steps, "--use_cpu", "--disable_tqdm", "True", *arguments]


def losses(data: Path) -> list[tuple[int, float]]:
    """(step, loss) of each step, from the last checkpoint."""
    state = json.loads((data / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    return [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]


def resumed_exactly(data: Path) -> str:
    """Continue the run; its losses must equal those of an uninterrupted run."""
    done = mmpack(*train(data, "--resume_from_checkpoint", "last"))
    assert done.returncode == 0, done.stderr[-2000:]
    found, where = losses(data), next(w for w in done.stderr.splitlines() if "continuing" in w)
    shutil.move(data / "run", data / "stopped")
    done = mmpack(*train(data))
    assert done.returncode == 0, done.stderr[-2000:]
    assert found == losses(data), (found, losses(data))
    place = Path(where.split()[-1]).name if "checkpoint-" in where else "the start"
    return f"continued from {place}, all losses equal to the last bit"


@contextmanager
def running(data: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Start a run in the background and wait for its checkpoint-2."""
    command = [sys.executable, "-m", "mmpack", *map(str, train(data, *arguments))]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        try:
            while not (data / "run" / "checkpoint-2" / "trainer_state.json").exists():
                assert process.poll() is None, process.stderr.read()[-2000:]
                time.sleep(0.002)
            yield process
        finally:
            process.kill()


def kill_training(data: Path) -> str:
    """`kill -9` of `mmpack train` between checkpoints"""
    with running(data):
        time.sleep(0.3)
    return resumed_exactly(data)


def kill_saving(data: Path) -> str:
    """`kill -9` of `mmpack train` while it saves a checkpoint"""
    with running(data):
        while not (data / "run" / "checkpoint-4").exists():
            time.sleep(0.0005)
    assert not (data / "run" / "checkpoint-4" / "trainer_state.json").exists()
    return "torn checkpoint-4 passed over with a warning, " + resumed_exactly(data)


def kill_worker(data: Path) -> str:
    """`kill -9` of a DataLoader worker"""
    with running(data, "--dataloader_num_workers", 2) as process:
        workers = psutil.Process(process.pid).children()
        max(workers, key=lambda worker: worker.create_time()).kill()
        error = process.stderr.read()
        process.wait()
    observed = reason(subprocess.CompletedProcess([], process.returncode, "", error))
    return f"`{observed}`; then {resumed_exactly(data)}"


def unreadable_image(data: Path) -> str:
    """An image cut in half after packing, read while training"""
    pack(data)  # in this folder, where the images are then cut
    for image in sorted((data / "charts").iterdir()):
        image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    observed = reason(mmpack(*train(data)))
    in_worker = reason(mmpack(*train(data, "--dataloader_num_workers", 2)))
    assert ": image " in observed and ": image " in in_worker, in_worker
    return f"`{observed.replace(str(data), '...')}`, also from a worker"


def full_disk(data: Path) -> str:
    """The disk is full while a checkpoint is saved"""
    full = data / "run"
    full.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=18m", "tmpfs", str(full)]
    if subprocess.run(mount, capture_output=True).returncode:
        return "not observed: mounting a small file system needs root"
    try:
        observed = reason(mmpack(*train(data)))
        shutil.copytree(full, data / "kept")
    finally:
        subprocess.run(["umount", str(full)], check=True)
    full.rmdir()
    shutil.move(data / "kept", full)
    return f"`{observed.replace(str(data), '...')}`; then {resumed_exactly(data)}"


def diverged(data: Path) -> str:
    """A learning rate that makes all weights diverge, and a log every 100 steps"""
    rates = ["--learning_rate", 1e30, "--max_grad_norm", 0, "--logging_steps", 100]
    observed = reason(mmpack(*train(data, *rates)))
    assert "training has diverged" in observed and "train.json" in observed, observed
    assert not list((data / "run").rglob("*.safetensors")), "weights were saved"
    return f"`{observed.replace(str(data), '...')}`; nothing was saved"


def torn_checkpoint(data: Path) -> str:
    """A checkpoint with one file, or a file's last byte, missing: each file in turn"""
    done = mmpack(*train(data))
    assert done.returncode == 0, done.stderr[-2000:]
    whole, kept = data / "run" / "checkpoint-6", data / "kept"
    whole.rename(kept)
    names = json.loads((kept / "mmpack_files.json").read_text())["files"]
    for name in names:
        for is_cut in (True, False):
            shutil.copytree(kept, whole)
            if is_cut:
                os.truncate(whole / name, (whole / name).stat().st_size - 1)
            else:
                (whole / name).unlink()
            newest = last_checkpoint(data / "run")
            is_json = name == "trainer_state.json" and is_cut  # its last byte is only a newline
            assert newest == str(whole if is_json else data / "run" / "checkpoint-4"), (
                name,
                newest,
            )
            shutil.rmtree(whole)
    shutil.copytree(kept, whole)
    (whole / "optimizer.pt").unlink()
    observed = reason(mmpack(*train(data, "--resume_from_checkpoint", whole)))
    observed = observed.replace(str(data), "...")
    return f"each of {len(names)} files is noticed; if named explicitly: `{observed}`; {resumed_exactly(data)}"


def unknown_id(data: Path) -> str:
    """A token id beyond the model's embedding table"""
    config = json.loads((data / "config.json").read_text())
    largest = json.loads((data / "packed" / "mmpack.json").read_text())["id_range"][1]
    config["text_config"]["vocab_size"] = largest
    (data / "config.json").write_text(json.dumps(config))
    observed = reason(mmpack(*train(data)))
    assert f"has token id {largest}, but the model's embedding has {largest} rows" in observed, (
        observed
    )
    return f"`{observed.replace(str(data), '...')}`"


TRAINING = [
    kill_training,
    kill_saving,
    kill_worker,
    unreadable_image,
    full_disk,
    diverged,
    torn_checkpoint,
    unknown_id,
]

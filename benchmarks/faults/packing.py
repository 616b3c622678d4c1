"""Faults of `mmpack pack` and of packed folders."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.faults.command import mmpack, reason


def pack_killed_anywhere(data: Path) -> str:
    """SIGKILL of `mmpack pack` at 8 moments from its first file to its last, then the same command."""
    command = pack_command(data, many_rows(data))
    times = []
    for wait in [None, *(n / 7 for n in range(8))]:
        out = data / f"out{wait}"
        with subprocess.Popen(
            [*command, out], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        ) as run:
            while run.poll() is None and not list(data.glob(f"{out.name}*")):
                time.sleep(0.005)
            begin = time.monotonic()
            if wait is not None:
                time.sleep(wait * times[0])
                run.kill()
        times.append(time.monotonic() - begin)
        if wait is None:
            whole = contents(out)
            assert run.returncode == 0
            continue
        was_whole = (out / "mmpack.json").exists()
        assert was_whole or not out.exists(), "an incomplete store is at --out"
        done = subprocess.run([*command, out], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert contents(out) == whole, "the store differs from one built without the kill"
        assert not list(data.glob("*.partial-*")), "left-overs"
    return "every time a store equal to the byte, and no leftovers"


def waiting_for_a_killed_builder(data: Path) -> str:
    """SIGKILL of the building one of two `mmpack pack`, while the other waits."""
    command = [*pack_command(data, many_rows(data)), data / "out"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as first:
        while not list(data.glob("out.partial-*")):
            time.sleep(0.005)
        first.send_signal(signal.SIGSTOP)
        pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
        with subprocess.Popen(command, text=True, **pipes) as second:
            assert second.stderr is not None
            said = second.stderr.readline()
            first.kill()
            said += second.stderr.read()
    assert second.returncode == 0, said
    assert f"waiting for process {first.pid} on" in said, said
    assert f"removing the unfinished build of process {first.pid} on" in said, said
    return "the other names the process it waits for, removes its leftovers, and builds"


def full_disk(data: Path) -> str:
    """A full disk under `mmpack pack` (no file may grow beyond 100 kB: RLIMIT_FSIZE)."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [*pack_command(data, many_rows(data)), data / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert not list(data.glob("out*"))
    return f"`{without_paths(reason(done), data)}`"


def flipped_byte(data: Path) -> str:
    """One flipped bit in the middle of `samples.arrow`, then training on all of it."""
    path = data / "packed" / "samples.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 1
    path.write_bytes(content)
    said = reason(train_epoch(data))
    done = mmpack(*pack_command(data, data / "train.json")[3:], data / "packed", "--overwrite")
    assert done.returncode == 0 and "encoding anew" in done.stdout, done.stderr
    return f"`{without_paths(said, data)}`; `mmpack pack --overwrite` fixes it"


def flipped_byte_of_the_plan(data: Path) -> str:
    """One flipped bit in `plan.sample_index.npy`."""
    path = data / "packed" / "plan.sample_index.npy"
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    return f"`{without_paths(reason(train_epoch(data)), data)}`"


def torn_store(data: Path) -> str:
    """An incomplete copy of a store: the end of `samples.arrow` is missing."""
    os.truncate(data / "packed" / "samples.arrow", 10_000)
    return f"`{without_paths(reason(train_epoch(data)), data)}`"


def foreign_folder(data: Path) -> str:
    """`mmpack pack --overwrite` onto a folder with other files."""
    (data / "packed" / "thesis.tex").write_text("precious")
    command = [*pack_command(data, data / "train.json"), data / "packed", "--overwrite"]
    said = reason(mmpack(*command[3:], "--mask-history"))
    assert (data / "packed" / "thesis.tex").read_text() == "precious"
    return f"`{without_paths(said, data)}`"


def changed_data(data: Path) -> str:
    """A row of train.json changed after packing, with the same length."""
    done = mmpack(*pack_command(data, data / "train.json")[3:], data / "out")
    assert done.returncode == 0, done.stderr
    path = data / "train.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"chart", b"chirt", 1))
    done = mmpack("train", "--data", data / "out", "--config", data / "config.json")
    return f"`{without_paths(reason(done), data)}`"


def fifo_for_data(data: Path) -> str:
    """A FIFO in place of the data file that a store was packed from."""
    done = mmpack(*pack_command(data, data / "train.json")[3:], data / "out")
    assert done.returncode == 0, done.stderr
    (data / "train.json").unlink()
    os.mkfifo(data / "train.json")
    done = mmpack("train", "--data", data / "out", "--config", data / "config.json")
    return f"`{without_paths(reason(done), data)}`"


def changed_image(data: Path) -> str:
    """An image replaced after packing by one of another size."""
    from PIL import Image

    done = mmpack(*pack_command(data, data / "train.json")[3:], data / "out")
    assert done.returncode == 0, done.stderr
    first = next(path for path in sorted(data.rglob("*.png")))
    Image.new("RGB", (900, 40)).save(first)
    done = train_epoch(data, "out")
    return f"`{without_paths(reason(done), data)}`"


def pack_command(data: Path, rows: Path) -> list[Any]:
    """A `mmpack pack` command without the value of --out."""
    command = [sys.executable, "-m", "mmpack", "pack", rows, "--tokenizer", data / "tokenizer"]
    return [*command, "--capacity", "2048", "--out"]


def many_rows(data: Path) -> Path:
    """The rows repeated twenty times, so that packing takes a while."""
    rows = json.loads((data / "train.json").read_text(encoding="utf-8"))
    (data / "many.json").write_text(json.dumps(20 * rows), encoding="utf-8")
    return data / "many.json"


def contents(store: Path) -> dict[str, bytes]:
    """All files of a store except mmpack.json, which holds the time."""
    return {path.name: path.read_bytes() for path in store.iterdir() if path.name != "mmpack.json"}


def train_epoch(data: Path, store: str = "packed") -> subprocess.CompletedProcess[str]:
    options = ["--output_dir", data / "run", "--num_train_epochs", 1, "--save_strategy", "no"]
    options += ["--disable_tqdm", True]
    return mmpack("train", "--data", data / store, "--config", data / "config.json", *options)


def without_paths(text: str, data: Path) -> str:
    return text.replace(f"{data.resolve()}/", "").replace(f"{data}/", "")


PACKING = [
    pack_killed_anywhere,
    waiting_for_a_killed_builder,
    full_disk,
    flipped_byte,
    flipped_byte_of_the_plan,
    torn_store,
    foreign_folder,
    changed_data,
    fifo_for_data,
    changed_image,
]

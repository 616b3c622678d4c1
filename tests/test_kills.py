"""Training killed with SIGKILL at random moments, saving included, and continued: losses and samples are
those of the run nobody killed.

Runs are processes that a server forks (ranks.py), so that each begins within milliseconds; what runs in them is
the command line, for a stream, which it has none for, a script.
"""

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import QUIET, SMALL_SPEC, encoded, tiny_config, tiny_model
from PIL import Image
from ranks import Forked
from tar_files import chat, picture, write_tar
from transformers import Trainer, TrainingArguments

from mmpack import Encoder, PackedDataset, PackStream, Skip
from mmpack.cli import main as cli
from mmpack.cli.demo import _tokenizer
from mmpack.hf import PackCollator, PackingCallback, last_checkpoint, model_patch, patch_model
from mmpack.store.encoded_store import write_store
from mmpack.store.plan_file import save_plan
from mmpack.types import ImageRef

SPEC = replace(SMALL_SPEC, max_pixels=28 * 28 * 16)
SPECIAL = ("image_pad", "video_pad", "vision_start", "vision_end")
SPECIAL_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
STEPS, EVERY = 16, 3  # a step and a save take about as long; an epoch is 9 packs
OPTIONS = {
    "max_steps": STEPS,
    "save_steps": EVERY,
    "learning_rate": 1e-2,
    "neftune_noise_alpha": 5.0,
}


def samples_of(folder, count=24):
    """Text, and in every third sample an image. The second token is the sample's number."""
    Image.fromarray(np.arange(56 * 84 * 3, dtype=np.uint8).reshape(56, 84, 3)).save(
        folder / "a.png"
    )
    image = ImageRef(str(folder / "a.png"), size=(56, 84))
    samples = []
    for number in range(count):
        text = [2] * (4 + 5 * number % 13)
        if number % 3:
            sample = encoded(SPEC, 1, number + 3, text)
        else:
            sample = replace(encoded(SPEC, 1, number + 3, (4, 6), text), media=(image,))
        samples.append(replace(sample, source="rows.json", row=number))
    return samples


def more_samples():
    return [encoded(SPEC, 3, n + 3, [2] * (3 + 7 * n % 11)) for n in range(10)]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder as `mmpack pack` leaves one, and a model's config beside it."""
    folder = tmp_path_factory.mktemp("data")
    samples = samples_of(folder)
    write_store(folder / "packed", iter(samples), SPEC)
    save_plan(PackedDataset.from_samples(samples, 40).plan, folder / "packed")
    PackedDataset.from_samples(more_samples(), 40).save(folder / "more")
    write_shards(folder / "shards")
    tiny_config(100, vision=SPEC).save_pretrained(folder)
    return folder


def write_shards(folder):
    """3 tar files of 11 samples with 0 to 2 images; one is bad, and the last file is cut off."""
    folder.mkdir()
    for shard in range(3):
        members = []
        for number in range(11 * shard, 11 * shard + 11):
            images = [picture(number + n, size=(28, 56)) for n in range(number % 3)]
            members += [(f"{number}.{n}.png", image) for n, image in enumerate(images)]
            row = chat("<image>" * len(images) + "w" * (number % 5), "a" * (1 + number % 4))
            members.append((f"{number}.json", b"{" if number == 15 else row))
        write_tar(folder / f"train-{shard:03d}.tar", members)
    last = folder / "train-002.tar"
    last.write_bytes(last.read_bytes()[:30_000])


def recorded(patch, path):
    """`patch_model` of a model that records its training batches, one line each."""

    def patched(model, *args, **options):
        def note(model, args, kwargs):
            if "mmpack" in kwargs:
                with open(path, "a") as file:
                    file.write(json.dumps(kwargs["input_ids"][0].tolist()) + "\n")

        patch(model, *args, **options).register_forward_pre_hook(note, with_kwargs=True)
        return model

    return patched


def train_packs(folder, data, seen, mix=()):
    folder, data = Path(folder), Path(data)
    model_patch.patch_model = recorded(model_patch.patch_model, seen)
    options = {**QUIET, **OPTIONS, "save_strategy": "steps", "resume_from_checkpoint": "last"}
    del options["per_device_eval_batch_size"]  # there is no evaluation
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    config = ["--config", str(data), "--output_dir", str(folder)]
    os._exit(cli.main(["train", "--data", str(data / "packed"), *mix, *config, *words]))


def train_mixture(folder, data, seen):
    """The smaller source is repeated; an epoch is 11 packs or so."""
    train_packs(folder, data, seen, [str(data / "more"), "--mix", "0.7", "0.3"])


def train_stream(folder, data, seen, mixes=False):
    folder, data = Path(folder), Path(data)
    source, options = samples_of(data), {}
    if mixes:
        long = encoded(SPEC, 1, 2, [2] * 60)
        long.labels[:30] = -100
        for place in (3, 4, 9, 17, 24):  # rows that cannot be split
            source.insert(place, long)
        source = {"a": (source, 0.8), "b": (more_samples(), 0.2)}
        options = {"on_overflow": "split", "on_error": Skip(0.5)}
    stream = PackStream(source, None, 40, buffer=8, **options)
    train_packs_of(stream, tiny_config(100, vision=SPEC), folder, seen)


def train_packs_of(stream, config, folder, seen, **options):
    model = recorded(patch_model, seen)(tiny_model(config))
    settings = {**QUIET, **OPTIONS, "save_strategy": "steps", **options}
    args = TrainingArguments(
        str(folder), **settings, accelerator_config={"dispatch_batches": False}
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=stream,
        data_collator=PackCollator(),
    )
    PackingCallback(stream).attach(trainer)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    os._exit(0)


def train_shards(folder, data, seen, workers=0):
    """Tar files; by file to workers."""
    folder, data = Path(folder), Path(data)
    tokenizer = _tokenizer(["w a"])
    ids = [tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in SPECIAL]
    spec = replace(SPEC, **dict(zip(SPECIAL_IDS, ids)))
    encoder = Encoder(tokenizer, spec)
    stream = PackStream(data / "shards", encoder, 100, buffer=8, on_error=Skip(0.5))
    config = tiny_config(len(tokenizer), vision=spec)
    train_packs_of(stream, config, folder, seen, dataloader_num_workers=workers)


def train_shards_with_workers(folder, data, seen):
    train_shards(folder, data, seen, workers=2)


def train_mixed_streams(folder, data, seen):
    """With bad rows."""
    train_stream(folder, data, seen, mixes=True)


SCRIPTS = {
    "packs": train_packs,
    "mixture": train_mixture,
    "stream": train_stream,
    "mixed streams": train_mixed_streams,
    "shards": train_shards,
    "shards to workers": train_shards_with_workers,
}


def start(script, folder, data, seen):
    return Forked(SCRIPTS[script], folder, data, seen)


def finish(process):
    assert process.join() == 0


def lines(path):
    """What was trained on; a line that was cut off was no step."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("]")]


def losses(folder):
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def whole(request, packed, tmp_path_factory):
    """(script, its losses, what it trained on, rows it left out, seconds from the first step to the end)."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(request.param, folder, packed, folder / "seen")
    wait_for(1, folder / "seen", process)
    begin = time.monotonic()
    finish(process)
    seconds = time.monotonic() - begin
    order = lines(folder / "seen")
    assert len(order) == len(losses(folder)) == STEPS
    return request.param, losses(folder), order, left_out(folder), seconds


def left_out(folder):
    path = folder / "bad_rows.jsonl"
    return path.read_text() if path.exists() else None


def wait_for(steps, path, process):
    while len(lines(path)) < steps:
        assert process.is_alive()
        time.sleep(0.001)


def cases():
    """A script and a seed; few in a normal run."""
    for script in SCRIPTS:
        usual = {"packs": 3, "stream": 3, "mixed streams": 1, "shards": 1}.get(script, 0)
        for seed in range(20):
            marks = () if seed < usual else pytest.mark.slow
            yield pytest.param(script, seed, marks=marks)


@pytest.mark.parametrize(("whole", "seed"), list(cases()), indirect=["whole"])
def test_killed_at_a_random_moment(whole, packed, tmp_path, seed):
    script, expected, order, bad_rows, seconds = whole
    rng = random.Random(f"{script} {seed}")
    process = start(script, tmp_path / "run", packed, tmp_path / "first")
    wait_for(rng.randint(1, STEPS - 2), tmp_path / "first", process)
    moment = time.monotonic() + rng.uniform(
        0, 2 * seconds / STEPS
    )  # before, within or after a save
    while time.monotonic() < moment and len(lines(tmp_path / "first")) < STEPS - 1:
        time.sleep(0.001)  # not later than its last steps: it may be faster than the other was
    process.kill()
    assert process.join() == -signal.SIGKILL
    newest = last_checkpoint(tmp_path / "run")
    done = 0 if newest is None else int(newest.rpartition("-")[2])
    saved = [int(path.name[11:]) for path in (tmp_path / "run").glob("checkpoint-*")]
    print(f"killed in step {len(lines(tmp_path / 'first'))}, saved {sorted(saved)}, whole {done}")
    finish(start(script, tmp_path / "run", packed, tmp_path / "second"))
    assert lines(tmp_path / "first")[:done] + lines(tmp_path / "second") == order
    assert losses(tmp_path / "run") == expected
    assert left_out(tmp_path / "run") == bad_rows
    assert script != "mixed streams" or len(bad_rows.splitlines()) > 5  # in two passes
    assert not script.startswith("shards") or len(bad_rows.splitlines()) >= 2

"""`mmpack train` trains: float32 weights under --bf16, and the parts that are not frozen."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from builders import QUIET, VOCAB, encoded, small_spec, tiny_config, tiny_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import TrainingArguments

from mmpack import Encoder, PackedDataset
from mmpack.cli.main import main
from mmpack.hf.checkpoints import last_checkpoint
from mmpack.hf.training_options import parse_training_arguments
from mmpack.store.encoded_store import open_store, write_store
from mmpack.store.manifest import About, Planning
from mmpack.store.plan_file import save_plan
from mmpack.types import ImageRef

FAMILY = "qwen3_vl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store with an image in each sample, and a bfloat16 model, as they are published, with its config."""
    folder = tmp_path_factory.mktemp("data")
    spec = replace(small_spec(FAMILY), max_pixels=64 * 64)
    Image.new("RGB", (64, 32), (200, 30, 90)).save(folder / "a.png")
    image = ImageRef(str(folder / "a.png"), size=(32, 64))
    samples = [
        replace(encoded(spec, 1, n + 3, (2, 4), 4, 5), media=(image,), source="train.json", row=n)
        for n in range(12)
    ]
    store = write_store(folder / "packed", iter(samples), spec)
    save_plan(PackedDataset.from_samples(store, 30).plan, store.folder)
    config = tiny_config(100, vision=spec, family=FAMILY)
    config.dtype = torch.bfloat16
    tiny_model(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    config.to_json_file(folder / "config.json")
    return folder


def train(folder, output, *options):
    quiet = {**QUIET, "save_strategy": "epoch"}
    del quiet["per_device_eval_batch_size"]  # refused: there is no evaluation
    words = [str(w) for name, value in quiet.items() for w in (f"--{name}", value)]
    words = ["train", "--data", folder / "packed", *words, "--output_dir", output, *options]
    if "--model" not in options and "--config" not in options:
        words += ["--model", folder / "model"]
    return main(list(map(str, [*words, "--steps", 2])))


def moved(folder, output):
    """{name: share of a weight's values that training has moved}, and what they are saved as."""
    before, after = (load_file(f / "model.safetensors") for f in (folder / "model", output))
    assert before.keys() == after.keys()
    shares = {n: (after[n].float() != w.float()).float().mean().item() for n, w in before.items()}
    return shares, {weight.dtype for weight in after.values()}


def test_weights_are_float32_under_bf16(folder, tmp_path, capsys):
    """At a learning rate of 1e-5 an update is below half of what bfloat16 can tell of most weights."""
    assert train(folder, tmp_path, "--bf16", "--learning_rate", 1e-5) == 0
    assert "weights in float32" in capsys.readouterr().out
    shares, dtypes = moved(folder, tmp_path)
    assert dtypes == {torch.float32}
    language = [share for name, share in shares.items() if ".layers." in name]
    assert min(language) > 0.9


def test_bfloat16_weights_are_to_be_had(folder, tmp_path, capsys):
    options = ("--bf16", "--learning_rate", 1e-5, "--weights-dtype", "bfloat16")
    assert train(folder, tmp_path, *options) == 0
    assert "weights in bfloat16" in capsys.readouterr().out
    shares, dtypes = moved(folder, tmp_path)
    assert dtypes == {torch.bfloat16}
    language = [share for name, share in shares.items() if ".layers." in name]
    assert min(language) == 0
    assert sum(language) / len(language) < 0.1


def test_random_weights_too(folder, tmp_path, capsys):
    """Whatever the config says of the weights that it came with. The folder is named, and if it has a run
    already."""
    for step in (3, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert train(folder, tmp_path, "--config", folder / "config.json") == 0
    captured = capsys.readouterr()
    assert f"{tmp_path} has checkpoints of an earlier run, up to checkpoint-12" in captured.err
    assert f"written to {tmp_path}" in captured.out.splitlines()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}


def test_resuming_with_another_capacity_is_refused(folder, tmp_path, capsys):
    """And what the error advises works: the checkpoint's weights, as a model."""
    assert train(folder, tmp_path / "run") == 0
    shutil.copytree(folder / "packed", tmp_path / "packed")
    save_plan(
        PackedDataset.from_samples(open_store(tmp_path / "packed"), 60).plan, tmp_path / "packed"
    )
    words = ["--config", folder / "config.json", "--resume_from_checkpoint", "last"]
    capsys.readouterr()
    assert train(tmp_path, tmp_path / "run", *words) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "trained on other packs or another loss: capacity was 30 and is 60, packs was" in error
    assert "start from its weights (mmpack train --model, from_pretrained) instead" in error
    checkpoint = last_checkpoint(tmp_path / "run")
    assert train(tmp_path, tmp_path / "other", "--model", checkpoint) == 0


def test_qwen3_5_packs_and_trains(small_set, tmp_path, capsys):
    """Rows to a run: linear attention in one of two layers."""
    vision = Encoder.from_folder(small_set / "tokenizer").vision
    config = tiny_config(VOCAB, family="qwen3_5", vision=vision)
    config.to_json_file(tmp_path / "config.json")
    words = ["train", "--data", small_set / "train.json", "--tokenizer", small_set / "tokenizer"]
    words += ["--config", tmp_path / "config.json", "--capacity", 1024, "--steps", 2]
    words += ["--save_strategy", "no", "--output_dir", tmp_path / "run"]
    assert main(list(map(str, words))) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 2


def test_a_file_beside_the_command_sets_no_option(tmp_path, monkeypatch):
    """transformers' parser would read mmpack.args beside mmpack."""
    (tmp_path / "mmpack.args").write_text("--learning_rate 7")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "mmpack"), "train"])
    assert parse_training_arguments([]).learning_rate == TrainingArguments("x").learning_rate


def part_of(name):
    if "visual" not in name:
        return "language"
    return "merger" if "merger" in name else "vision"


@pytest.mark.parametrize("frozen", [["vision"], ["merger", "language"]])
def test_frozen_parts_stay(folder, tmp_path, frozen):
    options = [word for part in frozen for word in ("--frozen", part)]
    assert train(folder, tmp_path, "--learning_rate", 1e-2, *options) == 0
    shares = moved(folder, tmp_path)[0]
    parts = {part: [] for part in ("vision", "merger", "language")}
    for name, share in shares.items():
        parts[part_of(name)].append(share)
    for part, found in parts.items():
        assert (max(found) == 0) == (part in frozen), part


def test_all_frozen_is_refused(folder, tmp_path, capsys):
    options = ["--frozen", "vision", "--frozen", "merger", "--frozen", "language"]
    assert train(folder, tmp_path, *options) == 1
    assert "leaves nothing to train" in capsys.readouterr().err


def test_a_plan_for_other_parts_is_told(folder, tmp_path, capsys):
    """A store says what its costs were counted for."""
    planning = Planning(capacity=30, config="config.json", frozen=("vision",))
    samples = list(PackedDataset.from_store(folder / "packed").samples)
    store = write_store(
        tmp_path / "packed", iter(samples), samples[0].vision, About(planning=planning)
    )
    save_plan(PackedDataset.from_samples(store, 30).plan, store.folder)
    (tmp_path / "model").symlink_to(folder / "model")
    assert train(tmp_path, tmp_path / "one") == 0
    assert "planned for --frozen vision" in capsys.readouterr().err
    assert train(tmp_path, tmp_path / "other", "--frozen", "vision") == 0
    assert "planned for" not in capsys.readouterr().err
    (tmp_path / "again").symlink_to(tmp_path / "packed")
    mix = ["--data", tmp_path / "again", "--mix", 1, 1]  # is planned now, for this run
    assert train(tmp_path, tmp_path / "mixed", *mix) == 0
    assert "planned for" not in capsys.readouterr().err

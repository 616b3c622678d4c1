"""A checkpoint that is not whole is never resumed from, whichever of its files is torn."""

import json
import os
import shutil

import pytest
from builders import QUIET, SMALL_SPEC, tiny_config
from test_resume import copy_of, dataset_of, run

from mmpack.cli.main import main
from mmpack.hf import last_checkpoint
from mmpack.hf.checkpoint_files import write_list
from mmpack.hf.checkpoints import check_checkpoint
from mmpack.store.encoded_store import write_store
from mmpack.store.plan_file import save_plan

LIST = "mmpack_files.json"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of 4 steps, with checkpoints 2 and 4, of a store and a config beside it."""
    folder = tmp_path_factory.mktemp("finished")
    samples = dataset_of().samples
    store = write_store(folder / "packed", iter(samples), SMALL_SPEC)
    save_plan(dataset_of().plan, store.folder)
    tiny_config(100, vision=SMALL_SPEC).to_json_file(folder / "config.json")
    assert train(folder, folder / "run", "--save_steps", 2) == 0
    return folder


def train(folder, output, *options, steps=4):
    quiet = {**QUIET, "save_strategy": "steps"}
    del quiet["per_device_eval_batch_size"]  # there is no evaluation
    words = [str(w) for name, value in quiet.items() for w in (f"--{name}", value)]
    words = ["train", "--data", folder / "packed", "--config", folder / "config.json", *words]
    words += ["--output_dir", output, "--steps", steps, *options]
    return main(list(map(str, words)))


def files_of(checkpoint):
    return sorted(json.loads((checkpoint / LIST).read_text())["files"])


def tears(whole, checkpoint, names):
    """(name, what was done to the file, a function that does it) of every file and every way."""
    for name in names:
        path, size = checkpoint / name, (whole / name).stat().st_size
        yield name, "gone", path.unlink
        yield name, "empty", lambda path=path: os.truncate(path, 0)
        yield name, "cut", lambda path=path, size=size: os.truncate(path, size - 1)
        yield name, "longer", lambda path=path, size=size: os.truncate(path, size + 1)


def test_the_list_has_every_file(finished):
    checkpoint = finished / "run" / "checkpoint-4"
    there = sorted(path.name for path in checkpoint.iterdir())
    assert files_of(checkpoint) == [name for name in there if name != LIST]
    parts = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert parts < set(files_of(checkpoint))


def test_a_torn_file_is_named_and_passed_over(finished, tmp_path, caplog):
    """By `last`, which says so, and by a checkpoint's name."""
    whole = finished / "run" / "checkpoint-4"
    for name, what, tear in tears(whole, tmp_path / "checkpoint-4", files_of(whole)):
        copy_of(whole, tmp_path / "checkpoint-4")
        copy_of(finished / "run" / "checkpoint-2", tmp_path / "checkpoint-2")
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
        tear()
        if name == "trainer_state.json" and what in ("cut", "longer"):
            continue  # users edit it: it may have any length, but must be JSON
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2"), (name, what)
        assert f"skipped incomplete checkpoint {tmp_path / 'checkpoint-4'}: " in caplog.messages[-1]
        assert name in caplog.messages[-1]
        with pytest.raises(ValueError, match=f"not a complete checkpoint: .*{name}"):
            check_checkpoint(tmp_path / "checkpoint-4")
        shutil.rmtree(tmp_path / "checkpoint-4")


def test_without_the_list_the_parts_tell(finished, tmp_path):
    """As a run that was killed before it was written leaves one, or Trainer without the callback."""
    whole = finished / "run" / "checkpoint-4"
    parts = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
    for name, what, tear in tears(whole, tmp_path / "checkpoint-4", parts):
        copy_of(whole, tmp_path / "checkpoint-4")
        (tmp_path / "checkpoint-4" / LIST).unlink()
        check_checkpoint(tmp_path / "checkpoint-4")
        if what == "longer" and name != "model.safetensors" or name == "trainer_state.json":
            continue
        tear()
        with pytest.raises(ValueError, match=f"not a complete checkpoint: .*{name}"):
            check_checkpoint(tmp_path / "checkpoint-4")
        shutil.rmtree(tmp_path / "checkpoint-4")


def test_a_sharded_model(finished, tmp_path):
    """Shards are in the list; without it the index names them."""
    run_of = copy_of(finished / "run" / "checkpoint-4", tmp_path / "checkpoint-4")
    (run_of / "model.safetensors").rename(run_of / "model-00001-of-00002.safetensors")
    index = {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
    (run_of / "model.safetensors.index.json").write_text(json.dumps(index))
    (run_of / LIST).unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is missing"):
        check_checkpoint(run_of)


def test_the_command_line(finished, tmp_path, capsys):
    """A checkpoint named by hand is refused with the file's name; `last` says what it skipped."""
    output = copy_of(finished / "run", tmp_path / "run")
    (output / "checkpoint-4" / "optimizer.pt").unlink()
    resume = ["--resume_from_checkpoint", output / "checkpoint-4"]
    assert train(finished, output, *resume, steps=6) == 1
    assert "is not a complete checkpoint: optimizer.pt is missing" in capsys.readouterr().err
    assert train(finished, output, "--resume_from_checkpoint", "true", steps=6) == 1
    assert "true is not a complete checkpoint: there is no such folder" in capsys.readouterr().err
    assert train(finished, output, "--resume_from_checkpoint", "last") == 0
    assert f"continuing from {output / 'checkpoint-2'}" in capsys.readouterr().err


def test_a_trainer_is_refused_too(tmp_path):
    """transformers begins with a new optimizer where the file is missing, and says nothing."""
    run(tmp_path)
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"not a complete checkpoint: optimizer\.pt is missing"):
        run(tmp_path, resume=tmp_path / "checkpoint-2")


def test_a_checkpoint_that_is_overwritten_is_none_meanwhile(tmp_path, monkeypatch):
    """Of an earlier run: else its list would vouch for a mixture of old and new files of equal sizes."""
    run(tmp_path)
    from transformers import Trainer

    def killed(self, output_dir):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, resume=tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_shards_of_fsdp(finished, tmp_path):
    """As torch's distributed checkpoints lie in folders; accelerate makes none of a CPU's ranks."""
    checkpoint = copy_of(finished / "run" / "checkpoint-4", tmp_path / "checkpoint-4")
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        (checkpoint / part).mkdir()
        for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
            (checkpoint / part / name).write_bytes(b"12345678")
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "optimizer.pt").unlink()
    write_list(checkpoint, True)
    whole = copy_of(checkpoint, tmp_path / "whole")
    check_checkpoint(whole)
    shards = [name for name in files_of(checkpoint) if "/" in name]
    assert len(shards) == 6
    for name, _, tear in tears(whole, checkpoint, shards):
        copy_of(whole, checkpoint)
        tear()
        with pytest.raises(ValueError, match=f"not a complete checkpoint: {name}"):
            check_checkpoint(checkpoint)

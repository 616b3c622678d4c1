"""What `mmpack tune` measures is kept per machine; files that are torn or of another machine are ignored."""

import json
import os

import fake_trials
import pytest
import torch

from mmpack.cli.main import main
from mmpack.ops import tuning
from mmpack.ops.tuning import (
    Measured,
    ShapeClass,
    agreed,
    cache_file,
    read_table,
    tune,
    write_table,
)
from mmpack.trials import Outcome

FACTS = {"GPU": "NVIDIA H200", "driver": "580.65", "torch": "2.13.0", "mmpack/ops": "0a1b2c"}
SHAPES = [
    ShapeClass("varlen_attention", "bfloat16", (("H", 12), ("Hk", 2), ("K", 128), ("causal", 1))),
    ShapeClass("embed_features", "float32", (("V", 100), ("D", 64))),
]
MEASURED = Measured(
    "flash2", {"flash2": 2e-3, "triton": 1e-3}, {"flash3": "wrong"}, 8192, "2026-11-30"
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """This machine, with an empty cache."""
    monkeypatch.setattr(tuning, "machine", lambda: dict(FACTS))
    monkeypatch.setattr(tuning, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_a_shape_class_is_its_text():
    text = "varlen_attention bfloat16 H=12 Hk=2 K=128 causal=1"
    assert str(SHAPES[0]) == text and ShapeClass.parse(text) == SHAPES[0]


def test_results_are_kept_as_each_is_done(here, monkeypatch):
    def run(make, names, limit):
        assert names == [f"16384 {shape}" for shape in SHAPES] and limit == 7
        yield names[0], Outcome("library", {"library": 2.0, "triton": 1.0}, {"x": "wrong"})
        assert read_table(FACTS)[str(SHAPES[0])].choice == "triton"  # already on disk
        yield names[1], Outcome(failed="MemoryError: no room")

    monkeypatch.setattr(tuning, "run_trials", run)
    first, second = tune(SHAPES, 9000, make=fake_trials.make, limit=7)
    assert second == (SHAPES[1], "MemoryError: no room")
    assert first[0] == SHAPES[0] and first[1].tokens == 16384
    assert (first[1].default, first[1].refused) == ("library", {"x": "wrong"})
    assert read_table(FACTS) == {str(SHAPES[0]): first[1]}
    assert [path.name for path in here.iterdir()] == [cache_file(FACTS).name]


def test_other_classes_stay():
    write_table(FACTS, {"a": MEASURED})
    write_table(FACTS, {**read_table(FACTS), "b": MEASURED})
    assert set(read_table(FACTS)) == {"a", "b"}


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "", "is damaged"),
        (lambda text: text.replace('"tokens": 8192', '"tokens": "many"'), "'tokens' is 'many', not an"),
        (lambda text: text.replace('"default"', '"other"'), "'default' is missing"),
        (lambda text: text.replace("580.65", "550.1"), "driver 550.1, this is 580.65"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_ignored_with_a_line(damage, why, caplog):
    path = write_table(FACTS, {"a": MEASURED})
    path.write_text(damage(path.read_text()))
    assert read_table(FACTS) == {}
    (line,) = caplog.messages
    assert str(path) in line and why in line and line.endswith("`mmpack tune` measures again")


def test_results_of_other_versions_are_told(here, caplog):
    old = write_table({**FACTS, "torch": "2.11.0"}, {"a": MEASURED})
    write_table({**FACTS, "GPU": "NVIDIA B200"}, {"a": MEASURED})
    os.utime(write_table({**FACTS, "torch": "2.10.0"}, {"a": MEASURED}), (1, 1))
    assert read_table(FACTS) == {}
    (line,) = caplog.messages
    assert f"ignored {old}: it was measured with torch 2.11.0, this is 2.13.0" in line
    caplog.clear()
    assert read_table({**FACTS, "GPU": "NVIDIA L4"}) == {} and not caplog.messages


def test_a_write_that_fails_leaves_the_old_file(here, monkeypatch):
    write_table(FACTS, {"a": MEASURED})
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_table(FACTS, {"b": MEASURED})
    assert set(read_table(FACTS)) == {"a"} and len(list(here.iterdir())) == 1


def test_ranks_take_what_is_right_on_all_with_the_least_worst_time():
    def of(default="flash2", **seconds):
        return Measured(default, seconds, {}, 8192, "2026-11-30")

    fast = {"c": of(flash2=2.0, triton=1.0, flash3=1.5)}
    slow = {"c": of(flash2=2.1, triton=3.0, flash3=1.6)}
    wrong = {"c": of(flash2=2.0, flash3=2.5)}
    assert fast["c"].choice == "triton"
    assert agreed([fast, slow])["c"].choice == "flash3"
    assert agreed([fast, wrong])["c"].seconds == {"flash2": 2.0, "flash3": 2.5}
    assert agreed([fast, wrong])["c"].choice == "flash2"
    assert agreed([fast, {}]) == agreed([fast, {"c": of("torch_varlen", triton=1.0)}]) == {}


def test_the_command_without_a_gpu_says_so_in_a_line(monkeypatch, capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.undo()
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "qwen2_vl"}))
    assert main(["tune", str(config)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mmpack: kernels are measured on a CUDA device, and torch")
    (_, last) = main(["env"]), capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("mmpack tune: kernels are measured on a CUDA device")


def test_the_command_shows_what_was_chosen(monkeypatch, capsys, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "qwen2_vl"}))

    def run(make, jobs, limit):
        seconds = {"torch_varlen": 2e-3, "triton": 1e-3}
        for job in jobs[:-1]:
            yield job, Outcome("torch_varlen", seconds, {"flash3": "it took longer than 180 s"})
        yield jobs[-1], Outcome(failed="OutOfMemoryError: no room")

    monkeypatch.setattr(tuning, "run_trials", run)
    assert main(["tune", str(config)]) == 1  # one class could not be measured
    said = capsys.readouterr()
    assert "OutOfMemoryError: no room" in said.err
    (row,) = [line for line in said.out.splitlines() if "causal=1" in line]
    assert row.split("  ")[0] == "varlen_attention bfloat16 H=64 Hk=8 K=128 causal=1 window=0"
    assert "triton  torch_varlen 2, triton 1, flash3: it took longer than 180 s" in row
    assert main(["env"]) == 0
    assert row in capsys.readouterr().out
    assert main(["env", "--json"]) == 0
    tuned = json.loads(capsys.readouterr().out)["tuned"]
    assert tuned[row.split("  ")[0]]["choice"] == "triton"


def test_another_model_is_refused(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama"}))
    assert main(["tune", str(config)]) == 1
    assert "a model of model_type 'llama' has no packs" in capsys.readouterr().err


def test_the_folder_is_the_users(monkeypatch):
    monkeypatch.undo()
    assert tuning.cache_folder().parts[-2:] == ("mmpack", "tuned")

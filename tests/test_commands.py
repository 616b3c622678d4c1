"""What holds for every command: help with examples, --json, --quiet, exit codes, no stack trace."""

import json
import os
import re
import shlex
import sys
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Literal

import pytest
from builders import tiny_config

import mmpack.cli.demo
from mmpack.cli import command_line, options
from mmpack.cli.main import main
from mmpack.data import progress
from mmpack.hf.training import log_line
from mmpack.hf.training_options import parse_training_arguments
from mmpack.store.manifest import Planning

COMMANDS = [
    "check",
    "pack",
    "merge",
    "inspect",
    "train",
    "demo",
    "env",
]  # tune needs a GPU: test_tuning.py
every_command = pytest.mark.parametrize("command", COMMANDS)


@pytest.fixture
def works(small_set, tmp_path, monkeypatch):
    """Of every command, arguments with which it works."""
    monkeypatch.setattr(mmpack.cli.demo, "NUM_ROWS", 8)
    tokenizer = ["--tokenizer", small_set / "tokenizer"]
    arguments = {
        "check": [small_set / "train.json", *tokenizer],
        "pack": [
            small_set / "train.json", *tokenizer, "--capacity", 2048, "--out", tmp_path / "packed",
        ],
        "merge": [tmp_path / "merged", small_set / "part"],
        "inspect": [small_set / "packed"],
        "train": [
            "--data", small_set / "packed", "--config", small_set / "config.json", "--steps", 1,
            "--output_dir", tmp_path / "run", "--save_strategy", "no",
        ],
        "demo": [],
        "env": [],
    }  # fmt: skip
    return {name: [name, *map(str, of_command)] for name, of_command in arguments.items()}


@every_command
def test_json_is_all_there_is_on_stdout(command, works, capfd):
    assert main([*works[command], "--json"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert len(lines) == (25 if command == "check" else 1)  # one line per row, and the summary


@every_command
def test_quiet_prints_nothing(command, works, capfd):
    assert main([*works[command], "--quiet"]) == 0
    assert capfd.readouterr().out == ""


@every_command
def test_examples_are_commands(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = capsys.readouterr().out.replace("\\\n", " ")
    examples = [line.strip() for line in text.splitlines() if line.startswith("  mmpack ")]
    assert examples
    for example in examples:
        words = shlex.split(example.partition("|")[0])[1:]
        given, rest = command_line.command_line().parse_known_args(words)
        assert given.command == command
        assert not rest or command == "train"


@every_command
def test_usage(command, works, capsys):
    for wrong in (["--json", "--quiet"], ["--surprise"]):
        with pytest.raises(SystemExit, match="2"):
            main([*works[command], *wrong])
        assert "error: " in capsys.readouterr().err


@every_command
def test_nobody_reads_on(command, works, monkeypatch):
    """`mmpack ... | head`: no stack trace, not from Python's last flush either."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main([*works[command], "--json"]) == 141


@every_command
def test_interrupted(command, works, monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setitem(mmpack.cli.main._COMMANDS, command, interrupt)
    assert main(works[command]) == 130
    assert capsys.readouterr().err == "mmpack: interrupted\n"


@pytest.fixture
def broken(works, small_set, tmp_path):
    """User errors by name: what is appended to arguments that work, exit code, message."""
    (tmp_path / "file").write_text("no folder")
    tiny_config().to_json_file(tmp_path / "other.json")
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    under_file, nowhere = str(tmp_path / "file" / "x"), str(tmp_path / "nowhere" / "x.png")
    no_folder = "No such file or directory"

    def train(*options):
        return ["train", "--data", str(small_set / "packed"), *map(str, options)]

    def replaced(command, option, value):
        """Arguments that work, but for one value."""
        words = list(works[command])
        words[words.index(option) + 1] = value
        return words

    return {
        "no data": (["check", nowhere], 1, "no such file"),
        "no folder for --png": ([*works["check"], "--png", nowhere], 1, no_folder),
        "--bad is a folder": ([*works["check"], "--bad", str(tmp_path)], 1, "Is a directory"),
        "no tokenizer": (replaced("check", "--tokenizer", nowhere), 1, "no such file or folder"),
        "--out under a file": (replaced("pack", "--out", under_file), 1, "cannot write"),
        "no workers": ([*works["pack"], "--jobs", "0"], 1, "--jobs (jobs) must be positive"),
        "no store": (["inspect", str(tmp_path)], 1, "has no finished store; make one with"),
        "no pack": ([*works["inspect"], "--pack", "99"], 1, "there is no pack 99; packs are 0 to "),
        "no row": ([*works["inspect"], "--row", "99"], 1, "row 99 is in no pack; was it refused"),
        "no row's number": ([*works["inspect"], "--row", "x"], 1, "--row takes N or FILE:N, got 'x'"),
        "no segment": ([*works["inspect"], "--segment", "-1"], 1, "has no segment -1; its segments are 0 to "),
        "no PNG": ([*works["inspect"], "--png", str(tmp_path / "a.xyz")], 1, "'xyz' is not"),
        "no model": (train("--model", nowhere), 1, ": there is no such file"),
        "two models": (train("--model", "a", "--config", "b"), 1, "pass --model FOLDER, or"),
        "other model": (train("--config", tmp_path / "other.json"), 1, "the model has image_token"),
        "no Qwen-VL": (train("--config", tmp_path / "llama"), 1, "model_type 'llama'; supported: "),
        "a prefix": ([*works["train"], "--learning_rat", "1"], 2, "mean --learning_rate?"),
        "a prefix of ours": ([*works["pack"], "--cap", "8"], 2, "--cap is not an option of mmpack pack; did you mean --capacity?"),
        "no capacity": (replaced("pack", "--capacity", "0"), 1, "--capacity is 0, not an integer"),
        "no seed": ([*works["pack"], "--plan_seed", "-1"], 1, "--plan-seed is -1, not an integer"),
        "no share": ([*works["pack"], "--max-image-share", "nan"], 1, "--max-image-share is nan"),
        "no share of rows": ([*works["pack"], "--max-bad", "nan"], 1, "must be a share from 0 to 1"),
        "split turns": ([*works["pack"], "--on-overflow", "split"], 1, "cannot be split"),
        "typo": ([*works["train"], "--learnin_rate", "1"], 2, "did you mean --learning_rate?"),
        "typo of ours": ([*works["train"], "--step", "1"], 2, "mmpack train or TrainingArguments; did you mean --steps?"),
        "typo of ours, with _": ([*works["train"], "--evaldata=x"], 2, "did you mean --eval-data?"),
        "theirs, though ours is close": ([*works["train"], "--max_step", "1"], 2, "did you mean --max_steps?"),
        "no number": ([*works["train"], "--learning_rate", "x"], 2, "invalid float value: 'x'"),
        "no evaluation": ([*works["train"], "--eval_strategy", "steps"], 1, "there is no evaluation set"),
        "--write under a file": (["demo", "--write", under_file], 1, "Not a directory"),
    }  # fmt: skip


def test_user_errors(broken, capsys):
    for name, (arguments, code, message) in broken.items():
        try:
            assert main(arguments) == code, name
        except SystemExit as ended:
            assert ended.code == code == 2, name
        captured = capsys.readouterr()
        assert message in captured.err, name
        assert captured.err.splitlines()[-1].startswith("mmpack"), name


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_no_permission(works, tmp_path, capsys):
    (tmp_path / "locked.json").write_text("[]")
    (tmp_path / "locked.json").chmod(0)
    assert main(["check", str(tmp_path / "locked.json")]) == 1
    assert "locked.json: Permission denied" in capsys.readouterr().out
    tmp_path.chmod(0o500)
    assert main(works["pack"]) == 1
    assert "Permission denied" in capsys.readouterr().err


def test_a_missing_extra_is_named(works, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(works["check"]) == 1
    error = capsys.readouterr().err
    assert "transformers is not installed; mmpack check needs mmpack[train]" in error


# On a terminal, and elsewhere


def test_progress(works, monkeypatch, capsys):
    """A bar on a terminal, a line a minute elsewhere, neither where it is switched off."""
    assert main(works["check"]) == 0
    assert capsys.readouterr().err == ""  # a minute has not passed
    monkeypatch.setattr(progress, "_LINE_S", 0.0)
    assert main(works["check"]) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"checking: 24 of 24 rows \(100%\), 0 min left, [\d.,]+ rows/s", last)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(works["check"]) == 0
    assert re.search(
        r"checking: 100%.* 24/24 \[00:0\d<00:00, [ \d.]+ rows/s\]", capsys.readouterr().err
    )
    assert main([*works["check"], "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert main(works["check"]) == 0
    assert capsys.readouterr().err.startswith("checking: ")


def test_lines_are_as_wide_as_the_terminal(works, monkeypatch, capsys):
    for command in ("check", "pack", "inspect"):
        assert main(works[command]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) > 100  # a pipe takes any length
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    for command in ("check", "pack", "inspect"):
        assert main(works[command]) == 0
        text = capsys.readouterr().out.partition("---")[0]
        words = [line.split() for line in text.splitlines() if len(line) > 60]
        assert all(len(line) == 1 for line in words)  # a path alone


def test_colours(works, monkeypatch, capsys):
    for names, expected in (
        ((), False),
        (("FORCE_COLOR",), True),
        (("FORCE_COLOR", "NO_COLOR"), False),
    ):
        for name in names:
            monkeypatch.setenv(name, "1")
        assert main(works["inspect"]) == 0
        assert ("\x1b[" in capsys.readouterr().out) is expected


def test_an_interrupted_run_says_how_it_goes_on(works, monkeypatch, capsys, tmp_path):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmpack.hf.training.train", interrupt)
    assert main([*works["train"], "--resume_from_checkpoint", "last"]) == 130
    assert "; no checkpoint was saved in " in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr("mmpack.hf.checkpoints.last_checkpoint", lambda folder: f"{folder}/c-7")
    assert main([*works["train"], "--resume_from_checkpoint", "last"]) == 130
    *_, why, command = capsys.readouterr().err.splitlines()
    assert why == f"mmpack: interrupted; to continue from {tmp_path}/run/c-7:"
    assert shlex.split(command) == ["mmpack", *works["train"], "--resume_from_checkpoint", "last"]


def test_a_log_is_a_line():
    logs = {"loss": 6.4501, "grad_norm": 5.083, "learning_rate": 5e-05, "epoch": 0.05}
    logs |= {"pack/utilization": 0.9722, "pack/tokens_per_second": 12345.6, "pack/tflops": 0.01}
    line = "step 1/3  loss 6.45  grad_norm 5.08  lr 5e-05  12,346 tokens/s  97% full"
    assert log_line(1, 3, logs) == line
    logs = {"eval_loss": 1.25, "eval_runtime": 3.0, "eval_steps_per_second": 4.0, "epoch": 1.0}
    assert log_line(3, 3, logs) == "step 3/3  eval_loss 1.25"


def test_every_command_is_here():
    here = list(command_line.COMMANDS)
    assert list(mmpack.cli.main._COMMANDS) == here
    assert [name for name in here if name != "tune"] == COMMANDS


# Options


def test_dashes_and_underscores_are_alike():
    """Of what is ours; transformers' parser takes both itself."""
    words = ["train", "--data", "a_b", "--max_pixels=3", "--video-max_frames", "2", "--plan-seed=1"]
    _, given = command_line.parse([*words, "--learning-rate", "1e-3", "--weight_decay=0.1"])
    assert (given.data, given.max_pixels, given.video_max_frames) == (("a_b",), 3, 2)
    assert given.training == ("--learning-rate", "1e-3", "--weight_decay=0.1")
    arguments = parse_training_arguments(given.training)
    assert (arguments.learning_rate, arguments.weight_decay) == (1e-3, 0.1)


def test_defaults_that_follow_from_others():
    pack = ["pack", "x", "--tokenizer", "t", "--capacity", "8", "--out", "o"]
    assert command_line.parse(pack)[1].planning == Planning(capacity=8)
    _, given = command_line.parse([*pack, "--stage", "pretrain", "--frozen", "vision"])
    expected = Planning(capacity=8, on_overflow="split", frozen=("vision",))
    assert given.planning == expected
    with pytest.raises(FrozenInstanceError):
        given.capacity = 9
    with pytest.raises(ValueError, match="a conversation cannot be split"):
        replace(given, stage="sft")


def test_an_option_is_a_field(monkeypatch, capsys):
    """Its help, choices and default stand at one place."""

    @dataclass(frozen=True, kw_only=True)
    class More(options.EnvOptions):
        more_so: Literal["a", "b"] = options.option("one more", "a")

    monkeypatch.setitem(command_line.COMMANDS, "env", (More, ""))
    assert command_line.parse(["env"])[1].more_so == "a"
    assert command_line.parse(["env", "--more_so", "b"])[1].more_so == "b"
    for words in (["env", "--more-so", "c"], ["env", "--help"]):
        with pytest.raises(SystemExit):
            command_line.parse(words)
    assert "--more-so {a,b}  one more" in capsys.readouterr().out

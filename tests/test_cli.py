import contextlib
import io
import json
import subprocess
import sys

import pytest
from builders import tiny_config

from mmpack.cli.demo import NUM_ROWS, write_data
from mmpack.cli.main import main


def run(*arguments):
    """What a command that succeeds prints; here, as a process takes seconds to import transformers."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([*map(str, arguments)]) == 0
    return out.getvalue()


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The folder that `mmpack demo --write` leaves."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    write_data(folder, NUM_ROWS)
    return folder


@pytest.fixture(scope="session")
def packed(demo):
    """The demo's data set packed: (the JSON report, the folder)."""
    folder = demo
    printed = run(
        "pack", folder / "train.json", "--tokenizer", folder / "tokenizer",
        "--capacity", 2048, "--out", folder / "packed", "--json",
    )  # fmt: skip
    return json.loads(printed), folder / "packed"


@pytest.mark.slow  # test_commands runs it on 8 rows
def test_demo(tmp_path):
    """In a process of its own, as people run it."""
    folder = tmp_path / "data"
    command = [sys.executable, "-m", "mmpack", "demo", "--write", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    numbers = [
        line.split()[-1] for line in done.stdout.splitlines() if "relative difference" in line
    ]
    loss, gradient = map(float, numbers)
    assert loss < 1e-5
    assert gradient < 1e-5
    assert "useful tokens/s" in done.stdout
    assert (folder / "train.json").exists()


@pytest.mark.smoke
def test_pack_reports_json(packed):
    report, _ = packed
    assert {"rows", "bad_rows", "packs", "utilization", "seconds"} <= set(report)
    assert (report["rows"], report["bad_rows"]) == (240, 0)
    assert 0.9 < report["utilization"] <= 1


@pytest.mark.smoke
def test_train_on_what_pack_wrote(packed, demo, tmp_path):
    folder = demo
    printed = run(
        "train", "--data", packed[1], "--config", folder / "config.json", "--steps", 3,
        "--output_dir", tmp_path / "run", "--learning_rate", "1e-3",
    )  # fmt: skip
    result = json.loads(printed.splitlines()[-1])
    assert result["steps"] == 3
    assert result["last_loss"] < result["first_loss"]
    assert (tmp_path / "run" / "model.safetensors").exists()
    # What was saved is a stock model, and can be trained on.
    again = run(
        "train", "--data", folder / "train.json", "--tokenizer", folder / "tokenizer",
        "--capacity", 2048, "--model", tmp_path / "run", "--steps", 1, "--save_strategy", "no",
        "--output_dir", tmp_path / "again",
    )  # fmt: skip
    assert json.loads(again.splitlines()[-1])["first_loss"] < result["first_loss"]


def test_pack_says_what_it_did(demo, tmp_path, capsys):
    folder = demo
    arguments = ["pack", str(folder / "train.json"), "--tokenizer", str(folder / "tokenizer")]
    arguments += ["--capacity", "2048", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("240 rows -> 20 packs of 2,048 tokens, 9")
    assert main([*arguments, "--mask-history"]) == 1
    assert "is not empty; choose another --out" in capsys.readouterr().err
    assert main([*arguments, "--mask-history", "--overwrite"]) == 0


def test_overwrite_spares_other_peoples_folders(demo, tmp_path, capsys):
    folder = demo
    (tmp_path / "thesis.tex").write_text("precious")
    arguments = ["pack", str(folder / "train.json"), "--tokenizer", str(folder / "tokenizer")]
    arguments += ["--capacity", "2048", "--out", str(tmp_path), "--overwrite"]
    assert main(arguments) == 1
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.fixture
def broken_rows(demo, tmp_path):
    """The demo's rows with the second one spoilt."""
    folder = demo
    rows = json.loads((folder / "train.json").read_text())[:10]
    rows[1]["images"] = rows[1]["images"] + ["charts/extra.png"]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return ["pack", str(path), "--tokenizer", str(folder / "tokenizer"), "--media-dir", str(folder)]


def test_a_bad_row_stops_or_is_listed(broken_rows, tmp_path, capsys):
    arguments = [*broken_rows, "--capacity", "2048", "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("mmpack: row 1 of rows.json: ")
    assert "images; add a marker or drop the extra image" in error
    assert not (tmp_path / "out").exists()

    assert main([*arguments, "--on-error", "skip", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["bad_rows"]) == (10, 1)
    (line,) = (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 1


def test_long_rows_stop_or_are_listed(broken_rows, tmp_path, capsys):
    arguments = [*broken_rows, "--on-error", "skip", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--capacity", "100"]) == 1
    assert "too long for a pack of 100 tokens: " in capsys.readouterr().err
    for fate in ("drop", "truncate"):
        options = ["--capacity", "100", "--on-overflow", fate, "--overwrite", "--json"]
        assert main([*arguments, *options]) == 0
        report = json.loads(capsys.readouterr().out)
        lost = (tmp_path / "out" / "overflow.jsonl").read_text().splitlines()
        assert len(lost) == report["dropped"] + report["truncated"] > 0


def test_errors_without_a_trace(demo, packed, tmp_path, capsys):
    folder = demo
    tokenizer = ["--tokenizer", str(folder / "tokenizer")]
    out = ["--capacity", "2048", "--out", str(tmp_path / "out")]
    cases = [
        (["pack", str(tmp_path / "no.json"), *tokenizer, *out], "cannot read"),
        (
            ["pack", str(folder / "train.json"), "--tokenizer", str(tmp_path), *out],
            "has no Qwen-VL",
        ),
        (["train", "--data", str(tmp_path)], "is not a folder written by mmpack pack"),
        (
            ["train", "--data", str(tmp_path), *tokenizer],
            "by mmpack pack; to pack rows now, pass --capacity\n",
        ),
        (
            ["train", "--data", str(tmp_path / "no.json"), *tokenizer],
            f"cannot read --data {tmp_path / 'no.json'}: no such file or folder",
        ),
        (
            ["pack", str(folder / "train.json"), *tokenizer, *out[:3], str(folder), "--overwrite"],
            "is not empty; choose another --out: only what mmpack pack wrote is overwritten",
        ),
        (
            [
                "pack",
                *[str(folder / "train.json")] * 2,
                *tokenizer,
                *out[:3],
                str(folder / "train.json"),
            ],
            "train.json is a file; choose another --out",
        ),
        (["train", "--data", str(packed[1])], "pass --model FOLDER, or --config FILE"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["pack", "x.json", "--surprise"])


def test_a_model_that_does_not_fit_the_data_is_refused(packed, tmp_path, capsys):
    tiny_config(vocab_size=151_680).to_json_file(tmp_path / "config.json")
    assert main(["train", "--data", str(packed[1]), "--config", str(tmp_path / "config.json")]) == 1
    assert (
        "the model has image_token_id 151655, but the data was packed with"
        in capsys.readouterr().err
    )


@pytest.mark.slow  # test_real_rows has the rows, test_train_on_what_pack_wrote the commands
def test_the_real_set_is_packed_and_trained_on(shared, tmp_path):
    printed = run(
        "pack", shared / "realset" / "realset_sft.json",
        "--tokenizer", shared / "tokenizer" / "qwen2_vl",
        "--max-pixels", 1003520, "--capacity", 8192, "--out", tmp_path / "packed", "--json",
    )  # fmt: skip
    report = json.loads(printed)
    assert (report["rows"], report["bad_rows"], report["dropped"]) == (2109, 0, 0)
    assert report["utilization"] >= 0.99

    tiny_config(tied=True).to_json_file(tmp_path / "config.json")
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["Qwen2VLForConditionalGeneration"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    printed = run(
        "train", "--data", tmp_path / "packed", "--config", tmp_path / "config.json",
        "--steps", 20, "--output_dir", tmp_path / "run", "--save_strategy", "no",
    )  # fmt: skip
    assert json.loads(printed.splitlines()[-1])["steps"] == 20


def test_pack_balances_by_the_models_config(demo, tmp_path, capsys):
    folder = demo
    config = folder / "config.json"
    arguments = ["pack", str(folder / "train.json"), "--tokenizer", str(folder / "tokenizer")]
    arguments += ["--capacity", "512", "--on-overflow", "drop"]
    reports = []
    for n, options in enumerate(([], ["--config", str(config)])):
        assert main([*arguments, *options, "--out", str(tmp_path / str(n)), "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    plain, balanced = reports
    assert "imbalance" not in plain
    assert balanced["imbalance"]["8"] <= balanced["imbalance_floor"]["8"] + 0.05
    assert 1 <= balanced["busiest_floor"] <= balanced["busiest"]
    for report in reports:
        assert list(report["sources"]) == ["train.json"]
        assert report["sources"]["train.json"]["share"] == 1.0
        assert 0 < report["image_share"]["p10"] <= report["image_share"]["share"] < 1
    frozen = ["--config", str(config), "--frozen", "vision", "--frozen", "merger"]
    assert main([*arguments, *frozen, "--out", str(tmp_path / "frozen")]) == 0
    assert "on 8 ranks, the busiest rank takes 1." in capsys.readouterr().out
    assert main([*arguments, "--frozen", "vision", "--out", str(tmp_path / "none")]) == 1
    assert "which need the model; pass --config too" in capsys.readouterr().err
    assert main([*arguments, "--config", str(tmp_path), "--out", str(tmp_path / "none")]) == 1
    assert "has no model config" in capsys.readouterr().err

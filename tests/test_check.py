import json
import resource
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from mmpack.cli.main import main

TURNS = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "This."}]


@pytest.fixture
def rows(tmp_path):
    """Three rows, the second bad; a.png used twice, c.png has the content of a.png."""
    Image.new("RGB", (60, 90)).save(tmp_path / "a.png")
    Image.new("RGB", (80, 40), "red").save(tmp_path / "b.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "c.png")
    made = [
        {"conversations": TURNS, "images": ["a.png"], "source": "one"},
        {"conversations": TURNS, "images": ["a.png", "b.png"], "source": "two"},
        {
            "conversations": [{"from": "human", "value": "<image><image><image>"}, TURNS[1]],
            "images": ["a.png", "b.png", "c.png"],
            "source": "two",
        },
    ]
    (tmp_path / "rows.json").write_text(json.dumps(made))
    return str(tmp_path / "rows.json")


def test_the_table(rows, capsys):
    assert main(["check", rows]) == 1
    text = capsys.readouterr().out
    assert text.startswith(
        "3 rows: 2 usable, 1 refused\n  row 1 of rows.json: 1 <image> marker but 2 images; add a"
    )
    assert "images  4 in 3 files, 1 of them used more than once" in text
    assert "rows by images  1: 1, 3: 1" in text
    assert "turns   user: 2, assistant: 2" in text
    assert "fields  conversations: 3, images: 3, source: 3" in text
    assert "rows by characters  <= 16: 2" in text
    table = [line.split() for line in text.splitlines() if line.startswith(("one", "two"))]
    assert table == [["two", "2", "1", "3", "-"], ["one", "1", "0", "1", "-"]]
    assert "pass --tokenizer FOLDER" in text


def test_decoding_finds_equal_files(rows, capsys):
    main(["check", rows, "--decode"])
    assert "1 files have the content of another (a.png = c.png)" in capsys.readouterr().out


def test_json_lines(rows, capsys):
    assert main(["check", rows, "--json"]) == 1
    *lines, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert lines[0] == {
        "file": "rows.json", "row": 0, "ok": True, "error": None, "advice": None, "images": 1, "videos": 0,
    }  # fmt: skip
    assert lines[1] == {
        "file": "rows.json", "row": 1, "ok": False, "error": "1 <image> marker but 2 images",
        "advice": "add a marker or drop the extra image",
    }  # fmt: skip
    assert summary["summary"]["refused"] == 1
    assert summary["summary"]["rows_by_images"] == {"1": 1, "3": 1}


def test_refused_rows_are_written_with_their_reasons(rows, tmp_path, capsys):
    main(["check", rows, "--bad", str(tmp_path / "bad.jsonl")])
    (line,) = map(json.loads, (tmp_path / "bad.jsonl").read_text().splitlines())
    assert (line["file"], line["row"]) == ("rows.json", 1)
    assert line["content"]["images"] == ["a.png", "b.png"]
    capsys.readouterr()


def test_a_clean_set_ends_with_0(rows, tmp_path, capsys):
    good = json.loads((tmp_path / "rows.json").read_text())[::2]
    (tmp_path / "good.json").write_text(json.dumps(good))
    assert main(["check", str(tmp_path / "good.json")]) == 0
    with pytest.raises(SystemExit, match="2"):
        main(["check"])
    capsys.readouterr()


def test_tokens_and_capacities(shared, realset, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["check", str(shared / "realset" / "realset_sft.json"), "--json"]
    arguments += ["--tokenizer", str(shared / "tokenizer" / "qwen2_vl"), "--max-pixels", "1003520"]
    assert main([*arguments, "--png", str(tmp_path / "lengths.png")]) == 0
    *lines, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert [line["tokens"] for line in lines] == [sample.num_tokens for sample in realset]
    figures = summary["summary"]
    assert figures["tokens"] == sum(sample.num_tokens for sample in realset)
    by_capacity = {line["capacity"]: line for line in figures["by_capacity"]}
    assert by_capacity[8192]["packs"] == 208
    assert by_capacity[4096]["too_long"] == 30
    assert figures["padded_utilization"] < 0.4
    assert sum(figures["rows_by_tokens"].values()) == 2109
    assert figures["rows_by_tokens"]["128"] == sum(64 < s.num_tokens <= 128 for s in realset)
    with Image.open(tmp_path / "lengths.png") as picture:
        assert picture.size[0] > 1000


def test_a_row_that_cannot_be_encoded_is_refused(rows, shared, tmp_path, capsys, monkeypatch):
    from mmpack.data import chat_template
    from mmpack.errors import RowError

    def refuse(self, messages):
        raise RowError("the chat template rewrites this row's text", "clean the row")

    monkeypatch.setattr(chat_template.Template, "layout", refuse)
    arguments = ["--tokenizer", str(shared / "tokenizer" / "qwen2_vl"), "--json"]
    assert main(["check", rows, *arguments]) == 1
    *lines, _ = map(json.loads, capsys.readouterr().out.splitlines())
    assert [line["advice"] for line in lines][::2] == ["clean the row"] * 2


def test_no_picture_of_nothing(tmp_path, capsys):
    (tmp_path / "rows.json").write_text("[{}]")
    assert main(["check", str(tmp_path / "rows.json"), "--png", str(tmp_path / "a.png")]) == 1
    assert "no usable row to draw" in capsys.readouterr().err


def test_the_real_set_is_checked_in_seconds(shared):
    command = [sys.executable, "-m", "mmpack", "check"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*command, str(shared / "realset" / "realset_sft.json")], capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # A processor's, its workers' too: by the clock a busy machine takes longer.
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 0
    assert done.stdout.startswith("2,109 rows: 2,109 usable, 0 refused")
    assert seconds <= 3

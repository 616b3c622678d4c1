"""What users get wrong, and what others get in: the shared table, mutations, escapes."""

import copy
import json
import os
import random
import subprocess
import sys

import pytest
from PIL import Image

from mmpack import Encoder, Reader
from mmpack.cli.main import main
from mmpack.data.media_paths import MediaFolders

# How the rows that are a matter of policy end, as docs/data.md says.
POLICY = {
    "marker_in_answer": "reject",
    "literal_marker_quoted": "reject",
    "control_token_image_pad": "accept",
    "control_token_im_end": "accept",
    "image_string": "accept",
    "image_list_singular": "accept",
    "images_is_a_string": "accept",
    "images_of_dicts": "accept",
    "openai_messages": "accept",
    "ends_on_human": "reject",
    "system_in_the_middle": "accept",
    "value_is_a_number": "reject",
    "lone_surrogate": "reject",
    "absolute_path": "reject",
    "data_uri": "reject",
    "backslash_path": "accept",
    "grey16_png": "accept",
    "palette_png": "accept",
    "rgba_png": "accept",
    "exif_rotated_jpeg": "accept",
    "animated_gif": "accept",
    "very_long_text": "accept",
    "image_past_the_cut": "accept",
    "many_large_images": "accept",
    "files/array_named.jsonl": "reject",
    "files/lines_named.json": "reject",
    "files/duplicate_keys.jsonl": "accept",
}
# The table refuses it, but agents' logs have such turns, and the template writes them (docs/data.md).
ALLOWED = {"two_humans_in_a_row": "accept"}
# (usable, refused) rows of the files that are read at all.
ROWS_OF_FILES = {
    "files/broken_line.jsonl": (2, 1),
    "files/blank_lines.jsonl": (2, 0),
    "files/no_final_newline.jsonl": (2, 0),
    "files/crlf.jsonl": (2, 0),
    "files/bom.jsonl": (1, 0),
    "files/bom.json": (1, 0),
    "files/latin1.jsonl": (0, 1),
    "files/deep_value.jsonl": (1, 1),
    "files/nan_literal.jsonl": (1, 1),
    "files/duplicate_keys.jsonl": (1, 0),
    "files/single_quotes.jsonl": (0, 1),
}


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "malformed"


@pytest.fixture(scope="module")
def outcomes(folder):
    """case -> "accept" or "reject", every row of the table."""
    rows = json.loads((folder / "rows.json").read_text())
    assert len(rows) == 74
    ours = POLICY | ALLOWED
    return [(row["case"], ours.get(row["case"], row["expect"])) for row in rows]


def usable(outcomes):
    return [number for number, (_, expect) in enumerate(outcomes) if expect == "accept"]


def test_reading_ends_every_row_as_the_table_says(folder, outcomes):
    bad_rows = []
    samples = list(Reader(on_error=bad_rows, verify="decode").read(folder / "rows.json"))
    assert [sample.row for sample in samples] == usable(outcomes)
    assert sorted([*usable(outcomes), *(bad.row for bad in bad_rows)]) == list(range(74))
    for bad in bad_rows:
        assert bad.error
        assert bad.advice, outcomes[bad.row]
        assert len(str(bad)) < 600


def test_check_ends_every_row_as_the_table_says(folder, outcomes, capsys):
    assert main(["check", str(folder / "rows.json"), "--decode", "--json"]) == 1
    *lines, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert [line["row"] for line in lines if line["ok"]] == usable(outcomes)
    assert summary["summary"]["refused"] == 74 - len(usable(outcomes))
    for line in lines:
        assert line["ok"] == (line["error"] is None) == (line["advice"] is None)


def test_pack_ends_every_row_as_the_table_says(folder, outcomes, shared, tmp_path, capsys):
    from mmpack.store.encoded_store import open_store

    arguments = ["pack", str(folder / "rows.json"), "--out", str(tmp_path / "out"), "--json"]
    arguments += ["--tokenizer", str(shared / "tokenizer" / "qwen2_vl"), "--max-pixels", "1003520"]
    arguments += [
        "--capacity",
        "8192",
        "--decode",
        "--on-error",
        "skip",
        "--on-overflow",
        "truncate",
    ]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    store = open_store(tmp_path / "out")
    assert [sample.row for sample in store] == usable(outcomes)
    assert report["bad_rows"] == 74 - len(usable(outcomes))
    listed = (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()
    assert len(listed) == report["bad_rows"]
    # Longer than a pack: cut where the answer survives, dropped where it does not, and listed.
    long = [
        json.loads(line) for line in (tmp_path / "out" / "overflow.jsonl").read_text().splitlines()
    ]
    fates = {outcomes[line["row"]][0]: line["fate"] for line in long}
    assert fates == {
        "very_long_text": "cut",
        "image_past_the_cut": "dropped",
        "many_large_images": "dropped",
    }


def test_files_end_as_the_table_says(folder, capsys):
    entries = json.loads((folder / "files.json").read_text())
    assert len(entries) == 22
    for entry in entries:
        name = entry["file"]
        expect = POLICY[name] if entry["expect"] == "policy" else entry["expect"]
        bad_rows = []
        try:
            samples = list(Reader(media_dir=folder, on_error=bad_rows).read(folder / name))
        except ValueError as error:
            assert expect == "reject", name
            assert name.split("/")[1] in str(error)
            assert name not in ROWS_OF_FILES
        else:
            assert (len(samples), len(bad_rows)) == ROWS_OF_FILES[name]
            assert bool(bad_rows) == (expect == "reject"), name
        code = main(["check", str(folder / name), "--media-dir", str(folder)])
        assert code == (1 if expect == "reject" else 0), name
    capsys.readouterr()


def test_a_broken_file_leaves_the_next_one_usable(folder, capsys):
    paths = [str(folder / "files" / name) for name in ("gbk.json", "crlf.jsonl")]
    assert main(["check", *paths, "--media-dir", str(folder), "--json"]) == 1
    *lines, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert [(line["row"], line["ok"]) for line in lines] == [(None, False), (0, True), (1, True)]
    assert "gbk.json is not UTF-8 (byte" in lines[0]["error"]
    assert summary["summary"]["usable"] == 2


def test_no_row_opens_a_file_outside_or_a_socket(folder, tmp_path):
    code = """
import os, sys
import json
from mmpack import Reader
folder, extra = sys.argv[1:]
rows = json.load(open(folder + "/rows.json"))
list(Reader(media_dir=folder, on_error=[], verify="decode").read(rows[:3]))  # imports what it needs
rows += [{"conversations": rows[0]["conversations"], "images": [path]} for path in (
    "..\\\\..\\\\etc\\\\passwd", "images/../../../etc/hostname", "//etc/passwd", "~/.bashrc", "/dev/zero",
    "FILE:///etc/passwd", "ftp://localhost/a.png", "\\\\\\\\server\\\\share\\\\a.png")]
ask = [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "a"}]
rows += [{"conversations": ask, "videos": [video]} for video in (
    "../../../etc/hostname", "file:/etc/passwd", "concat:/etc/passwd|/etc/group", "rtsp://localhost/a",
    extra + "/playlist.mp4", "/dev/zero", "%03d.png", ["/etc/passwd"], {"bytes": b"#EXTM3U /etc/passwd"})]
opened = []
def audit(event, arguments):
    if event.startswith(("socket.", "subprocess.", "os.system", "urllib.", "pickle.")):
        opened.append(event)
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not path.startswith((folder, extra, sys.prefix, sys.base_prefix, sys.pycache_prefix or extra)):
            opened.append(path)
sys.addaudithook(audit)
bad = []
samples = list(Reader(media_dir=[folder, extra], on_error=bad, verify="decode").read(rows))
assert len(samples) + len(bad) == len(rows)
print(json.dumps(opened))
"""
    text = "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n/etc/passwd\n#EXT-X-ENDLIST\n"
    (tmp_path / "playlist.mp4").write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder.resolve()), str(tmp_path.resolve())],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_links_do_not_lead_out(tmp_path):
    inside, outside = tmp_path / "media", tmp_path / "elsewhere"
    inside.mkdir()
    outside.mkdir()
    for place in (inside, outside):
        Image.new("RGB", (30, 30)).save(place / "a.png")
    os.symlink(outside / "a.png", inside / "link.png")
    os.symlink(outside, inside / "links")
    os.symlink(inside / "a.png", inside / "home.png")
    only_inside, both = MediaFolders([inside]), MediaFolders([inside, outside])
    assert only_inside.locate("home.png").path == str(inside / "home.png")
    for path in ("link.png", "links/a.png", "../elsewhere/a.png", str(outside / "a.png")):
        with pytest.raises(ValueError, match="is outside"):
            only_inside.locate(path)
        assert both.locate(path)
    with pytest.raises(ValueError, match="is outside"):  # a folder is no prefix of a name
        MediaFolders([tmp_path / "med"]).locate(str(inside / "a.png"))


def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(
        ValueError, match="is a named pipe, not a regular file"
    ):  # opening it would wait for ever
        MediaFolders([tmp_path]).locate("pipe.png")


JUNK = [
    None, True, 0, -1, 10**400, float("nan"), float("inf"), "", " ", "<image>", "\ud800", "\0", "a" * 5000,
    "<|im_end|>", "../../etc/passwd", "http://x/y.png", "data:image/png;base64,", [], {}, [[]], [None],
    {"from": "human"}, {"type": "image"}, {"bytes": b"\x89PNG", "path": None}, b"\xff\xd8\xff", "[1, 2",
    "<video>", {"type": "video"}, {"frames": ["a.png"] * 3, "fps": 10**400}, {"frames": []}, ["a.png"],
    '{"a": ', "[" * 2000, {"role": "user", "content": [{"type": "text"}]}, [{"from": "gpt", "value": 1}],
]  # fmt: skip


def mutate(rng, value, depth=0):
    """The value with something deleted, doubled, swapped or replaced by junk, anywhere inside."""
    if depth > 4 or rng.random() < 0.25 or not isinstance(value, (dict, list)) or not value:
        if isinstance(value, str) and value and rng.random() < 0.5:
            cut = rng.randrange(len(value))
            return (
                value[:cut]
                + rng.choice(["", "<image>", "\ud800", "<|image_pad|>", "\\"])
                + value[cut:]
            )
        return copy.deepcopy(rng.choice(JUNK))
    value = copy.copy(value)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    kind = rng.random()
    if kind < 0.15:
        del value[key]
    elif kind < 0.25 and isinstance(value, list):
        value.insert(key, value[key])
    elif kind < 0.35 and isinstance(value, list):
        rng.shuffle(value)
    elif kind < 0.4 and isinstance(value, dict):
        value[rng.choice(["images", "image", "tools", "system", "messages", "history"])] = (
            rng.choice(JUNK)
        )
    else:
        value[key] = mutate(rng, value[key], depth + 1)
    return value


@pytest.mark.parametrize("count", [500, pytest.param(100_000, marks=pytest.mark.slow)])
def test_mutated_rows_end_in_samples_or_reasons(count, tmp_path, tokenizer, vision):
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    human, gpt = {"from": "human", "value": "<image>Hi"}, {"from": "gpt", "value": "Ho"}
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Hi"}]
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    seeds = [
        {"conversations": [human, gpt], "images": ["a.png"]},
        {
            "conversations": [human, gpt, {**human, "value": "So"}, gpt],
            "images": ["a.png"],
            "system": "S",
        },
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Ho"}]},
        {
            "conversations": [{**human, "value": "<video>Hi<image>"}, gpt],
            "videos": [{"frames": ["a.png", "a.png"], "fps": 2}],
            "images": ["a.png"],
        },
        {
            "instruction": "<image>",
            "input": "x",
            "output": "y",
            "history": [["a", "b"]],
            "image": "a.png",
        },
        {
            "messages": [
                {"role": "user", "content": "1"},
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "content": "2"},
                {"role": "assistant", "content": "3"},
            ],
            "tools": [{"name": "f"}],
        },
    ]
    rng = random.Random(count)
    rows = []
    for _ in range(count):
        row = rng.choice(seeds)
        for _ in range(rng.randint(1, 3)):
            row = mutate(rng, row)
        rows.append(row)
    bad_rows = []
    samples = list(Reader(media_dir=tmp_path, on_error=bad_rows, verify="decode").read(rows))
    encoded = list(Encoder(tokenizer, vision, on_error=bad_rows).encode(samples))
    assert {sample.row for sample in encoded} | {bad.row for bad in bad_rows} == set(range(count))
    assert 0.02 * count < len(encoded) < 0.9 * count  # both ends are met
    assert all(bad.error and len(str(bad)) < 1000 for bad in bad_rows)


@pytest.mark.parametrize("count", [200, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutated_files_end_in_samples_or_reasons(count, tmp_path):
    row = {"instruction": "Hi", "output": "Ho \u00e9\u4e2d", "history": [["a", "b"]]}
    rng = random.Random(count)
    for name in ("a.jsonl", "a.json", "a.csv"):
        if name == "a.csv":
            text = "instruction,output\n" + 'Hi,"Ho, \u4e2d"\n' * 4
        else:
            text = json.dumps([row] * 4) if name == "a.json" else (json.dumps(row) + "\n") * 4
        for _ in range(count // 3):
            data = bytearray(text.encode())
            for _ in range(rng.randint(1, 4)):
                place = rng.randrange(len(data))
                data[place : place + rng.choice([0, 1, 5])] = rng.choice(
                    [
                        b"",
                        b"\xff",
                        b"\0",
                        b'"',
                        b"\n",
                        b"[" * 50,
                        b"\xed\xa0\x80",
                        b"{",
                        b"9" * 5000,
                    ]
                )
            (tmp_path / name).write_bytes(bytes(data))
            bad_rows = []
            try:
                list(Reader(on_error=bad_rows).read(tmp_path / name))
            except ValueError as error:
                assert name in str(error)
            assert all(len(str(bad)) < 1000 for bad in bad_rows)

"""How a row may name a picture or a film: keys, `file:` URLs, base64, folders of frames; and what it is told when
it cannot be found."""

import base64
import dataclasses
import json
import os
import re
import sys
import unicodedata
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from mmpack import Reader, RowError
from mmpack.data import path_forms
from mmpack.data.media_paths import MediaFolders
from mmpack.types import ImageRef, VideoRef

ANSWER = {"role": "assistant", "content": "This."}


def row_of(*parts, **fields):
    user = {"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}
    return {"messages": [user, ANSWER], **fields}


@pytest.fixture
def folder(tmp_path):
    media = tmp_path / "media"
    (media / "frames").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(media / "a b.png")
    for n in (10, 2, 0, 1):
        Image.new("RGB", (60, 40), (n, 0, 0)).save(media / "frames" / f"{n}.png")
    Image.new("RGB", (60, 40)).save(tmp_path / "outside.png")
    return media


def media_of(row, folder, *more):
    (sample,) = Reader(media_dir=[folder, *more]).read([row])
    return sample.media


def content(folder):
    return (folder / "a b.png").read_bytes()


@pytest.mark.parametrize("key", ["path", "url", "image", "image_url", "value"])
@pytest.mark.parametrize("kind", ["image", "image_url"])
def test_each_key_of_a_part_is_the_path(key, kind, folder):
    gaps = {"text": None, "base64": "", "max_pixels": float("nan")}
    (ref,) = media_of(row_of({"type": kind, key: "a b.png", **gaps}), folder)
    assert ref == ImageRef(str(folder / "a b.png"), size=(40, 60))


def test_base64_is_taken_where_data_uris_are(folder):
    text = base64.b64encode(content(folder)).decode()
    lines = "\n".join(text[n : n + 76] for n in range(0, len(text), 76))
    for value in (text, lines, f"data:image/png;base64,{text}"):
        row = row_of({"type": "image", "base64": value})
        (ref,) = media_of(row, folder, "data:")
        assert ref.data == content(folder)
        with pytest.raises(ValueError, match="not allowed by default; allow .* --allow-data-uri"):
            media_of(row, folder)
    (ref,) = media_of(row_of({"type": "image"}, images=[{"base64": text}]), folder, "data:")
    assert ref.data == content(folder)
    for broken in ("/9j/", "a\u00fc", 7, "ab c="):
        with pytest.raises(ValueError, match="the base64 of the image is broken|is in none of"):
            media_of(row_of({"type": "image", "base64": broken}), folder, "data:")


def test_file_urls_are_paths(folder):
    path = str(folder / "a b.png")
    (folder / "50%20.png").write_bytes(content(folder))
    for url, found in (
        (f"file://{path}", path),
        (f"file://{quote(path)}", path),
        (f"FILE://localhost{quote(path)}", path),
        (f"file:{quote(path)}", path),
        (f"file://{folder}/50%20.png", str(folder / "50%20.png")),
        (f"file://{folder}/50%2520.png", str(folder / "50%20.png")),
    ):
        (ref,) = media_of(row_of({"type": "image", "image": url}), folder)
        assert ref.path == found
    frames = [f"file://{folder}/frames/{n}.png" for n in (0, 1)]
    (ref,) = media_of(row_of({"type": "video", "video": frames}), folder)
    assert [os.path.basename(frame.path) for frame in ref.frames] == ["0.png", "1.png"]
    (ref,) = media_of(row_of({"type": "video", "video": f"file://{folder}/frames"}), folder)
    assert len(ref.frames) == 4


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("file://{folder}/../outside.png", "is outside"),
        ("file://{folder}/%2e%2e/outside.png", "is outside"),
        ("file:///etc/passwd", "is outside"),
        ("file://server/a.png", "names the machine 'server'; write file:///"),
        ("file://a b.png", "has no absolute path; write file:/// and"),
        ("file://{folder}/%00.png", "is not a file name"),
        ("file://{folder}/%ff.png", "is not UTF-8"),
        ("http://x.org/a.png", "is a URL, not a file; download it first"),
        ("https://x.org/a.png", "is a URL, not a file; download it first"),
    ],
)
def test_urls_that_are_not_read(given, error, folder):
    given = given.format(folder=folder)
    for row in (row_of({"type": "image", "url": given}), row_of({"type": "image"}, images=[given])):
        with pytest.raises(ValueError, match=error):
            media_of(row, folder)


def test_a_folder_of_frames_is_a_list_of_them(folder):
    by_number = [str(folder / "frames" / f"{n}.png") for n in (0, 1, 2, 10)]
    for part, fps in (
        ({"video": "frames"}, None),
        ({"video": "frames", "fps": 4}, 4.0),
        ({"path": str(folder / "frames"), "sample_fps": 1.5}, 1.5),
        ({"video": {"frames": "frames", "fps": 3.0}}, 3.0),
    ):
        (ref,) = media_of(row_of({"type": "video", **part}), folder)
        assert [frame.path for frame in ref.frames] == by_number
        assert (ref.fps, ref.num_frames, ref.size, ref.options) == (fps, 4, (40, 60), None)
        (same,) = media_of(row_of({"type": "video", "video": by_number, "fps": fps}), folder)
        assert dataclasses.replace(ref, folder=None) == same
        assert (ref.folder, same.folder) == (str(folder / "frames"), None)
    row = row_of({"type": "video"}, videos=["frames"])
    assert [frame.path for frame in media_of(row, folder)[0].frames] == by_number
    with pytest.raises(ValueError, match="'nframes' is given for a list of frames"):
        media_of(row_of({"type": "video", "video": "frames", "nframes": 2}), folder)


def test_folders_that_are_no_video(folder, tmp_path, monkeypatch):
    (folder / "frames" / "notes.txt").write_text("x")
    (folder / "empty").mkdir()
    os.symlink(tmp_path, folder / "link")
    os.symlink(tmp_path / "outside.png", folder / "empty" / "0.png")
    for name, error in (
        ("frames", "has 'notes.txt', which is not a picture .1 such file.; move it away"),
        ("link", "is outside"),
        ("empty", "0.png is outside"),
        ("..", "is outside"),
        (".", "has 'empty', which is not a picture"),
    ):
        with pytest.raises(ValueError, match=error):
            media_of(row_of({"type": "video", "video": name}), folder)
    (folder / "empty" / "0.png").unlink()
    with pytest.raises(ValueError, match="empty has no frames; name a folder of pictures"):
        media_of(row_of({"type": "video", "video": "empty"}), folder)
    with pytest.raises(ValueError, match="frames is a folder, not a regular file"):
        media_of(row_of({"type": "image", "image": "frames"}), folder)
    monkeypatch.setattr(path_forms, "_MOST_FRAMES", 3)
    with pytest.raises(ValueError, match="has more than 3 files, too many for a video"):
        media_of(row_of({"type": "video", "video": "frames"}), folder)


def test_names_are_found_in_the_other_unicode_form(folder, caplog, monkeypatch):
    """A Mac's NFD on a disk of Linux, or the other way around; told once."""
    monkeypatch.setattr(path_forms, "_told", set())
    for on_disk, written in (("NFD", "NFC"), ("NFC", "NFD")):
        name = f"\u00e9t\u00e9-{on_disk}.png"
        path = folder / unicodedata.normalize(on_disk, name)
        path.write_bytes(content(folder))
        for _ in range(2):
            row = row_of({"type": "image", "image": unicodedata.normalize(written, name)})
            (ref,) = media_of(row, folder)
            assert ref.path == str(path)
            assert ref.size == (40, 60)
    assert [one.args[1] for one in caplog.records] == ["NFD", "NFC"]
    with pytest.raises(ValueError, match="does not exist"):
        media_of(row_of({"type": "image", "image": "\u00e0.png"}), folder)


def encoded(kind):
    """Base64 of a picture of noise, without a prefix."""
    import io

    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


MARKER_IN_TEXT = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "<image>What?"}]}, ANSWER],
    "images": ["a b.png"],
}
WORDS = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]}
ADVICE = [  # what a row has, what it is told, what it is advised
    (lambda: row_of({"type": "image", "image": encoded("JPEG")}), "is base64 of a JPEG file, without data: in front",
     "write data:image/jpeg;base64,... and allow it with --allow-data-uri"),
    (lambda: row_of({"type": "image"}, images=[encoded("PNG")]), "is base64 of a PNG file", "write data:image/png"),
    (lambda: row_of({"type": "image"}, image=encoded("GIF")), "is base64 of a GIF file", "write data:image/gif"),
    (lambda: row_of({"type": "image"}, image=encoded("WEBP")), "is base64 of a WEBP file", "write data:image/webp"),
    (lambda: row_of({"type": "image"}, image=encoded("BMP")), "is base64 of a BMP file", "write data:image/bmp"),
    (lambda: row_of({"type": "image"}, image=encoded("TIFF")), "is base64 of a TIFF file", "write data:image/tiff"),
    (lambda: {**WORDS, "images": [encoded("JPEG")]}, "0 <image> markers but 1 image", "add a marker"),
    (lambda: MARKER_IN_TEXT, "0 <image> markers but 1 image",
     'in content parts, an image is a part of its own: {"type": "image"}'),
    (lambda: {**WORDS, "images": ["a b.png"]}, "0 <image> markers but 1 image", "add a marker or drop"),
    (lambda: row_of({"type": "image"}), "1 <image> marker but 0 images", "add the missing image"),
    (lambda: row_of({"type": "image", "url": "https://x.org/a.png"}), "is a URL, not a file", "download it first"),
    (lambda: row_of({"type": "image", "image": "none.png"}), "none.png does not exist", "fix the path or --media-dir"),
    (lambda: row_of({"type": "image", "image": "Qk.png"}), "Qk.png does not exist", "fix the path"),
    (lambda: row_of({"type": "image", "image": "../outside.png"}), "is outside", "add its folder with --media-dir"),
    (lambda: row_of({"type": "image", "image": "data:image/png;base64,AA"}), "is a data URI", "--allow-data-uri"),
    (lambda: row_of({"type": "image", "base64": "AA"}), "is given as 'base64' in the row", "--allow-data-uri"),
    (lambda: row_of({"type": "image", "path": "a", "base64": "AA"}), "part of turn 0 has 'path' and 'base64'", "keep one"),
    (lambda: row_of({"type": "image"}, images=[{"file": "a b.png"}]), "an image needs 'path' or 'bytes', got ['file']",
     "rename its keys"),
    (lambda: row_of({"type": "video"}, videos=[{"path": "x.mp4", "start": 1}]), "a video has the unknown key 'start'",
     "remove it; keys are"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(ADVICE)))
def test_advice_comes_from_what_is_there(number, folder):
    row, error, advice = ADVICE[number]
    bad = []
    assert not list(Reader(media_dir=folder, on_error=bad).read([row()]))
    assert error in bad[0].error
    assert advice in bad[0].advice


def test_a_path_that_looks_like_base64_is_a_path_if_it_is_there(folder):
    place = folder / "Qk" / ("A" * 60)
    place.parent.mkdir()
    place.write_bytes(content(folder))
    (ref,) = media_of(row_of({"type": "image", "image": f"Qk/{'A' * 60}"}), folder)
    assert ref.path == str(place)


def test_bytes_and_dicts_of_other_tools_are_read_as_before(folder):
    """The forms of `datasets`, with the nulls that Arrow adds."""
    data = content(folder)
    for value in (
        {"bytes": data, "path": None},
        {"bytes": data, "path": "a b.png"},
        {"bytes": None, "path": "a b.png", "max_pixels": None},
        data,
        Image.open(folder / "a b.png"),
    ):
        for row in (
            row_of({"type": "image"}, images=[value]),
            row_of({"type": "image", "image": value}),
        ):
            (ref,) = media_of(row, folder)
            assert ref.size == (40, 60)
            assert ref.options is None


def test_rows_of_a_file_are_as_rows_in_memory(folder):
    rows = [
        row_of({"type": "image", "url": "a b.png", "max_pixels": 3136}),
        row_of({"type": "video", "path": "frames"}),
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [sample.media[0] for sample in Reader().read(folder / "rows.jsonl")]
    assert found == [media_of(row, folder)[0] for row in rows]
    assert found[0].options.max_pixels == 3136
    assert isinstance(found[1], VideoRef)


def test_folders_are_checked_before_a_file_url_is_opened(folder):
    with pytest.raises(RowError, match="is outside"):
        MediaFolders([folder]).locate(Path("/etc/hostname").as_uri())


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [
        ("pyarrow", "rows.parquet", "train"),
        ("pyarrow", "rows.arrow", "train"),
        ("pyarrow", "rows.jsonl.zst", "train"),
        ("av", "film.mp4", "video"),
    ],
)
def test_a_missing_package_is_told_with_an_extra_that_holds_it(
    module, name, extra, folder, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)
    (folder / name).write_bytes(b"\0" * 64)
    rows = [row_of({"type": "video", "path": name})] if extra == "video" else folder / name
    with pytest.raises(ValueError, match=rf"{name} needs .*; pip install 'mmpack\[{extra}\]'"):
        list(Reader(media_dir=folder).read(rows))
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    (held,) = re.findall(rf"^{extra} = (\[.*\])$", project, re.M)
    assert f'"{module}>=' in held

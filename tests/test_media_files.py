"""Disguised images and videos: nothing starts a program, hangs, or is read outside the media folders."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image, ImageFile

from mmpack import Encoder, PackedDataset, Reader, assemble
from mmpack.cli.demo import write_data
from mmpack.cli.main import main
from mmpack.data import images, videos
from mmpack.data.media_paths import open_media
from mmpack.errors import RowError
from mmpack.hf import PackCollator
from mmpack.types import ImageRef, VideoRef

TURNS = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "This."}]
CLIP = [{"from": "human", "value": "<video>What?"}, TURNS[1]]
EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 80 60
%%EndComments
0 0 80 60 rectfill
showpage
%%EOF
"""


def write_rows(folder, *media, key="images"):
    """A row for each, in rows.json; its path."""
    turns = TURNS if key == "images" else CLIP
    rows = [{"conversations": turns, key: [value]} for value in media]
    (folder / "rows.json").write_text(json.dumps(rows))
    return str(folder / "rows.json")


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """(the demo's folder with 8 rows packed, options of a short training on it)"""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    write_data(folder, 8)
    arguments = ["pack", folder / "train.json", "--tokenizer", folder / "tokenizer"]
    arguments += ["--capacity", 2048, "--quiet", "--out", tmp_path / "packed"]
    assert main([str(argument) for argument in arguments]) == 0
    training = ["train", "--config", str(folder / "config.json"), "--steps", "1", "--use_cpu"]
    training += ["--save_strategy", "no", "--disable_tqdm", "True", "--data"]
    return folder, [*training, str(tmp_path / "packed")]


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A program that Pillow takes for Ghostscript; the file it would write."""
    programs, ran = tmp_path / "bin", tmp_path / "ran"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\necho ran >> {ran}\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # it is looked up once
    return ran


WATCHED = """
import json, sys
started = []
def audit(event, arguments):
    if event.startswith(("subprocess.", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.fork")):
        started.append(event)
sys.addaudithook(audit)
from mmpack.cli.main import main
code = main(["check", sys.argv[1], "--decode", "--quiet", "--bad", sys.argv[2]])
print(json.dumps([code, started]))
"""


def test_no_row_starts_a_program(tmp_path, ghostscript):
    """PostScript under any name, in any place of a row where a picture may be."""
    for name in ("a.png", "b.eps", "c.jpg", "d.webp"):
        (tmp_path / name).write_bytes(EPS)
    Image.new("RGB", (80, 60)).save(tmp_path / "good.png")
    (tmp_path / "a.mp4").write_bytes(EPS)
    rows = [{"conversations": TURNS, "images": [n]} for n in ("a.png", "b.eps", "c.jpg", "d.webp")]
    rows += [{"conversations": CLIP, "videos": [v]} for v in (["a.png", "a.png"], "a.mp4")]
    rows += [{"conversations": TURNS, "images": ["good.png"]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = [sys.executable, "-c", WATCHED, str(tmp_path / "rows.json"), str(tmp_path / "bad")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [1, []]
    assert not ghostscript.exists()
    bad = [json.loads(line) for line in (tmp_path / "bad").read_text().splitlines()]
    assert [line["row"] for line in bad] == [0, 1, 2, 3, 4, 5]
    assert all("is in none of the formats JPEG, PNG," in line["error"] for line in bad[:5])


def test_a_training_ends_where_a_picture_became_something_else(
    packed, ghostscript, monkeypatch, capsys
):
    """PostScript, a cut picture in a process that is lenient with them, a named pipe."""
    folder, training = packed
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    path = sorted((folder / "charts").iterdir())[0]
    content = path.read_bytes()
    with Image.open(path) as picture:
        size = picture.size
    path.write_bytes(EPS.replace(b"80 60", b"%d %d" % size))
    assert main(training) == 1
    assert "is in none of the formats JPEG, PNG," in capsys.readouterr().err
    assert not ghostscript.exists()
    path.write_bytes(content[:-60])
    assert main(training) == 1
    assert "cannot be decoded" in capsys.readouterr().err
    path.unlink()
    os.mkfifo(path)
    assert main(training) == 1
    assert "is a named pipe, not a regular file" in capsys.readouterr().err


def test_formats_are_those_of_the_docs(tmp_path):
    """Each is read; what Pillow also opens is not."""
    picture = Image.new("RGB", (80, 60), "red")
    read = ["BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"]
    if "AVIF" in Image.registered_extensions().values():
        read.append("AVIF")
    for name in [*read, "EPS", "ICO", "TGA", "PCX", "SGI", "IM"]:
        picture.save(tmp_path / "a.png", format=name)
        ref = ImageRef(str(tmp_path / "a.png"))
        if name in read:
            assert images.probe(ref, decode=True) == (60, 80), name
        else:
            with pytest.raises(RowError, match="is in none of the formats JPEG, PNG,"):
                images.probe(ref)


# -- only regular files


def test_what_is_no_file_is_refused_at_once(tmp_path):
    """At the door of the pixels, where a path of a store or of a hand-made sample comes too."""
    os.mkfifo(tmp_path / "pipe.webp")
    (tmp_path / "folder.png").mkdir()
    os.symlink("/dev/zero", tmp_path / "zero.png")
    os.symlink("/dev/tty", tmp_path / "terminal.png")
    kinds = {
        "pipe.webp": "a named pipe",
        "folder.png": "a folder",
        "zero.png": "a device",
        "terminal.png": "a device",
    }
    for name, kind in kinds.items():
        path = str(tmp_path / name)
        with pytest.raises(RowError, match=f"image .*{name} is {kind}, not a regular file"):
            images.probe(ImageRef(path))
        with pytest.raises(RowError, match=f"image .*{name} is {kind}, not a regular file"):
            images.load_patches(ImageRef(path), (1, 4, 4), _spec())
        with pytest.raises(RowError, match=f"video .*{name} is {kind}, not a regular file"):
            videos.probe(VideoRef(path))
        with pytest.raises(RowError, match=f"image .*{name} is {kind}, not a regular file"):
            videos.probe(VideoRef(path, frames=(ImageRef(path),)))


def test_rows_say_what_is_no_file(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for key in ("images", "videos"):
        assert main(["check", write_rows(tmp_path, "pipe", "folder", key=key)]) == 1
        out = capsys.readouterr().out
        assert "pipe is a named pipe, not a regular file" in out
        found = "has no frames" if key == "videos" else "is a folder, not a regular file"
        assert f"folder {found}" in out


def test_a_pipe_put_where_a_file_was_does_not_hang(tmp_path, monkeypatch):
    """Between the look and the opening."""
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    regular, real = os.stat(tmp_path / "a.png"), os.stat
    monkeypatch.setattr(
        os, "stat", lambda path, **o: regular if str(path).endswith("pipe.png") else real(path, **o)
    )
    with pytest.raises(RowError, match="is a named pipe, not a regular file"):
        open_media(str(tmp_path / "pipe.png"), "image")


# -- media folders, when files are opened


def test_a_training_names_its_media_folders_and_stays_inside(packed, tmp_path, capsys):
    folder, training = packed
    assert main(training) == 0
    assert f"images and videos are read from {folder}\n" in capsys.readouterr().out
    other = tmp_path / "other"
    other.mkdir()
    assert main([*training, "--media-dir", str(other)]) == 1
    text = capsys.readouterr()
    assert f"images and videos are read from {other}\n" in text.out
    assert f"is outside {other}" in text.err
    assert "--media-dir" in text.err


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_link_that_leads_out_later_is_refused(packed, tmp_path, capsys, is_packed):
    """Of a store, and of rows read by the training itself before the link changed."""
    folder, training = packed
    elsewhere = tmp_path / "elsewhere"
    (folder / "charts").rename(elsewhere)
    inside = folder / "inside"
    inside.mkdir()
    for path in elsewhere.iterdir():
        (inside / path.name).write_bytes(path.read_bytes())
    (folder / "charts").symlink_to(inside)
    if is_packed:
        (folder / "charts").unlink()
        (folder / "charts").symlink_to(elsewhere)
        assert main(training) == 1
        assert f"is outside {folder}" in capsys.readouterr().err
        assert main([*training, "--media-dir", str(tmp_path)]) == 0
        return
    encoder = Encoder.from_folder(folder / "tokenizer")
    dataset = PackedDataset.from_files(folder / "train.json", encoder, 2048)
    assert assemble(dataset[0]).pixels is not None
    (folder / "charts").unlink()
    (folder / "charts").symlink_to(elsewhere)
    with pytest.raises(ValueError, match=f"row .* is outside {folder}"):
        [assemble(item) for item in dataset]
    dataset.media_folders = [folder, elsewhere]
    assert [assemble(item) for item in dataset]


# -- decoded means decoded


def _spec():
    from mmpack import VisionSpec

    return VisionSpec(min_pixels=56 * 56, max_pixels=28 * 28 * 64)


@pytest.mark.parametrize(
    "name", ["BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP", "AVIF"]
)
def test_a_cut_picture_is_refused_whatever_pillow_is_set_to(tmp_path, monkeypatch, name):
    if name == "AVIF" and name not in Image.registered_extensions().values():
        pytest.skip("this Pillow reads no AVIF")
    import numpy as np

    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    path = tmp_path / "a"
    Image.fromarray(noise).save(path, format=name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    rows = write_rows(tmp_path, "a")
    for lenient in (False, True):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
        with pytest.raises(
            ValueError, match="cannot be (decoded|opened)|is in none of the formats JPEG"
        ):
            list(Reader(verify="decode").read(rows))
        with pytest.raises(
            ValueError, match="cannot be (decoded|opened)|is in none of the formats JPEG"
        ):
            images.load_patches(ImageRef(str(path)), _spec().image_grid(100, 100), _spec())
        assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient  # it is the process's own


def test_a_film_with_fewer_frames_than_promised_is_refused(tmp_path, capsys):
    from test_video_files import film

    path = film(tmp_path / "a.mp4", options={"movflags": "faststart"})
    data = open(path, "rb").read()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 3 // 4])
    rows = write_rows(tmp_path, "a.mp4", "cut.mp4", key="videos")
    assert main(["check", rows, "--decode"]) == 1
    out = capsys.readouterr().out
    assert "2 rows: 1 usable, 1 refused" in out
    assert "cut.mp4 has fewer frames than its header says:" in out
    assert "of 20 could be decoded" in out


def test_media_folders_travel_to_workers_and_are_checked(packed, tmp_path):
    import pickle

    dataset = PackedDataset.from_store(tmp_path / "packed")
    dataset.media_folders = tmp_path / "nowhere"
    other = pickle.loads(pickle.dumps(dataset))  # what spawned workers get
    assert other.media_folders == dataset.media_folders == [str(tmp_path / "nowhere")]
    with pytest.raises(ValueError, match="row .* is outside .*nowhere"):
        PackCollator()([other[0]])
    dataset.media_folders = None
    assert assemble(dataset[0]).pixels is not None
    from mmpack.store.encoded_store import reuse_store

    about = replace(dataset.samples.about, media_folders=(3,))
    with pytest.raises(ValueError, match="'media_folders'.* is 3, not a string"):
        reuse_store(tmp_path / "crafted", dataset.samples, about)

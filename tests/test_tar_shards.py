"""Tar shards as data files: which members are a sample, what is refused by name, and which files are read."""

import logging
import re
import tarfile

import pytest
from tar_files import captions, chat, picture, write_tar

from mmpack.data import tar_shards
from mmpack.data.data_paths import data_files
from mmpack.data.media_paths import open_media
from mmpack.data.readers import Reader


def read(path, **options):
    """(samples, bad rows)."""
    bad = []
    return list(Reader(on_error=bad, **options).read(path)), bad


def names(sample):
    return [image.member.name for image in sample.images]


def text(sample):
    return "".join(p if isinstance(p, str) else "#" for m in sample.messages for p in m.content)


# --------------------------------------------------------------------------------------------------
# Samples
# --------------------------------------------------------------------------------------------------

P = [picture(n, size=(28, 28)) for n in range(12)]
TWO = "<image><image>Which?"


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("a.jpg", P[0]), ("a.json", chat())], ["a.jpg"]),
        ([("a.json", chat()), ("a.JPG", P[0])], ["a.JPG"]),
        ([("b/a.x.PNG", P[0]), ("b/a.json", chat())], ["b/a.x.PNG"]),
        ([("a.1.png", P[0]), ("a.json", chat(TWO)), ("a.0.png", P[1])], ["a.0.png", "a.1.png"]),
        ([("a.left.png", P[0]), ("a.json", chat(TWO)), ("a.back.png", P[1])], ["a.left.png", "a.back.png"]),
        (
            [*((f"a.{n}.png", P[n]) for n in (0, 1, 10, 11, 2)), ("a.json", chat("<image>" * 5))],
            [f"a.{n}.png" for n in (0, 1, 2, 10, 11)],
        ),
        ([("a.0.png", P[0]), ("a.1.png", P[1]), ("a.json", chat(TWO, images=["1.png", "0.PNG"]))], ["a.1.png", "a.0.png"]),
        ([("a.0.png", P[0]), ("a.json", chat(TWO, images=["0.png", "0.png"]))], ["a.0.png", "a.0.png"]),
        ([("c/a.0.png", P[0]), ("c/a.json", chat(image="c/a.0.png"))], ["c/a.0.png"]),
        ([("c/a.0.png", P[0]), ("c/a.json", chat(images=[{"path": "a.0.png"}]))], ["c/a.0.png"]),
        (
            [("a.0.png", P[0]), ("a.json", {"messages": [
                {"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": "q"}]},
                {"role": "assistant", "content": "a"}]})],
            ["a.0.png"],
        ),
        ([("a.png", P[0]), ("a.json", {"conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]})], ["a.png"]),
        ([("a.png", P[0]), ("a.json", {"prompt": "<image>q", "completion": "a"})], ["a.png"]),
        ([("a.json", chat("no image"))], []),
        ([("a.json", chat("no image")), ("a.txt", b"text")], []),
    ],
)  # fmt: skip
def test_rows_have_their_images(tmp_path, members, expected):
    samples, bad = read(write_tar(tmp_path / "a.tar", members))
    assert bad == []
    assert [names(sample) for sample in samples] == [expected]
    assert (samples[0].source, samples[0].row) == ("a.tar", 0)
    by_name = dict(members)
    for image in samples[0].images:
        assert image.path == str(tmp_path / "a.tar")
        with open_media(image.path, "image", member=image.member) as file:
            assert file.read() == by_name[image.member.name]


@pytest.mark.parametrize(
    ("members", "expected", "unread"),
    [
        ([("a.jpg", P[0]), ("a.txt", b"A cat.\n")], "#A cat.", ""),
        ([("a.txt", "\ufeffA  café \r\n".encode()), ("a.0.jpg", P[0]), ("a.1.jpg", P[1])], "##A  café ", ""),
        ([("a.jpg", P[0]), ("a.txt", b"Before <image> after")], "Before # after", ""),
        ([("a.txt", b"Only text.")], "Only text.", ""),
        # img2dataset's shards
        ([("a.jpg", P[0]), ("a.txt", b"A cat."), ("a.json", {"caption": "A cat.", "url": "u"})], "#A cat.", "*.json (1 row)"),
        ([("a.jpg", P[0]), ("a.txt", b"A cat."), ("a.json", [1])], "#A cat.", "*.json (1 row)"),
        ([("a.jpg", P[0]), ("a.txt", b"not this"), ("a.json", {"text": "This: <image>"})], "This: #", "*.txt (1 row)"),
        ([("a.jpg", P[0]), ("a.txt", b"A cat."), ("a.cls", b"1"), ("README", b"r"), ("._a.jpg", b"r")],
         "#A cat.", "(no extension) (1 row), *.cls (1)"),
    ],
)  # fmt: skip
def test_captions_are_documents(tmp_path, caplog, members, expected, unread):
    path = write_tar(tmp_path / "a.tar", members)
    samples, bad = read(path, stage="pretrain")
    assert bad == []
    assert [text(sample) for sample in samples] == [expected]
    told = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert told == ([f"a.tar: unread fields: {unread}"] if unread else [])


def test_what_is_not_named_is_told_once_per_file(tmp_path, caplog):
    members = [(f"{n}{end}", content) for n in range(3) for end, content in (
        (".0.png", P[0]), (".mask.png", P[1]), (".npy", b"1"), (".json", chat(images=["0.png"])),
    )]  # fmt: skip
    read(write_tar(tmp_path / "a.tar", members))
    told = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert told == ["a.tar: unread fields: *.mask.png (3 rows), *.npy (3)"]


LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([("a.json", chat())], r"1 <image> marker but 0 images \(sample a.json \(byte 0\)\); add the missing image"),
        ([("a.json", chat()), ("a.0.png", P[0]), ("a.1.png", P[1])], r"1 <image> marker but 2 images \(sample a.json"),
        ([("a.json", chat(images=["1.png"])), ("a.0.png", P[0])],
         r"the row names the image 1.png, which is not in its sample; images and videos there: \['0.png'\]"),
        ([("a.json", chat(images=["/etc/passwd.png"]))], "names the image /etc/passwd.png, which is not in its sample"),
        ([("a.json", chat(images=["../b.png"]))], "names the image ../b.png, which is not in its sample"),
        ([("a.json", chat(images=["https://a.b/c.png"]))], "names the image https://a.b/c.png, which is not in its sample"),
        ([("a.json", chat(images=["data:image/png;base64,aaaa"]))], "is a data URI; these are not allowed by default"),
        ([("a.png", P[0]), ("a.PNG", P[1]), ("a.json", chat())],
         r"sample a \(byte 0\): the member a.PNG \(byte [\d,]+\) has the key and extension of a.png \(byte 0\)"),
        ([("a.json", chat("q")), ("a.json", chat("q"))], "has the key and extension of a.json"),
        ([("a.json", chat()), ("a.png", LINK)], r"sample a \(byte 0\): the member a.png \(byte [\d,]+\) is a symbolic link"),
        ([("a.json", chat()), ("a.png", {"type": tarfile.LNKTYPE, "linkname": "b"})], "a.png .* is a hard link"),
        ([("a.json", chat()), ("a.png", {"type": tarfile.FIFOTYPE})], "a.png .* is a named pipe"),
        ([("a.json", chat()), ("a.png", {"type": tarfile.CHRTYPE})], "a.png .* is a device"),
        ([("a.json", chat()), ("a.png", {"type": tarfile.BLKTYPE})], "a.png .* is a device"),
        ([("a.json", chat()), ("a.png", {"type": b"Z"})], "a.png .* is of unknown type b'Z'"),
        ([("a.json", chat()), ("a.png", {"type": b"0", "pax_headers": {"GNU.sparse.major": "1"}})], "is a sparse file"),
        ([("/a.json", chat("q"))], r"the member /a.json \(byte 0\) has an absolute name"),
        ([("x/../../a.json", chat("q"))], r"the member x/../../a.json \(byte 0\) has '..' in its name"),
        ([("..", b"x")], r"the member .. \(byte 0\) has '..' in its name"),
        ([("link", LINK)], r"the member link \(byte 0\) is a symbolic link"),
        ([("a.json", b"{")], r"sample a \(byte 0\): the member a.json \(byte 0\) is not JSON: "),
        ([("a.json", b"[" * 1000 + b"]" * 1000)], "is not JSON: nested too deeply"),
        ([("a.json", b"3")], r"a row must be an object, got int \(sample a.json \(byte 0\)\)"),
        ([("a.json", b"\xff")], r"the member a.json \(byte 0\) is not UTF-8 \(byte 0 of it\)"),
        ([("a.png", P[0]), ("a.cls", b"1")], r"it has no .json and no .txt, only \['cls', 'png'\]"),
        ([("a.png", P[0]), ("a.txt", b"A cat.")],
         r"the sample has a text \(.txt\) and no conversation \(sample a.png \(byte 0\)\); for captions"),
        ([("a.png", b"no"), ("a.json", chat())], r"image a.png \(byte 512 of .*a.tar\) is in none of the formats"),
        ([("a.png", P[0][:900]), ("a.json", chat())], r"image a.png \(byte 512 of .*a.tar\) cannot be decoded"),
        ([("a.png", b""), ("a.json", chat())], r"image a.png \(byte 512 of .*a.tar\) is in none of the formats"),
    ],
)  # fmt: skip
def test_a_sample_that_cannot_be_used_is_a_bad_row_between_good_ones(tmp_path, members, why):
    around = [[(f"{name}.png", P[3]), (f"{name}.json", chat())] for name in ("first", "last")]
    shifted = tmp_path / "a.tar"
    samples, bad = read(write_tar(shifted, [*members, *around[1]]))
    assert [(sample.source, sample.row) for sample in samples] == [("a.tar", 1)]
    assert [(one.source, one.row) for one in bad] == [("a.tar", 0)]
    assert re.search(why, str(bad[0])), str(bad[0])
    samples, bad = read(write_tar(shifted, [*around[0], *members, *around[1]]))
    assert [sample.row for sample in samples] == [0, 2]
    assert [one.row for one in bad] == [1]


def test_a_name_that_is_not_text_is_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.json", chat("q"))], tarfile.USTAR_FORMAT)
    info = tarfile.TarInfo("b\udcff.json")
    blocks = [info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape"), path.read_bytes()]
    path.write_bytes(b"".join(blocks))
    samples, bad = read(path)
    assert [sample.row for sample in samples] == [1]
    assert "has a name that is not UTF-8 text" in bad[0].error


def test_a_name_is_at_most_a_path(tmp_path):
    members = [("a" * 5000 + ".json", chat("q")), ("a" * 4000 + ".json", chat("q"))]
    samples, bad = read(write_tar(tmp_path / "a.tar", members))
    assert [sample.row for sample in samples] == [1]
    assert "has a name of 5,005 characters" in bad[0].error and len(bad[0].error) < 1000


def test_an_old_sparse_member_is_refused_and_passed_over(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.json", chat("q"))], tarfile.GNU_FORMAT)
    info = tarfile.TarInfo("b.png")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[482] = 1  # a block extends its map
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    path.write_bytes(bytes(block) + bytes(512) + b"x" * 512 + path.read_bytes())
    samples, bad = read(path)
    assert [sample.row for sample in samples] == [1]
    assert "the member b.png (byte 0) is a sparse file" in bad[0].error


def test_a_key_comes_once(tmp_path):
    members = [("a.png", P[0]), ("b.json", chat("q")), ("a.json", chat()), ("b.png", P[0])]
    samples, bad = read(write_tar(tmp_path / "a.tar", members))
    assert [sample.row for sample in samples] == [1]
    errors = [one.error for one in bad]
    assert "it has no .json and no .txt" in errors[0]
    assert "sample a (byte 4,096): the key a comes again at byte" in errors[1]
    assert "the key b comes again at byte" in errors[2]


def test_keys_are_few_bytes_each():
    keys = tar_shards._Keys()
    keys._recent.update(range(-(1 << 16) - 1, -1))  # so that they soon go to the array
    assert all(keys.add(f"{n}") for n in range(100))
    assert len(keys._sorted) > 1 << 16 and len(keys._recent) < 100
    assert not any(keys.add(f"{n}") for n in range(100))
    assert keys.add("100")


def test_videos_are_members_too(tmp_path):
    pytest.importorskip("av")
    from test_media_fuzz import film

    clip = film("mpeg4", "mp4")
    turns = chat("<video>What?")
    path = write_tar(tmp_path / "a.tar", [("a.mp4", clip), ("a.json", turns)])
    samples, bad = read(path)
    assert bad == [] and samples[0].videos[0].num_frames > 0
    assert samples[0].videos[0].member.name == "a.mp4"
    frames = [
        ("a.0.png", P[0]),
        ("a.1.png", P[1]),
        ("a.json", {**turns, "videos": [["0.png", "1.png"]]}),
    ]
    samples, bad = read(write_tar(path, frames))
    assert bad == [] and [f.member.name for f in samples[0].videos[0].frames] == [
        "a.0.png",
        "a.1.png",
    ]
    _, bad = read(write_tar(path, [("a.mp4", clip), ("a.txt", b"text")]), stage="pretrain")
    assert "the sample has a video" in bad[0].error
    _, bad = read(write_tar(path, [("a.mp4", clip[:200]), ("a.json", turns)]))
    assert f"video a.mp4 (byte 512 of {path}) is not a video FFmpeg can read" in bad[0].error


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def test_folders_globs_and_braces(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(8, 12):
        write_tar(folder / f"train-{number:05d}.tar", captions([number]))

    def read_at(name):
        return [path.name[6:11] for path in data_files(name)]

    everything = ["00008", "00009", "00010", "00011"]
    assert read_at(folder) == read_at(folder / "*.tar") == everything
    assert read_at(folder / "train-{00008..00011}.tar") == everything
    assert read_at(folder / "train-000{11..10}.tar") == ["00011", "00010"]
    assert read_at(folder / "train-000{08,1?}.tar") == ["00008", "00010", "00011"]
    assert len(list(Reader().read(folder / "train-*.tar"))) == 4
    with pytest.raises(ValueError, match=r"train-00012.tar: no such file"):
        data_files(folder / "train-{00011..00012}.tar")
    with pytest.raises(ValueError, match=r"no file matches .*/val-\*.tar; fix the path"):
        data_files(folder / "val-*.tar")
    with pytest.raises(ValueError, match=r"stands for 1,000,001 files, at most 100,000 are read"):
        data_files(folder / "{0..1000000}.tar")
    with pytest.raises(ValueError, match=r"stands for 1,000,000 files, at most 100,000 are read"):
        data_files(folder / "{0..999}{0..999}.tar")
    marked = folder.with_name("run[1]")
    marked.symlink_to(folder)
    (tmp_path / "run1").mkdir()  # which the name would match
    write_tar(tmp_path / "run1" / "train-00020.tar", captions([20]))
    assert read_at(marked / "train-{00008..00011}.tar") == everything
    assert read_at(marked / "train-*.tar") == read_at(tmp_path / "run?1?" / "*.tar") == everything
    assert read_at(tmp_path / "run[12]" / "*.tar") == ["00020"]
    (folder / "val-00000.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"files of several splits \['train', 'val'\]; name the"):
        data_files(folder)


@pytest.mark.parametrize("suffix", ["tar.gz", "tgz", "TAR.ZST", "tar.bz2", "tar.xz"])
def test_compressed_shards_are_refused_with_advice(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"")
    for named in (path, tmp_path):
        with pytest.raises(
            ValueError, match=r"is a compressed tar file, .*; decompress it \(gunzip"
        ):
            data_files(named)
    write_tar(tmp_path / "b.tar", captions([1]))
    with pytest.raises(ValueError, match="is a compressed tar file"):  # not left out in silence
        data_files(tmp_path)


def test_an_archive_without_samples_is_an_error(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("folder", {"type": tarfile.DIRTYPE}), ("README", b"")])
    with pytest.raises(ValueError, match=r"a.tar holds no rows"):
        list(Reader().read(path))

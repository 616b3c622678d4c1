"""Tar shards as data files: which members are a sample, what is refused by name, and that nothing else is read."""

import io
import json
import logging
import os
import re
import resource
import tarfile

import pytest
from tar_files import captions, chat, picture, write_tar

from mmpack.cli.main import main
from mmpack.data import archives, images, tar_shards
from mmpack.data.data_paths import data_files
from mmpack.data.media_paths import MediaFolders, open_media
from mmpack.data.readers import Reader
from mmpack.data.tar_headers import TornArchiveError, entries
from mmpack.errors import RowError, Skip

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def read(path, **options):
    """(samples, bad rows)."""
    bad = []
    return list(Reader(on_error=bad, **options).read(path)), bad


def names(sample):
    return [image.member.name for image in sample.images]


def text(sample):
    return "".join(p if isinstance(p, str) else "#" for m in sample.messages for p in m.content)


# --------------------------------------------------------------------------------------------------
# The format
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_members_are_where_tarfile_finds_them(tmp_path, format):
    long = "folder/" * (12 if format == tarfile.USTAR_FORMAT else 40)  # ustar: up to 255 characters
    plain = ["a.png", f"{long}b.png", "./c.png", "d" * 100 + ".png"[: 100 if format else 0]]
    plain[3] = ("d" * 96 if format == tarfile.USTAR_FORMAT else "d" * 150) + ".png"
    if format != tarfile.USTAR_FORMAT:
        plain.append("käse/日本.png")
    members = [
        ("folder", {"type": tarfile.DIRTYPE}),
        *((name, name.encode() * 50) for name in plain),
    ]
    path = write_tar(tmp_path / "a.tar", members, format)
    found = list(entries(archives.open_archive(str(path))))
    with tarfile.open(path) as tar:
        expected = [(m.name.removeprefix("./"), m.offset_data, m.size) for m in tar if m.isfile()]
    assert [(one.name, one.offset, one.length) for one in found] == expected
    assert [one.flaw for one in found] == [""] * len(plain)
    for one, (_, content) in zip(found, members[1:]):
        member = tar_shards.TarMember(
            one.name, one.offset, one.length, one.header, path.stat().st_size
        )
        with open_media(str(path), "image", member=member) as file:
            assert file.read() == content
            assert file.seek(-3, io.SEEK_END) == len(content) - 3
            assert file.read(10) == content[-3:]


def test_a_large_size_is_in_bytes(tmp_path):
    """GNU's form of a number above 8 GiB; the file is sparse, nothing of it is read."""
    info = tarfile.TarInfo("a.png")
    info.size = 9 << 30
    header = info.tobuf(tarfile.GNU_FORMAT)
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(header)
        file.truncate(512 + info.size + 1024)
    (found,) = entries(archives.open_archive(str(tmp_path / "a.tar")))
    assert (found.offset, found.length, found.flaw) == (512, 9 << 30, "")
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(info.tobuf(tarfile.PAX_FORMAT))
        begin = file.tell()
        file.truncate(begin + info.size + 1024)
    (found,) = entries(archives.open_archive(str(tmp_path / "a.tar")))
    assert (found.offset, found.length) == (begin, 9 << 30)
    assert found.flaw == "is too large for its own header"


def cut(data, place):
    return data[:place]


def spoilt(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(
    ("change", "rows", "why"),
    [
        (lambda d: b"", 0, "byte 0: it is too short for a tar file"),
        (lambda d: b"PK\3\4" + d, 0, "byte 0: it is not a tar file"),
        (lambda d: b"\x1f\x8b" + d, 0, "byte 0: it is compressed with gzip, decompress it"),
        (lambda d: cut(d, 700), 0, r"byte 0: its member 0000.cls has .* the file ends at byte 700"),
        (lambda d: cut(d, SIZE + 100), 0, r"byte 2,560: it ends after 0000.json \(byte 1,536\)"),
        (lambda d: cut(d, SIZE), 0, "byte 2,560: it ends after 0000.json .* without the zero block of a whole one"),
        (lambda d: cut(d, 2 * SIZE), 1, "byte 5,120: it ends after 0001.json .* without the zero block of a whole one"),
        (lambda d: spoilt(d, SIZE + 3), 0, "byte 2,560: there is no header with a right checksum after"),
        (lambda d: spoilt(d, SIZE + 130), 0, "byte 2,560: there is no header with a right checksum after"),
        (lambda d: d + d, 2, r"byte .*: it ends here, but .* bytes follow, not all zero"),
        (lambda d: d + bytes(1 << 25), 2, r"byte .*: it ends here, but .* bytes follow"),
        (lambda d: d[:SIZE] + bytes(512) + d[SIZE:], 0, r"byte 2,560: it ends here, but"),
    ],
)  # fmt: skip
def test_a_torn_archive_is_named_with_its_place(tmp_path, change, rows, why):
    data = write_tar(tmp_path / "whole.tar", texts(range(3)), tarfile.USTAR_FORMAT).read_bytes()
    path = tmp_path / "torn.tar"
    path.write_bytes(change(data))
    found = []
    with pytest.raises(TornArchiveError, match=rf"torn.tar is damaged at {why}") as error:
        found += Reader().read(path)
    assert "\n" not in str(error.value)
    read_before = []
    with pytest.raises(TornArchiveError):
        for sample in Reader().read(path):
            read_before.append(sample)
    assert len(read_before) == rows


SIZE = 512 + 1024 + 512 + 512  # of a sample of `texts` in a tar file


def texts(numbers):
    for number in numbers:
        yield f"{number:04d}.cls", bytes(1000)
        yield f"{number:04d}.json", chat("q")


def test_padding_and_a_single_zero_block_are_a_whole_archive(tmp_path):
    data = write_tar(tmp_path / "a.tar", texts(range(2)), tarfile.USTAR_FORMAT).read_bytes()
    end = 2 * SIZE
    for more in (512, 1024, 10240, 1 << 20):
        (tmp_path / "a.tar").write_bytes(data[:end] + bytes(more))
        assert len(list(Reader().read(tmp_path / "a.tar"))) == 2


@pytest.mark.parametrize(
    ("records", "why"),
    [
        (b"12 path=ab\n", "it has a malformed extended header"),
        (b"11 path=ab!", "it has a malformed extended header"),
        (b"999999999999999999999 path=ab\n", "it has a malformed extended header"),
        (b"13 size=-512\n", "an extended header gives the size '-512'"),
        (b"12 size=1_0\n", "an extended header gives the size '1_0'"),
        (b"16 size=9999999\n", "its member a.png has 9,999,999 bytes"),
    ],
)
def test_extended_headers_are_checked(tmp_path, records, why):
    header, member = tarfile.TarInfo("x"), tarfile.TarInfo("a.png")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    blocks = [header.tobuf(), records.ljust(512, b"\0"), member.tobuf(), bytes(1024)]
    (tmp_path / "a.tar").write_bytes(b"".join(blocks))
    with pytest.raises(TornArchiveError, match=why):
        list(Reader().read(tmp_path / "a.tar"))


def test_a_header_for_all_members_may_have_a_comment(tmp_path):
    for given, is_right in (({"comment": "a commit"}, True), ({"path": "a.png"}, False)):
        with tarfile.open(tmp_path / "a.tar", "w", pax_headers=given) as tar:
            info = tarfile.TarInfo("a.json")
            content = str(chat("q")).replace("'", '"').encode()
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        if is_right:
            assert len(list(Reader().read(tmp_path / "a.tar"))) == 1
        else:
            with pytest.raises(TornArchiveError, match="gives the name or the size of each"):
                list(Reader().read(tmp_path / "a.tar"))


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


# --------------------------------------------------------------------------------------------------
# What is read, and by how many open files
# --------------------------------------------------------------------------------------------------


def test_a_header_is_a_bounded_read(tmp_path, monkeypatch):
    members = []
    for number, kind in enumerate(("PNG", "JPEG", "WEBP")):
        large = picture(number, kind, (600, 900))
        assert len(large) > 200_000
        members += [(f"{number}.{kind}", large), (f"{number}.json", chat())]
    path = write_tar(tmp_path / "a.tar", members)
    num_read = []
    read_at = archives.OpenArchive.read_at

    def counted(self, offset, length):
        data = read_at(self, offset, length)
        num_read.append(len(data))
        return data

    monkeypatch.setattr(archives.OpenArchive, "read_at", counted)
    samples, bad = read(path)
    assert len(samples) == 3 and bad == []
    assert [image.size for sample in samples for image in sample.images] == [(600, 900)] * 3
    assert sum(num_read) < 50_000  # of each a header and, for PNG and JPEG, the end


def descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_few_tar_files_are_open(tmp_path, monkeypatch):
    opened = []
    real = archives.open_archive
    monkeypatch.setattr(archives, "open_archive", lambda p, **k: opened.append(p) or real(p, **k))
    monkeypatch.setattr(archives, "_archives", archives._Archives())
    before = descriptors()
    members = [(f"{n}.{end}", content) for n in range(40) for end, content in (("png", P[0]), ("json", chat()))]  # fmt: skip
    samples, _ = read(write_tar(tmp_path / "many.tar", members))
    assert len(samples) == 40 and len(opened) == 1  # beside the one that finds the members
    for number in range(100):
        write_tar(tmp_path / f"{number:03d}.tar", captions([number]))
    samples, _ = read(tmp_path / "[0-9]*.tar")
    assert len(samples) == 100
    assert descriptors() <= before + archives._MOST_OPEN
    # A forked process opens its own, and closes none of its parent's.
    image = samples[-1].images[0]
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        try:
            images.probe(image, decode=True)
            is_own = (
                archives._archives._process == os.getpid() and len(archives._archives._open) == 1
            )
            os.write(writable, b"right" if is_own else b"wrong")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(readable, 10) == b"right"
    os.close(readable), os.close(writable)
    opened.clear()
    assert images.probe(image, decode=True) == (56, 84)
    assert opened == []
    archives._archives._open.clear()
    assert descriptors() <= before + 1


@pytest.mark.slow
def test_memory_does_not_grow_with_members(monkeypatch):
    """A million samples, 2 million members, 3 GB that are never made."""
    row = str(chat("q")).replace("'", '"').encode().ljust(512)
    template = bytearray(tarfile.TarInfo("0000000.json").tobuf(tarfile.USTAR_FORMAT))
    template[124:136] = b"%011o\0" % 512
    count = 1_000_000

    class Endless(archives.OpenArchive):
        size = count * 2048 + 1024

        def __init__(self):
            self.path = "endless.tar"

        def __del__(self):
            pass

        def read_at(self, offset, length):
            number, place = divmod(offset, 2048)
            if number >= count:
                return bytes(length)
            if place in (512, 1536):
                return row
            block = template[:]
            block[:12] = b"%07d.json" % number if place == 0 else b"%07d.cls\0" % number
            block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
            return bytes(block)

    monkeypatch.setattr(tar_shards, "open_archive", lambda path: Endless())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = sum(1 for _ in tar_shards.tar_rows("endless.tar", lambda text: {}))
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert found == count
    assert taken < 40 << 10  # KiB


# --------------------------------------------------------------------------------------------------
# What changes after a row was read
# --------------------------------------------------------------------------------------------------


def rename(data):
    return data.replace(b"0000.png", b"9999.png", 1)


def reordered(path):
    return write_tar(path, [(n, c) for n, c in reversed(list(captions(range(2))))]).read_bytes()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda path, data: data + bytes(512), r"the tar file has [\d,]+ bytes, and had [\d,]+ when it was packed"),
        (lambda path, data: data[:20000], "the tar file has 20,000 bytes, and had"),
        (lambda path, data: rename(data), "the tar file has another member there than when it was packed"),
        (lambda path, data: data[:124] + b"00000000001\0" + data[136:], "the tar file has another member there"),
        (lambda path, data: data[:156] + b"2" + data[157:], "the tar file has another member there"),
        (lambda path, data: reordered(path), "the tar file has another member there"),
        (lambda path, data: bytes(len(data)), "the tar file has another member there"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("replaced", [False, True], ids=["in place", "replaced"])
def test_a_changed_archive_is_noticed(tmp_path, change, why, replaced):
    path = write_tar(tmp_path / "a.tar", captions(range(2)), tarfile.USTAR_FORMAT)
    (sample, _), _ = read(path)
    (image,) = sample.images
    archives._archives.forget(image.path)
    data = path.read_bytes()
    new = change(tmp_path / "new.tar", data)
    assert len(new) == len(data) or "bytes, and had" in why
    if replaced:
        (tmp_path / "new.tar").write_bytes(new)
        (tmp_path / "new.tar").replace(path)
    else:
        path.write_bytes(new)
    with pytest.raises(
        RowError, match=rf"image 0000.png \(byte 512 of .*a.tar\) cannot be read: {why}"
    ):
        images.probe(image)


@pytest.mark.parametrize(
    "forged",
    [
        {"length": 1 << 60}, {"length": 1}, {"length": -1}, {"offset": 0}, {"offset": -512},
        {"offset": 1 << 60}, {"offset": 1024}, {"header": 0}, {"archive_bytes": 1 << 60},
    ],
)  # fmt: skip
def test_a_forged_position_reads_nothing(tmp_path, forged):
    """A store from elsewhere, whose checksums are right."""
    (sample,), _ = read(write_tar(tmp_path / "a.tar", captions([0])))
    member = sample.images[0].member._replace(**forged)
    with pytest.raises(RowError, match="image 0000.png .* cannot be read: the tar file has"):
        open_media(sample.images[0].path, "image", member=member)


def test_an_archive_may_not_leave_its_folder(tmp_path):
    """As for image files: a link that leads out of the media folders, a pipe, a file that is gone."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir(), outside.mkdir()
    path = write_tar(inside / "a.tar", captions([0]))
    (sample,), _ = read(path)
    (image,) = sample.images
    folders = MediaFolders([inside])
    assert open_media(image.path, "image", folders, member=image.member).read() == picture(0)
    path.rename(outside / "a.tar")
    path.symlink_to(outside / "a.tar")
    with pytest.raises(RowError, match=r"a.tar \(a link to .*/out/a.tar\) is outside"):
        open_media(image.path, "image", folders, member=image.member)
    archives._archives.forget(image.path)
    path.unlink()
    with pytest.raises(RowError, match=r"a.tar does not exist"):
        open_media(image.path, "image", folders, member=image.member)
    os.mkfifo(path)
    with pytest.raises(RowError, match=r"a.tar is a named pipe, not a regular file"):
        open_media(image.path, "image", folders, member=image.member)


def test_a_linked_archive_is_read_where_it_lies(tmp_path):
    """The user named the link; its rows cannot."""
    (tmp_path / "far").mkdir(), (tmp_path / "near").mkdir()
    path = write_tar(tmp_path / "far" / "a.tar", captions([0]))
    (tmp_path / "near" / "a.tar").symlink_to(path)
    samples, bad = read(tmp_path / "near" / "a.tar", media_dir=str(tmp_path / "near"))
    assert bad == [] and samples[0].images[0].path == str(path)


def test_too_many_bad_samples_end_the_reading(tmp_path):
    members = [(f"{n}.json", chat("<image>" * (n % 10 == 0))) for n in range(2000)]
    with pytest.raises(
        ValueError, match=r"were left out, .*x \.\.\. <image> markers but \.\.\. images"
    ):
        list(Reader(on_error=Skip(0.05, [])).read(write_tar(tmp_path / "a.tar", members)))


def test_check_finds_a_sample_again_wherever_it_lies(tmp_path, capsys):
    """In another shard, under another key; one pixel, the text or an extension makes another row."""
    one, other = picture(1), bytearray(picture(1))
    other[len(other) // 2] ^= 1
    sample = {"a.png": one, "a.json": chat()}
    write_tar(tmp_path / "0.tar", [*sample.items(), ("t.png", one), ("t.txt", b"A caption")])
    copies = [("filler.json", chat("Text?")), ("b.png", one), ("b.json", chat())]
    others = [("c.png", bytes(other)), ("c.json", chat()), ("d.0.png", one), ("d.json", chat())]
    write_tar(
        tmp_path / "1.tar", [*copies, *others, ("e.png", one), ("e.json", chat(answer="No."))]
    )
    captions = [("u.png", one), ("u.txt", b"A caption"), ("v.png", one), ("v.txt", b"Another")]
    write_tar(tmp_path / "2.tar", captions)
    main(["check", str(tmp_path), "--json", "--stage", "pretrain"])
    texts = json.loads(capsys.readouterr().out.splitlines()[-1])["summary"]
    main(["check", str(tmp_path / "0.tar"), str(tmp_path / "1.tar")])
    out = capsys.readouterr().out
    assert "1 row equals an earlier one (row 1 of 1.tar equals row 0 of 0.tar)" in out
    assert texts["rows_again"] == 2  # b, and the caption

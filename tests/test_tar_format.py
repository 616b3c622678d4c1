"""The members of tar files: where `tarfile` finds them; damaged archives are named with the place."""

import io
import tarfile

import pytest
from tar_files import chat, write_tar

from mmpack.data import archives, tar_shards
from mmpack.data.media_paths import open_media
from mmpack.data.readers import Reader
from mmpack.data.tar_headers import TornArchiveError, _extend, entries

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


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


def test_an_extended_header_is_read_in_linear_time():
    """One of 128 KiB, of 6-byte records: no record copies the rest."""
    large = b"6 a=b\n" * ((1 << 17) // 6)

    class Counted(bytes):
        copied = 0

        def __getitem__(self, place):
            found = super().__getitem__(place)
            Counted.copied += len(found) if isinstance(place, slice) else 1
            return found

        def rstrip(self, *given):
            return Counted(super().rstrip(*given))

    given = {}
    _extend(None, 0, b"x", Counted(large + b"12 path=abc\n" + bytes(400)), given)
    assert given == {"path": "abc"}
    assert Counted.copied < 10 * len(large)

"""Reading from tar files: how little is read, by how many open files, and archives that change afterwards."""

import json
import os
import resource
import tarfile

import pytest
from tar_files import captions, chat, picture, write_tar

from mmpack.cli.main import main
from mmpack.data import archives, images, tar_shards
from mmpack.data.media_paths import MediaFolders, open_media
from mmpack.data.readers import Reader
from mmpack.errors import RowError, Skip

P = [picture(n, size=(28, 28)) for n in range(12)]


def read(path, **options):
    """(samples, bad rows)."""
    bad = []
    return list(Reader(on_error=bad, **options).read(path)), bad


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

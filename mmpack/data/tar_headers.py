"""The members of a tar file: ustar, GNU and PAX headers, checked; no bytes of a member are read.

Memory does not grow with the number of members. `tarfile` of the standard library is not used, because it ends
without an error where a header is damaged or the file is cut off.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from mmpack.data.limits import MAX_PATH

BLOCK = 512  # bytes; everything in a tar file begins at a multiple
_ZEROS = bytes(BLOCK)
_MOST_HEADER = 1 << 20  # bytes of an extended header; names take at most some KB
_MOST_PADDING = 1 << 24  # zero bytes after the end; writers pad to records, of 10 KiB or so
_OCTAL = re.compile(rb"[ \0]*([0-7]*)[ \0]*")
_FOLDER = b"5"
_FILES = b"\0", b"0", b"7"  # types of regular files
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a named pipe",
    b"S": "a sparse file",
}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


class TornArchiveError(ValueError):
    """A tar file that is cut off or damaged, so that what follows in it cannot be read."""


class Archive(Protocol):
    """An open tar file."""

    @property
    def path(self) -> str:
        """Its path or URL."""

    @property
    def size(self) -> int:
        """Its bytes."""

    @property
    def version(self) -> str:
        """As in `ImageRef`."""

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes from `offset` on, fewer at the end of the file."""


class Entry(NamedTuple):
    """A member of a tar file that is not a folder.

    Attributes:
        name: without a leading "./".
        begin: the position of its first header.
        offset, length: of its bytes.
        header: CRC-32 of its name, size and type in the last header, which is the 512 bytes before `offset`.
        flaw: why it is not read; empty: it is a regular file.
    """

    name: str
    begin: int
    offset: int
    length: int
    header: int
    flaw: str


def entries(archive: Archive) -> Iterator[Entry]:
    """The members of a tar file, without folders, in their order.

    Raises:
        TornArchiveError: it is cut off or damaged; the message gives the position.
    """
    at = begin = 0
    given: dict[str, str] = {}  # path, size and sparse of the member that follows
    last = "its beginning"
    while True:
        block = archive.read_at(at, BLOCK)
        if len(block) < BLOCK:
            if at == 0:
                raise _torn(archive, at, "it is too short for a tar file")
            raise _torn(archive, at, f"it ends after {last}, without the zero block of a whole one")
        if block == _ZEROS:
            if given:
                raise _torn(archive, at, f"it ends after an extended header, behind {last}")
            _check_end(archive, at)
            return
        try:
            kind, length = _checked(block)
        except ValueError as error:
            raise _torn(archive, at, f"{error} after {last}" if at else _not_tar(block)) from None
        data = at + BLOCK
        if kind in b"xXgLK":
            if length > _MOST_HEADER:
                raise _torn(archive, at, f"it has an extended header of {length:,} bytes")
            content = archive.read_at(data, length)
            if len(content) < length:
                raise _torn(archive, at, f"it ends inside an extended header after {last}")
            _extend(archive, at, kind, content, given)
            at = data + -(-length // BLOCK) * BLOCK
            continue
        name = given.get("path") or _name_of(block)
        flaw = _KINDS.get(kind, "" if kind in (*_FILES, _FOLDER) else f"of unknown type {kind!a}")
        if "sparse" in given:
            name, flaw = given["sparse"] or name, _KINDS[b"S"]
        if "size" in given:
            flaw = flaw or "too large for its own header" if int(given["size"]) != length else flaw
            length = int(given["size"])
        if kind in b"123456":
            length = 0  # whatever the header says
        elif kind == b"S":
            data = _after_sparse_map(archive, at, block)
        is_folder = kind == _FOLDER or (kind == b"\0" and name.endswith("/"))
        name = _plain_name(name)
        if data + length > archive.size:
            raise _torn(
                archive,
                at,
                f"its member {name:.200} has {length:,} bytes from byte {data:,} on, and the file ends at byte "
                f"{archive.size:,}",
            )
        if not is_folder:
            flaw = f"is {flaw}" if flaw else _name_flaw(name)
            yield Entry(name, begin, data, length, header_check(block), flaw)
        last = f"{name:.200} (byte {begin:,})"
        given = {}
        at = begin = data + -(-length // BLOCK) * BLOCK


def header_check(block: bytes) -> int:
    """CRC-32 of name, size and type in a header."""
    return zlib.crc32(block[:100] + block[124:136] + block[156:157] + block[345:500])


def is_header(block: bytes, header: int, length: int) -> bool:
    """Whether a block is the header with this `header_check`, of a member with this many bytes."""
    try:
        is_right = len(block) == BLOCK and header_check(block) == header
        return is_right and _number(block[124:136]) == length
    except ValueError:
        return False


def _checked(block: bytes) -> tuple[bytes, int]:
    """(type, size) of a header.

    Raises:
        ValueError: its checksum is wrong, or the size is not a number.
    """
    try:
        expected = _number(block[148:156])
    except ValueError:
        raise ValueError("there is no header") from None
    rest = block[:148] + b" " * 8 + block[156:]
    found = sum(rest)
    if found != expected and found - 256 * sum(byte > 127 for byte in rest) != expected:
        raise ValueError("there is no header with a right checksum")
    return block[156:157], _number(block[124:136])


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or, in GNU's form for large ones, bytes."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    found = _OCTAL.fullmatch(field)
    if found is None:
        raise ValueError("there is a header with a size that is not a number")
    return int(found[1] or b"0", 8)


def _name_of(block: bytes) -> str:
    name, _, _ = block[:100].partition(b"\0")
    prefix, _, _ = block[345:500].partition(b"\0")
    if prefix and block[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _extend(archive: Archive, at: int, kind: bytes, content: bytes, given: dict[str, str]) -> None:
    """Read an extended header, for the member that follows, into `given`."""
    if kind == b"K":
        return  # the target of a link
    if kind == b"L":
        given["path"] = content.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        return
    found: dict[str, str] = {}
    place = 0
    while place < len(content) and content[place:].strip(b"\0"):
        digits, space, _ = content[place : place + 20].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = content[place : place + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if len(record) < length or not (equals and record.endswith(b"\n")):
            raise _torn(archive, at, "it has a malformed extended header")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        place += length
    size = found.get("size", "0")
    if not (size.isascii() and size.isdigit() and len(size) < 20):
        raise _torn(archive, at, f"an extended header gives the size {size!a:.40}")
    if kind == b"g":  # for all members that follow
        if "path" in found or "size" in found:
            raise _torn(archive, at, "a header for all members gives the name or the size of each")
        return
    given.update({key: found[key] for key in ("path", "size") if key in found})
    if any(key.startswith("GNU.sparse.") for key in found):
        given["sparse"] = found.get("GNU.sparse.name", "")


def _after_sparse_map(archive: Archive, at: int, block: bytes) -> int:
    """The position of a sparse file's bytes, after the blocks that extend its header."""
    data, is_extended = at + BLOCK, block[482]
    while is_extended:
        block = archive.read_at(data, BLOCK)
        if len(block) < BLOCK:
            raise _torn(archive, at, "it ends inside a sparse member's header")
        data, is_extended = data + BLOCK, block[504]
    return data


def _check_end(archive: Archive, at: int) -> None:
    """Check that nothing but zeros follows the zero blocks that end a tar file."""
    padding = archive.size - at
    if padding > _MOST_PADDING:
        raise _torn(archive, at, f"it ends here, but {padding:,} bytes follow")
    for place in range(at, archive.size, 1 << 20):
        if archive.read_at(place, 1 << 20).strip(b"\0"):
            raise _torn(archive, at, f"it ends here, but {padding:,} bytes follow, not all zero")


def _plain_name(name: str) -> str:
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def _name_flaw(name: str) -> str:
    if name.startswith("/"):
        return "has an absolute name"
    if ".." in name.split("/"):
        return "has '..' in its name"
    if "\0" in name or any("\ud800" <= one <= "\udfff" for one in name):
        return "has a name that is not UTF-8 text"
    if len(name) > MAX_PATH:
        return f"has a name of {len(name):,} characters"
    return ""


def _not_tar(block: bytes) -> str:
    for magic, kind in _COMPRESSED.items():
        if block.startswith(magic):
            return f"it is compressed with {kind}, decompress it"
    return "it is not a tar file"


def _torn(archive: Archive, at: int, why: str) -> TornArchiveError:
    return TornArchiveError(
        f"{archive.path} is damaged at byte {at:,}: {why}; nothing from there on can be read, write it again"
    )

"""A path as a row writes it -> the path of a file: `file:` URLs, Unicode forms, folders of frames, and text that
is not a path but base64."""

from __future__ import annotations

import base64
import binascii
import logging
import os
import re
import unicodedata
from urllib.parse import unquote

from mmpack.errors import RowError, counted

_log = logging.getLogger("mmpack")
_FILE_URL = re.compile(r"file:(?://([^/]*)(?=/)|(?=/(?!/)))", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{40,}={0,2}\s*")
_STARTS = {  # first characters of base64 of a format: (its name, its media type)
    "/9j/": ("JPEG", "image/jpeg"),
    "iVBORw0KGgo": ("PNG", "image/png"),
    "R0lGOD": ("GIF", "image/gif"),
    "UklGR": ("WEBP", "image/webp"),
    "SUkqA": ("TIFF", "image/tiff"),
    "TU0AK": ("TIFF", "image/tiff"),
    "AAAA": ("MP4 or AVIF", "video/mp4"),
    "GkXfo": ("Matroska", "video/webm"),
    "Qk": ("BMP", "image/bmp"),  # last: the least telling
}
# Suffixes of `mmpack.data.images.FORMATS`, and of videos.
PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".avif", ".mpo", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm"),
)
VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v")
_MOST_FRAMES = 100_000  # files in a folder of frames; more is the folder of a whole data set
_told: set[str] = set()


def path_of_url(path: str, kind: str) -> str:
    """The path of a `file:` URL; another path unchanged. `%20` is a space, unless a file is named with it.

    Raises:
        RowError: the URL names another machine, or what it names is not text.
    """
    if path[:5].lower() != "file:":
        return path
    found = _FILE_URL.match(path)
    if found is None or (found[1] and found[1].lower() != "localhost"):
        machine = f"names the machine {found[1]!a:.60}" if found else "has no absolute path"
        raise RowError(
            f"{kind} {path:.200} {machine}",
            "write file:/// and an absolute path, or the path alone",
        )
    written = path[found.end() :]
    try:
        plain = unquote(written, errors="strict")
    except UnicodeDecodeError:
        raise RowError(f"{kind} {path:.200} is not UTF-8 in its % signs", "fix the path") from None
    if "\0" in plain:
        raise RowError(f"{kind} path {path!a:.100} is not a file name", "fix the path")
    return written if plain != written and os.path.exists(written) else plain


def base64_error(text: str, kind: str) -> RowError | None:
    """The error for base64 in place of a path; None if it does not look like base64 of an image or a video."""
    if not _BASE64.fullmatch(text):
        return None
    found = next((one for start, one in _STARTS.items() if text.startswith(start)), None)
    if found is None:
        return None
    name, media_type = found
    return RowError(
        f"{kind} {text:.20}... is base64 of a {name} file, without data: in front",
        f"write data:{media_type};base64,... and allow it with --allow-data-uri ('data:' in media_dir)",
    )


def decoded_base64(text: object, kind: str) -> bytes:
    """The bytes of base64 text, line breaks allowed.

    Raises:
        RowError: it is not base64.
    """
    try:
        if not isinstance(text, (str, bytes)):
            raise ValueError
        joined = b"".join(text.split()) if isinstance(text, bytes) else "".join(text.split())
        return base64.b64decode(joined, validate=True)
    except (binascii.Error, ValueError):
        raise RowError(f"the base64 of the {kind} is broken", "encode it again") from None


def decoded_uri(head: str, body: str, kind: str) -> bytes:
    """The bytes of a data URI; `head` is what comes before its comma, `body` what follows.

    Raises:
        RowError: it is not base64.
    """
    if not head.endswith(";base64"):
        raise RowError(f"{kind} {head:.60},... is not base64", "encode it as base64")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise RowError(f"{kind} {head:.60},... is broken base64", "encode it again") from None


def other_unicode_form(path: str) -> str | None:
    """An existing path with the same characters in another Unicode form; None if there is none. Macs store "é" as
    two code points (NFD), most other programs write one (NFC)."""
    folder, name = os.path.split(path)
    for form in ("NFC", "NFD"):
        for other in (
            unicodedata.normalize(form, path),
            os.path.join(folder, unicodedata.normalize(form, name)),
        ):
            if other != path and os.path.exists(other):
                if form not in _told:
                    _told.add(form)
                    _log.warning(
                        "%s does not exist, but the file has this name in the Unicode form %s, which is read; "
                        "so are other such files",
                        path,
                        form,
                    )
                return other
    return None


def frames_in(folder: str) -> list[str]:
    """The files of a folder of frames, in the order of the numbers in their names (2.png before 10.png).

    Other files are refused, because a frame that is left out would shift the time of all frames after it.

    Raises:
        RowError: it has no files, too many, or one that is not a picture by its suffix.
    """
    try:
        with os.scandir(folder) as entries:
            names = []
            for entry in entries:
                names.append(entry.name)
                if len(names) > _MOST_FRAMES:
                    raise RowError(
                        f"the folder {folder:.200} has more than {_MOST_FRAMES:,} files, too many for a video",
                        "name the folder of one video",
                    )
    except OSError as error:
        raise RowError(
            f"the folder {folder:.200} cannot be read: {error.strerror}",
            "fix the path or its permissions",
        ) from None
    if not names:
        raise RowError(f"the folder {folder:.200} has no frames", "name a folder of pictures")
    names.sort(key=natural)
    others = [name for name in names if os.path.splitext(name)[1].lower() not in PICTURE_SUFFIXES]
    if others:
        raise RowError(
            f"the folder {folder:.200}, given as a video, has {others[0]!a:.80}, "
            f"which is not a picture ({counted(len(others), 'such file')})",
            "move it away, or give the video as a list of frames",
        )
    return [os.path.join(folder, name) for name in names]


def natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A sort key by which 2.png comes before 10.png."""
    parts = re.split(r"([0-9]+)", name)
    numbered = [
        (0, int(part[:18]), part) if n % 2 else (1, 0, part.lower()) for n, part in enumerate(parts)
    ]
    return numbered, name

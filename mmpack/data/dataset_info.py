"""Paths that a user named -> data files, each with its entry in a `dataset_info.json` (LLaMA-Factory's).

An entry maps the names of fields (`mmpack.data.row_fields`). Its `file_name` is relative to the folder of the
`dataset_info.json`, and so are images and videos, as in LLaMA-Factory, where `media_dir` is by default the folder
of the data sets. An entry can also have a `media_dir` of its own, which LLaMA-Factory does not read.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from mmpack.data.data_paths import data_files
from mmpack.data.file_bytes import open_binary, require_file
from mmpack.data.file_formats import parse_json
from mmpack.data.limits import MAX_COUNT, MAX_ROW
from mmpack.data.media_paths import DATA_URIS, MediaFolders
from mmpack.data.remote_files import error_words, exists
from mmpack.data.remote_roots import DataPath, RemotePath, data_path, object_in, remote_root
from mmpack.data.tar_shards import SUFFIX
from mmpack.errors import names

_log = logging.getLogger("mmpack")
Mapping = str | Sequence[str] | dict[str, Any] | None
_PathLike = str | os.PathLike[str]


class DataFile(NamedTuple):
    """A data file, its entry (None: fields are detected per row), and the folder that the entry's paths start
    from (None: the file's)."""

    path: DataPath
    entry: dict[str, Any] | None
    folder: DataPath | None


def named_files(paths: Sequence[_PathLike], mapping: Mapping) -> list[DataFile]:
    """The data files at these paths.

    Args:
        mapping: an entry, for every file; or names of entries, in a list or separated by commas, which are looked
            up in the one folder in `paths`; None: for each file, the entry for it in a `dataset_info.json` beside
            it.

    Raises:
        ValueError: there is no such file or entry, or two entries name a file.
    """
    if mapping is not None and not isinstance(mapping, dict):
        given = [mapping] if isinstance(mapping, str) else mapping
        entries = [name.strip() for text in given for name in text.split(",")]
        if len(paths) != 1:
            raise ValueError(
                f"the entry {entries[0]!r} is looked up in one folder, got {len(paths)} paths; pass one folder"
            )
        return [file for name in entries for file in _entry_files(data_path(paths[0]), name)]
    files = [file for path in paths for file in data_files(path)]
    if mapping is not None:
        return [DataFile(file, mapping, None) for file in files]
    known: dict[DataPath, Any] = {}  # contents of dataset_info.json, by folder
    return [DataFile(file, _entry_beside(file, known), None) for file in files]


class RowLimit(NamedTuple):
    """How many rows of an entry are planned.

    Attributes:
        files: the names of its files, joined by "/".
        num_samples: this many, chosen at random; 0: all. max_samples: of the first ones; 0: of all.
    """

    files: str
    num_samples: int
    max_samples: int


def row_limits(files: Sequence[DataFile]) -> list[RowLimit | None]:
    """For each file, the limit of its entry; None: it has none.

    Raises:
        ValueError: `num_samples` or `max_samples` of an entry is not an integer from 1 to `MAX_COUNT`.
    """
    names: dict[int, list[str]] = {}
    for file in files:
        names.setdefault(id(file.entry), []).append(file.path.name)
    found: list[RowLimit | None] = []
    for file in files:
        entry = file.entry or {}
        given = [entry.get(key) for key in ("num_samples", "max_samples")]
        for key, value in zip(("num_samples", "max_samples"), given):
            if value is not None and (type(value) is not int or not 1 <= value <= MAX_COUNT):
                raise ValueError(
                    f"{key} of a dataset_info.json entry is {value!r:.40}, not an integer from 1 to {MAX_COUNT}; "
                    "fix it, or remove it"
                )
        is_limited = any(value is not None for value in given)
        numbers = [value or 0 for value in given]
        found.append(RowLimit("/".join(names[id(file.entry)]), *numbers) if is_limited else None)
    return found


def limits_by_files(
    given: Sequence[tuple[str, RowLimit | None]],
) -> dict[str, tuple[int, int]]:
    """The limits of files, as a store records them.

    Args:
        given: name and limit of each file.

    Returns:
        The names of an entry's files, joined by "/" -> (num_samples, max_samples).

    Raises:
        ValueError: a file has the name of one of another entry, which has limits.
    """
    count = Counter(name for name, _ in given)
    limits = [limit for _, limit in given if limit is not None]
    for limit in limits:
        for name, own in Counter(limit.files.split("/")).items():
            if count[name] != own:
                raise ValueError(
                    f"num_samples and max_samples find a row by the name of its file, but {count[name]} files of "
                    f"several entries are {name}; rename them, or pack the entries apart and mix them (--mix)"
                )
    return {limit.files: (limit.num_samples, limit.max_samples) for limit in limits}


def folders_of(file: DataFile, media_dirs: Sequence[_PathLike]) -> MediaFolders:
    """The folders that a file's images and videos may be in, and the one that its relative paths start from.

    Args:
        media_dirs: the folders that the user named; "data:" allows data URIs.

    Raises:
        ValueError: the `media_dir` of the file's entry is outside its folder and those that the user named.
    """
    home = file.folder or file.path.parent
    root = (file.entry or {}).get("media_dir")
    named = [folder for folder in media_dirs if folder != DATA_URIS]
    allowed: list[_PathLike] = [*media_dirs] if named else [home, *media_dirs]
    if file.path.suffix == SUFFIX:  # its images are in the file itself, which the user named
        is_remote = isinstance(file.path, RemotePath)
        real = os.fspath(file.path) if is_remote else os.path.realpath(file.path)
        if not MediaFolders(allowed).contains(real):
            allowed.append(os.path.dirname(real))
    if root is None:
        return MediaFolders(allowed)
    if not isinstance(root, str) or not root:
        raise ValueError(f"the media_dir of {file.path.name} must be a folder, got {root!a:.80}")
    if isinstance(home, RemotePath):
        root = object_in(home.url, root, "media_dir")
    elif remote_root(root) is None:
        root = os.path.join(home, root)
    if not MediaFolders([*allowed, home]).contains(root):
        raise ValueError(
            f"the media_dir of {file.path.name} in its dataset_info.json, {root}, is outside {home}; "
            "add it with --media-dir (media_dir)"
        )
    return MediaFolders([root, *allowed], root=root)


def _entry_files(path: DataPath, name: str) -> list[DataFile]:
    info_path = path if path.suffix == ".json" else path / "dataset_info.json"
    info = _read_info(info_path)
    if not isinstance(info, dict) or not isinstance(info.get(name), dict):
        has = names(info) if isinstance(info, dict) else type(info).__name__
        raise ValueError(f"no dataset {name!r} in {info_path}; use one of {has}")
    entry = info[name]
    file_name = entry.get("file_name")
    if not isinstance(file_name, str) or not file_name:
        raise ValueError(
            f"dataset {name!r} of {info_path} has no file_name; only files are read, download it first"
        )
    place = info_path.parent / file_name  # of a local folder, perhaps absolute
    if remote_root(file_name) is not None:
        raise ValueError(
            f"dataset {name!r} of {info_path} has a URL as file_name; name the URL itself as the data"
        )
    files = data_files(place)
    return [DataFile(file, entry, info_path.parent) for file in files]


def _entry_beside(file: DataPath, known: dict[DataPath, Any]) -> dict[str, Any] | None:
    """The entry for a file in a dataset_info.json beside it; None if there is none (`datasets` writes files of
    that name, too, without such entries)."""
    folder, info_path = file.parent, file.parent / "dataset_info.json"
    if folder not in known:
        known[folder] = _read_info(info_path) if _is_there(info_path) else None
    info = known[folder]
    named = {
        name: entry
        for name, entry in (info.items() if isinstance(info, dict) else ())
        if isinstance(entry, dict) and _is_named(file, entry.get("file_name"))
    }
    if len(named) > 1:
        raise ValueError(
            f"{len(named)} entries of {info_path} name {file.name}: {names(named)}; pass the folder and "
            "choose one with --dataset NAME (mapping)"
        )
    return next(iter(named.values()), None)


def _is_there(path: DataPath) -> bool:
    if not isinstance(path, RemotePath):
        return os.path.lexists(path)
    try:
        return exists(path.url)
    except OSError as error:  # storage that may not be listed forbids what does not exist
        what, advice = error_words(error)
        if error.errno != errno.EACCES:
            raise ValueError(f"{path} {what}; {advice}") from None
        _log.warning("%s %s, and is not used", path, what)
        return False


def _is_named(file: DataPath, file_name: Any) -> bool:
    return isinstance(file_name, str) and os.path.normpath(file_name) == file.name


def _read_info(path: DataPath) -> Any:
    require_file(path)
    try:
        with open_binary(path) as file:
            text = file.read(MAX_ROW).decode("utf-8-sig")
        return parse_json(text)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None

"""A path or a URL that a user named -> the data files there."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from mmpack.data import tar_shards
from mmpack.data.file_bytes import require_file
from mmpack.data.path_patterns import is_pattern, matching, mixed_splits, without_braces
from mmpack.data.remote_files import error_words, in_parallel, listed
from mmpack.data.remote_roots import HTTP, DataPath, RemotePath, data_path, is_url, scheme_of

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".arrow", tar_shards.SUFFIX)
# As `datasets` names them: train-00000-of-00002.
_SPLIT_FILE = re.compile(r"(\w+)-\d{5}-of-\d{5}\b")
_NOT_DATA = ("dataset_info.json", "state.json")  # metadata of LLaMA-Factory and `datasets`


def data_files(path: str | os.PathLike[str]) -> Sequence[DataPath]:
    """The data files at a path: the file itself, or those in a folder, or in its subfolder `data` as in data sets
    on the Hugging Face Hub. They must have one type, and belong to one split. If there is no such path, `*`, `?`,
    `[...]`, `{000..123}` and `{a,b}` in it stand for several.

    Raises:
        ValueError: there is no such path, the type is not supported, a folder has files of several types or
            splits, or one of them is not a regular file (a pipe, a device, a dangling link); or it is a URL that
            is not read, or of a folder on a web server, which has no list.
    """
    if is_url(path):
        named_here = list(map(data_path, without_braces(os.fspath(path))))
        return [file for found in in_parallel(_remote_files, named_here) for file in found]
    path = Path(path)
    if not os.path.lexists(path) and is_pattern(str(path)):
        named = [data_files(one) for one in matching(str(path))]
        return [file for files in named for file in files]
    if os.path.isdir(path):
        try:
            inside = sorted(p for p in path.iterdir() if p.name not in _NOT_DATA)
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from None
        files = [p for p in inside if data_suffix(p) is not None]
        if not files or files[0].suffix == tar_shards.SUFFIX:
            for file in inside:
                _refuse_compressed_tar(file)
        if not files and (path / "data").is_dir():
            return data_files(path / "data")
        for file in files:
            require_file(file)
        return _of_one_kind(path, files)
    require_file(path)
    _refuse_compressed_tar(path)
    if data_suffix(path) is None:
        raise ValueError(
            f"{path} has none of the suffixes {', '.join(SUFFIXES)} (the first three also with .gz or .zst); "
            "rename it to match its format"
        )
    return [path]


def _of_one_kind(folder: DataPath, files: Sequence[DataPath]) -> Sequence[DataPath]:
    """The files of a folder, if they have one type and belong to one split."""
    suffixes = sorted({str(data_suffix(p)) for p in files})
    if not files:
        raise ValueError(f"{folder} has no data files ({', '.join(SUFFIXES)}); fix the path")
    if len(suffixes) > 1:
        raise ValueError(f"{folder} has files of several types {suffixes}; name the ones to read")
    splits = {match[1] for p in files if (match := _SPLIT_FILE.match(p.name))}
    if len(splits) > 1:
        raise ValueError(
            f"{folder} has files of several splits {sorted(splits)}; name the ones to read"
        )
    if suffixes == [tar_shards.SUFFIX] and (mixed := mixed_splits([p.name for p in files])):
        raise ValueError(f"{folder} has files of several splits {mixed}; name the ones to read")
    return files


def _remote_files(path: DataPath) -> Sequence[DataPath]:
    """`data_files` in object storage."""
    assert isinstance(path, RemotePath)
    if "*" in path.url:
        raise ValueError(
            f"{path} has '*', which is not looked up in object storage; write the numbers of files in braces, "
            "{000..123}, or name their folder"
        )
    _refuse_compressed_tar(path)
    if data_suffix(path) is not None:
        require_file(path)
        return [path]
    if scheme_of(path.url) in HTTP:
        raise ValueError(
            f"{path} has none of the suffixes {', '.join(SUFFIXES)}, and a web server has no list of a folder's "
            "files; name the files"
        )
    try:
        names = listed(path.url)
        files = [path / name for name in names if name not in _NOT_DATA and _is_data(name)]
        if not files:
            inside = path / "data"
            files = [inside / name for name in listed(inside.url) if _is_data(name)]
    except FileNotFoundError:
        raise ValueError(
            f"{path} has no data files ({', '.join(SUFFIXES)}); fix the path"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} {'; '.join(error_words(error))}") from None
    return _of_one_kind(path, files)


def _refuse_compressed_tar(path: DataPath) -> None:
    if path.name.lower().endswith(tar_shards.COMPRESSED):
        raise ValueError(
            f"{path} is a compressed tar file, in which an image has no position of its own; decompress it "
            "(gunzip, zstd -d): pictures in it are compressed already"
        )


def _is_data(name: str) -> bool:
    return data_suffix(PurePosixPath(name)) is not None


def data_suffix(path: DataPath | PurePosixPath) -> str | None:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffix = suffixes[-2] if len(suffixes) > 1 else None
        return suffix if suffix in SUFFIXES[:3] else None
    return path.suffix if path.suffix in SUFFIXES else None

"""Objects of `hf://` URLs, by the file system of huggingface_hub.

Its own `info` gives no hash of a file that it asks for anew, and its `cat_file` reads a block ahead. Here a file
has its hash, and a range is one request.
"""

from __future__ import annotations

import re
from typing import Any

_AT_COMMIT = re.compile(r"hf://[^@]+@[0-9a-f]{40}(/|$)")


def is_fixed(url: str) -> bool:
    """Whether a URL names a commit, in which no file changes."""
    return _AT_COMMIT.match(url) is not None


def info(fs: Any, path: str) -> dict[str, Any]:
    """What the Hub says of a file or a folder now, as fsspec's `info`.

    Raises:
        FileNotFoundError: there is none.
    """
    place = fs.resolve_path(path)
    if not hasattr(place, "repo_id"):  # a bucket
        return dict(fs.info(path, refresh=True))
    folder = {"size": 0, "type": "directory"}
    if not place.path_in_repo:
        return folder
    from huggingface_hub import HfApi

    api = HfApi(endpoint=fs.endpoint, token=fs.token)
    found = api.get_paths_info(
        place.repo_id, place.path_in_repo, repo_type=place.repo_type, revision=place.revision
    )
    if not found:
        raise FileNotFoundError(path)
    one: Any = found[0]
    if not hasattr(one, "blob_id"):
        return folder
    hashes = {"xet_hash": getattr(one, "xet_hash", None), "blob_id": one.blob_id}
    return {"size": one.size, "type": "file", **hashes}


def read(fs: Any, path: str, start: int, end: int) -> bytes:
    """A range of a file's bytes."""
    # the size is that of what may be read: the file is not asked for its own
    with fs.open(path, "rb", cache_type="none", size=end) as file:
        file.seek(start)
        data: bytes = file.read(end - start)
    return data

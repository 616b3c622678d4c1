"""Objects of `hf://` URLs, by the file system of huggingface_hub.

Its own `info` gives no hash of a file that it asks for anew; its `cat_file` lists the whole folder of the file
and reads 5 MiB ahead. Here a file has its hash, and a range is one request.
"""

from __future__ import annotations

import errno
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
    place = fs.resolve_path(path)
    if not hasattr(place, "repo_id"):
        return bytes(fs.cat_file(path, start=start, end=end))
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    kind, name = place.repo_type, place.path_in_repo
    url = hf_hub_url(
        place.repo_id, name, repo_type=kind, revision=place.revision, endpoint=fs.endpoint
    )
    headers = build_hf_headers(token=fs.token) | {"Range": f"bytes={start}-{end - 1}"}
    answer: Any = get_session().get(url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    hf_raise_for_status(answer)
    if start and answer.status_code != 206:
        raise OSError(errno.EIO, "the server ignores ranges")
    return bytes(answer.content)

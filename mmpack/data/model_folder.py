"""The value of --tokenizer, --config or --model -> a local path, downloaded from the Hugging Face Hub if needed.

Only settings, tokenizer files and, for models, safetensors weights are downloaded: no pickles and no code.
"""

from __future__ import annotations

import logging
import os
import re
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from mmpack.data.remote_roots import shown
from mmpack.errors import counted

_NAME = re.compile(r"(hf:)?(\w[\w.-]*)/(\w[\w.-]*)(?:@([\w./+-]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model")
_log = logging.getLogger(__name__)


def local_path(
    name: str | os.PathLike[str], *, weights: bool = False, download: bool = True
) -> Path:
    """The local folder or file that a name stands for.

    Args:
        name: a path, or a model on the Hugging Face Hub: `owner/name` where there is no local folder `owner`,
            or `hf:owner/name@revision` (by default `main`). Downloads are logged first, with the commit.
        weights: download safetensors files too.
        download: if False, use no network: for names from a store, which must have a commit.

    Raises:
        ValueError: there is no such path, model or revision, or it cannot be downloaded.
    """
    text = os.fspath(name)
    if not text.startswith("hf:") and os.path.exists(text):
        return Path(text)
    match = _NAME.fullmatch(text)
    is_hub = match and (match[1] or (match[4] is None and not os.path.isdir(match[2])))
    if not match or not is_hub:
        raise ValueError(
            f"{shown(text)}: there is no such file or folder; a Hugging Face model is owner/name or "
            "hf:owner/name@revision"
        )
    repo, revision = f"{match[2]}/{match[3]}", match[4] or "main"
    if download:
        return _snapshot(repo, revision, weights)
    if not _COMMIT.fullmatch(revision):
        raise ValueError(f"{text}: there is no such file or folder")
    try:
        return _cached(repo, revision, weights)
    except OSError:
        patterns = " ".join(f"'{pattern}'" for pattern in _patterns(weights))
        raise ValueError(
            f"{text} is not in the Hugging Face cache; hf download {repo} --revision {revision} "
            f"--include {patterns}"
        ) from None


def pinned(name: str) -> str:
    """A name on the Hub with its commit, `hf:owner/name@commit`; a local path unchanged."""
    path = local_path(name)
    if path == Path(name):
        return name
    return f"hf:{name.removeprefix('hf:').partition('@')[0]}@{path.name}"


@cache  # so that a branch is one commit in a process
def _snapshot(repo: str, revision: str, weights: bool) -> Path:
    """The folder of a repository's files at a revision; its last part is the commit."""
    from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: httpx's or httpx2's
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=10)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(_refused(repo, revision, error)) from None
    except (HTTPError, OSError) as error:
        reason = f"{constants.ENDPOINT} does not give it: {_first_line(error)}"
        try:
            folder = _cached(repo, revision, weights)
        except OSError:
            raise ValueError(
                f"{repo}: there is no such folder here, nor at revision {revision} in the Hugging Face "
                f"cache, and {reason}"
            ) from None
        _log.warning("%s is commit %s in the Hugging Face cache; %s", repo, folder.name, reason)
        return folder
    missing = [
        file
        for file in info.siblings or []
        if "/" not in file.rfilename
        and any(fnmatchcase(file.rfilename, pattern) for pattern in _patterns(weights))
        and not isinstance(try_to_load_from_cache(repo, file.rfilename, revision=info.sha), str)
    ]
    if missing:
        size = sum(file.size or 0 for file in missing) / 1e6
        what = f"{counted(len(missing), 'file')} ({size:,.1f} MB)"
        model = f"{repo}, commit {info.sha}, from {constants.ENDPOINT}"
        _log.warning("downloading %s of %s", what, model)
    elif revision != info.sha:
        _log.warning("%s is commit %s", repo, info.sha)
    try:
        return Path(snapshot_download(repo, revision=revision, **_wanted(weights)))
    except (HTTPError, OSError) as error:
        raise ValueError(_refused(repo, revision, error)) from None


def _cached(repo: str, revision: str, weights: bool) -> Path:
    """`_snapshot` without a network; raises OSError if the cache lacks it."""
    from huggingface_hub import snapshot_download

    wanted = _wanted(weights)
    return Path(snapshot_download(repo, revision=revision, local_files_only=True, **wanted))


def _wanted(weights: bool) -> dict[str, Any]:
    """Which files in a repository's top folder are downloaded."""
    return {"allow_patterns": _patterns(weights), "ignore_patterns": ["*/*"]}


def _patterns(weights: bool) -> list[str]:
    return [*_SETTINGS, *(["*.safetensors"] if weights else [])]


def _refused(repo: str, revision: str, error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    login = "run: hf auth login"
    match error:
        case GatedRepoError():
            return f"{repo} is gated; accept its terms at {constants.ENDPOINT}/{repo} and {login}"
        case RepositoryNotFoundError():
            nowhere = (
                f"{repo}: there is no such folder here, and no such model at {constants.ENDPOINT}"
            )
            return f"{nowhere}; if it is private, {login}"
        case RevisionNotFoundError():
            return f"{repo} has no revision {revision} at {constants.ENDPOINT}"
    return f"cannot download {repo} from {constants.ENDPOINT}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__

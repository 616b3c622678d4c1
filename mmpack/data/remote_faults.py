"""What errors of storage libraries mean: whether another try may succeed, and words for them."""

from __future__ import annotations

import errno
import re

from mmpack.data.remote_http import status_words

_FINAL = (PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)
_FINAL_NUMBERS = (errno.EXDEV, errno.EIO, errno.ELOOP, errno.EACCES, errno.EPERM)

# Classes of what libraries raise; some of these errors are no OSError. By name: a library may be missing.
_TIMEOUTS = {
    *("FSTimeoutError", "TimeoutError"),  # fsspec
    "TimeoutException",  # httpx
    *("ConnectTimeoutError", "ReadTimeoutError"),  # botocore
}
_CONNECTION_ERRORS = {
    "ConnectionError",  # Python, botocore
    *("NetworkError", "RemoteProtocolError"),  # httpx
    *("ClientConnectionError", "ClientPayloadError"),  # aiohttp
    *("ConnectionClosedError", "IncompleteReadError", "ResponseStreamingError"),  # botocore
}  # fmt: skip
# Among them and among OSErrors: the next try is refused too.
_REFUSALS = {"ClientSSLError", "SSLError", "OfflineModeIsEnabled"}


def may_pass(error: Exception) -> bool:
    """Whether another try may succeed."""
    if status := _status(error):
        return status in (408, 429) or status >= 500
    names = _class_names(error)
    if not _REFUSALS.isdisjoint(names):
        return False
    if not _CONNECTION_ERRORS.isdisjoint(names) or _is_timeout(error):
        return True
    return isinstance(error, OSError) and not (
        isinstance(error, _FINAL) or error.errno in _FINAL_NUMBERS
    )


def _is_timeout(error: Exception) -> bool:
    return not _TIMEOUTS.isdisjoint(_class_names(error))


def number(error: Exception) -> int:
    """The number of an error, for `error_words`."""
    if isinstance(error, PermissionError) or _status(error) in (401, 403):
        return errno.EACCES
    return errno.EISDIR if isinstance(error, IsADirectoryError) else errno.EIO


def _status(error: Exception) -> int:
    """The HTTP status of an error of huggingface_hub; 0: it has none."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else 0


def _class_names(error: Exception) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def reason(error: Exception) -> str:
    """A fault in words that have no URL, signature or key."""
    if status := _status(error):
        return status_words(status)
    if _is_timeout(error) or isinstance(error, TimeoutError):
        return "it took too long"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = text.partition("\n")[0]
    if re.search(r"://|[?&=]|(?i:key|token|secret|signature|password)", text):
        text = ""
    name = type(error).__name__
    return text[:200] or name

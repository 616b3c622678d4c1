"""What an option of transformers needs and is not there, packages, settings and the Hub, as one line that names
it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_CLIENTS = {
    "httpx",
    "httpx2",
    "requests",
}  # whose errors are no OSError, whichever huggingface_hub uses


@contextmanager
def unavailable() -> Iterator[None]:
    """Turn errors about missing packages and an unreachable Hub, which come in several types, into one.

    Raises:
        ValueError: says what is missing and how to install it, in transformers' words where it has some.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        name = str(error.name)
        if name.startswith("mmpack"):
            raise
        if name == "mpi4py":
            raise ValueError(
                "DeepSpeed found no launcher and looked for MPI (mpi4py is not installed); start it with "
                "torchrun: torchrun --nproc_per_node N -m mmpack train ..."
            ) from error
        package = name.partition(".")[0]
        if not package.isidentifier():  # transformers' sentence about a distribution
            raise ValueError(_one_line(error)) from error
        raise ValueError(f"{package} is not installed; pip install {package}") from error
    except ImportError as error:
        if str(error.name).startswith(("mmpack", "torch")):
            raise
        raise ValueError(_one_line(error)) from error
    except RuntimeError as error:
        if not any(words in str(error) for words in ("to be installed", "to be set")):
            raise
        raise ValueError(_one_line(error)) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _CLIENTS:
            raise
        raise ValueError(
            f"the Hugging Face Hub cannot be reached ({_one_line(error)}); leave out --push_to_hub, or check the "
            "network"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

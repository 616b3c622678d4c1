"""Arrays that leave a DataLoader worker without a copy.

A worker's batch reaches the main process through shared memory. Tensors that are already in shared memory are sent
by name, others are copied first. So large arrays are allocated there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch.utils.data import get_worker_info


def empty(shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
    """Like `numpy.empty`, but in shared memory if called in a DataLoader worker; `as_tensor` finds its tensor."""
    if get_worker_info() is None:
        return np.empty(shape, dtype)
    tensor = torch.from_numpy(np.empty(0, dtype))
    num_bytes = math.prod(shape) * tensor.itemsize
    storage = torch.UntypedStorage._new_shared(num_bytes)  # as torch's own collation does
    tensor.set_(storage, 0, tuple(shape))  # type: ignore[call-overload]  # strides are optional
    array: NDArray[Any] = tensor.numpy()
    return array


def as_tensor(array: NDArray[Any]) -> torch.Tensor:
    """The array as a tensor with the same memory, shared if it is from `empty`."""
    tensor = array.base
    if isinstance(tensor, torch.Tensor) and tensor.shape == array.shape:
        return tensor
    return torch.from_numpy(array)


def as_ints(array: NDArray[Any]) -> tuple[Any, ...]:
    """The array's values as nested tuples of ints, on the host."""
    numbers = array.tolist()
    return tuple(numbers if array.ndim == 1 else map(tuple, numbers))

import numpy as np
from numpy.typing import NDArray

def best_fit_decreasing(
    num_tokens: NDArray[np.int64],
    capacity: int,
    num_patches: NDArray[np.int64] | None,
    patch_capacity: int,
    seed: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...

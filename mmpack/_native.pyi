import numpy as np
from numpy.typing import NDArray

def patchify(
    pixels: NDArray[np.uint8], patch: int, merge: int, patches: NDArray[np.uint8]
) -> None: ...
def normalize(
    patches: NDArray[np.uint8],
    table: NDArray[np.float32],
    frames: int,
    values: NDArray[np.float32],
) -> None: ...
def plan(
    num_tokens: NDArray[np.int64],
    capacity: int,
    num_patches: NDArray[np.int64] | None,
    patch_capacity: int,
    costs: NDArray[np.int64] | None,
    seed: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...

from typing import Any

import numpy as np
from numpy.typing import NDArray

TILE: int
MAX_RUN: int
PACK_ARRAYS: dict[str, tuple[str, str]]  # dtype and extents, as in mmpack.types
RESIZE_KERNELS: tuple[str, ...]  # instruction sets of `resize` on this machine, the fastest first

def patchify(
    pixels: NDArray[np.uint8],
    patch: int,
    merge: int,
    patches: NDArray[np.uint8],
    frame: int = 0,
) -> None: ...
def resize(
    pixels: NDArray[np.uint8],
    patch: int,
    merge: int,
    patches: NDArray[np.uint8],
    frame: int = 0,
    vertical_first: bool = False,
    kernel: str = "",
) -> None: ...
def arrow_pixels(schema: Any, array: Any, height: int, width: int) -> NDArray[np.uint8]: ...
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
def measure(
    input_ids: NDArray[np.int32],
    labels: NDArray[np.int32],
    offsets: NDArray[np.int32],
    grid_thw: NDArray[np.int32],
    temporal_step: NDArray[np.float32],
    grid_offsets: NDArray[np.int32],
    first_shown: NDArray[np.int32],
    image_id: int,
    video_id: int,
    merge_size: int,
) -> tuple[int, int, int, int, int, int, int, int]: ...
def assemble(
    input_ids: NDArray[np.int32],
    labels: NDArray[np.int32],
    offsets: NDArray[np.int32],
    grid_thw: NDArray[np.int32],
    temporal_step: NDArray[np.float32],
    grid_offsets: NDArray[np.int32],
    first_shown: NDArray[np.int32],
    image_id: int,
    video_id: int,
    merge_size: int,
    out: dict[str, NDArray[Any]],
) -> tuple[int, int, int, int, int, int]: ...
def outline(
    input_ids: NDArray[np.int32],
    labels: NDArray[np.int32],
    offsets: NDArray[np.int32],
    grid_thw: NDArray[np.int32],
    temporal_step: NDArray[np.float32],
    grid_offsets: NDArray[np.int32],
    first_shown: NDArray[np.int32],
    image_id: int,
    video_id: int,
    merge_size: int,
    out: dict[str, NDArray[Any]],
) -> tuple[int, int, int, int, int, int]: ...
def attention_tiles(offsets: NDArray[np.int32], causal: bool) -> NDArray[np.int32]: ...

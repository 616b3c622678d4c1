"""THE SPECIFICATION of context parallelism: a rank's part of a pack, in slow and clear code.

Like `mmpack.reference`, it is compared with the fast version (`mmpack.packing.context_part`) and imported by none.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from mmpack.reference import text_by_id
from mmpack.types import Pack


def part_of(pack: Pack, rank: int, size: int) -> dict[str, Any]:
    """What the rank at place `rank` of `size` gets of a pack.

    - Tokens: contiguous, T / size of them up to rounding. A supervised row belongs to the rank of its token; the
      label is the next token's, which may be another rank's.
    - Images and videos: whole frames (of a video, temporal patches), as the tower attends within them. Every frame
      is one rank's, `owners` says whose.
    - Features: a rank sends its own to the ranks that have a placeholder of them, each once per rank. What a rank
      receives is in the order of the senders, then of the pack.

    Returns:
        tokens: the rank's tokens, ascending. rows: its supervised rows, as indices into `pack.supervised_index`.
        frames: its frames. patches: their patches. sent: for each rank, the features sent to it, counted among
        those of the own frames. received: for each rank, the features received from it, counted in the pack.
        feature_index: (n,) for each own token, its feature among all received, or -1. text_order, text_id_offsets:
        as in `Pack`, of the own tokens.
    """
    bounds = [pack.num_tokens * r // size for r in range(size + 1)]
    tokens = range(bounds[rank], bounds[rank + 1])
    frame_bounds = [*pairwise(pack.vision_cu_seqlens.tolist())]
    owner = owners([end - begin for begin, end in frame_bounds], size)
    frames = [f for f in range(len(owner)) if owner[f] == rank]
    patches = [p for f in frames for p in range(*frame_bounds[f])]

    unit = pack.vision.merge_size**2
    owner_of_feature = [
        owner[f] for f, (a, b) in enumerate(frame_bounds) for _ in range(a, b, unit)
    ]
    own_features = [n for n, one in enumerate(owner_of_feature) if one == rank]

    def needed(by: int, of: int) -> list[int]:
        """The features that one rank needs of another."""
        shown = set(pack.feature_index[bounds[by] : bounds[by + 1]].tolist()) - {-1}
        return sorted(feature for feature in shown if owner_of_feature[feature] == of)

    received = [needed(by=rank, of=r) for r in range(size)]
    place = {feature: n for n, feature in enumerate(sum(received, []))}
    feature_index = [place.get(int(pack.feature_index[t]), -1) for t in tokens]
    text_order, text_id_offsets = text_by_id(
        pack.input_ids[tokens.start : tokens.stop], np.array(feature_index, dtype=np.int32)
    )
    return {
        "tokens": [*tokens],
        "rows": [n for n, row in enumerate(pack.supervised_index.tolist()) if row in tokens],
        "frames": frames,
        "patches": patches,
        "sent": [[own_features.index(f) for f in needed(by=r, of=rank)] for r in range(size)],
        "received": received,
        "feature_index": feature_index,
        "text_order": text_order.tolist(),
        "text_id_offsets": text_id_offsets.tolist(),
    }


def owners(num_patches: Sequence[int], size: int) -> list[int]:
    """The rank of each frame, given its patches: largest first, each to the rank with the fewest patches so far;
    of equal frames the first, of equal ranks the lowest."""
    owner, load = [0] * len(num_patches), [0] * size
    for frame in sorted(range(len(num_patches)), key=lambda f: -num_patches[f]):
        owner[frame] = load.index(min(load))
        load[owner[frame]] += num_patches[frame]
    return owner

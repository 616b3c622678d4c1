"""A rank's part of a pack: equal to the specification, complete, and only own images decoded."""

import dataclasses

import numpy as np
import pytest
from builders import (
    encoded,
    item_of,
    small_spec,
    with_noise,
)

from mmpack import ContextGroup, assemble, reference_context
from mmpack.packing.context_part import part_of

SIZES = (1, 2, 3, 4, 7)


def random_samples(rng, family):
    """Rows of text, images and videos, some images in several rows."""
    spec = small_spec(family)
    rows = []
    for _ in range(rng.integers(1, 5)):
        pieces = []
        for kind in rng.integers(0, 3, size=rng.integers(1, 5)):
            sides = [int(n) * 2 for n in rng.integers(1, 6, size=2)]
            texts = rng.integers(0, 90, size=rng.integers(1, 40)).tolist()
            pieces.append((texts, tuple(sides), (int(rng.integers(1, 4)), *sides))[kind])
        rows.append(encoded(spec, 1, *pieces))
    item = with_noise(rows, int(rng.integers(100)))
    known = {}
    for row in item if rng.random() < 0.5 else []:
        for ref, grid in zip(row.media, row.grid_thw.tolist()):
            known.setdefault((type(ref), *grid), ref)
    if not known:
        return item
    return item_of(
        [
            dataclasses.replace(
                row,
                media=tuple(
                    known[(type(ref), *grid)] for ref, grid in zip(row.media, row.grid_thw.tolist())
                ),
            )
            for row in item
        ]
    )


@pytest.mark.parametrize("seed", range(12))
def test_parts_equal_the_specification(seed):
    rng = np.random.default_rng(seed)
    pack = assemble(random_samples(rng, "qwen2_vl"), pixels=False)
    for size in SIZES:
        if pack.num_tokens < size:
            continue
        for rank in range(size):
            part = part_of(pack, ContextGroup(rank, size))
            exact = reference_context.part_of(pack, rank, size)
            own = part.pack
            tokens = exact["tokens"]
            assert np.array_equal(own.input_ids, pack.input_ids[tokens])
            assert np.array_equal(own.labels, pack.labels[tokens])
            assert np.array_equal(own.position_ids, pack.position_ids[:, tokens])
            assert [*range(*part.rows)] == exact["rows"]
            assert part.patches.tolist() == exact["patches"]
            assert own.feature_index.tolist() == exact["feature_index"]
            assert own.text_order.tolist() == exact["text_order"]
            assert own.text_id_offsets.tolist() == exact["text_id_offsets"]
            assert part.sent_index.tolist() == sum(exact["sent"], [])
            assert part.sent.tolist() == [*map(len, exact["sent"])]
            assert part.received.tolist() == [*map(len, exact["received"])]
            frames = np.diff(pack.vision_cu_seqlens)[exact["frames"]]
            assert np.diff(own.vision_cu_seqlens).tolist() == frames.tolist()
            assert own.vision_grid_thw.prod(1).tolist() == frames.tolist()
            for index, token, offsets in (
                (own.feature_index, own.feature_token, own.feature_offsets),
                (part.sent_index, part.sent_row, part.sent_offsets),
            ):
                for feature, (begin, end) in enumerate(zip(offsets, offsets[1:])):
                    assert token[begin:end].tolist() == np.flatnonzero(index == feature).tolist()
                assert offsets[-1] == len(token) == (index >= 0).sum()

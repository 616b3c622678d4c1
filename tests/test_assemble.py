from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from builders import encoded, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpack import VisionSpec, assemble, reference

SPEC = VisionSpec(min_pixels=1, max_pixels=1)

pieces = st.lists(
    st.one_of(st.integers(1, 50), st.sampled_from([(2, 2), (2, 6), (4, 4)])),
    min_size=1,
    max_size=12,
)
ragged = st.lists(pieces.map(lambda p: encoded(SPEC, *p)), min_size=1, max_size=6)


def same(one, other):
    """Packs equal to the last array element and dtype."""
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype, field.name
            assert np.array_equal(a, b), field.name
        else:
            assert a == b, field.name
    return True


@settings(max_examples=200, deadline=None)
@given(samples=ragged)
def test_every_index_of_a_pack(samples):
    pack = assemble(samples, pixels=False)
    T, F = len(pack.input_ids), len(pack.feature_token)
    assert np.diff(pack.cu_seqlens).tolist() == [sample.num_tokens for sample in samples]
    assert pack.max_seqlen == max(sample.num_tokens for sample in samples)
    assert pack.num_segments == len(samples)

    # Features and text are each other's complement, and the two feature indices inverse.
    placeholders = np.flatnonzero(pack.input_ids == SPEC.image_token_id)
    assert pack.feature_token.tolist() == placeholders.tolist()
    assert pack.feature_index[placeholders].tolist() == list(range(F))
    assert pack.feature_offsets.tolist() == list(range(F + 1))
    assert (np.delete(pack.feature_index, placeholders) == -1).all()
    assert sorted([*pack.text_order, *placeholders]) == list(range(T))

    # text_order: runs of one id, ascending, each in order of place; cut at MAX_RUN tokens only.
    runs = [
        pack.text_order[a:b] for a, b in zip(pack.text_id_offsets[:-1], pack.text_id_offsets[1:])
    ]
    assert pack.text_id_offsets[-1] == T - F
    assert all(len(set(pack.input_ids[run])) == 1 and (np.diff(run) > 0).all() for run in runs)
    ids = [pack.input_ids[run[0]] for run in runs]
    assert all(len(run) <= reference.MAX_RUN for run in runs)
    assert all(
        a < b or (a == b and len(run) == reference.MAX_RUN) for a, b, run in zip(ids, ids[1:], runs)
    )

    # Labels and the rows that reach the head.
    starts = pack.cu_seqlens[:-1]
    assert (pack.labels[starts] == -100).all()
    assert (pack.labels[placeholders] == -100).all()
    shifted = np.append(pack.labels[1:], -100)
    assert pack.supervised_index.tolist() == np.flatnonzero(shifted != -100).tolist()

    # Text positions count up in each segment, vision metadata covers every patch.
    for begin, end in zip(starts, pack.cu_seqlens[1:]):
        assert pack.position_ids[0, begin:end].tolist() == list(range(end - begin))
    assert pack.vision_cu_seqlens[-1] == len(pack.vision_position_ids) == 4 * F
    assert pack.vision_max_seqlen == max(np.diff(pack.vision_cu_seqlens), default=0)


@pytest.mark.smoke
def test_positions_of_the_whole_real_set_equal_get_rope_index(realset, vision):
    model = tiny_model(tiny_config(vision=vision)).model
    for start in range(0, len(realset), 8):
        samples = realset[start : start + 8]
        pack = assemble(samples, pixels=False)
        for begin, end, sample in zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:], samples):
            input_ids = torch.from_numpy(pack.input_ids[begin:end])[None]
            is_image = (input_ids == vision.image_token_id).int()
            grids = torch.from_numpy(sample.grid_thw).long() if len(sample.grid_thw) else None
            expected, _ = model.get_rope_index(input_ids, is_image, image_grid_thw=grids)
            assert np.array_equal(pack.position_ids[1:, begin:end], expected[:, 0].numpy())


@pytest.mark.smoke
def test_vision_metadata_equals_transformers(realset, vision):
    from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

    samples = [sample for sample in realset if len(sample.grid_thw) >= 2][:20]
    pack = assemble(samples, pixels=False)
    grid_thw = torch.from_numpy(pack.vision_grid_thw)
    positions = get_vision_position_ids(grid_thw, vision.merge_size)
    assert np.array_equal(pack.vision_position_ids, positions.numpy())
    assert np.array_equal(pack.vision_cu_seqlens, get_vision_cu_seqlens(grid_thw).numpy())


def test_features_land_where_masked_scatter_puts_them(realset, vision):
    rows = [sample for sample in realset if len(sample.grid_thw) >= 2][:20]
    pack = assemble(rows, pixels=False)
    assert len(pack.feature_offsets) - 1 < len(pack.feature_token)  # some are shown twice
    embeds = torch.randn(len(pack.input_ids), 8)
    features = torch.randn(len(pack.feature_offsets) - 1, 8)
    is_placeholder = torch.from_numpy(pack.input_ids == vision.image_token_id)
    indices = index, token, _ = indices_of(pack)
    inserted = reference.insert_features(
        embeds, reference.repeat_features(features, *indices), token
    )
    one_by_one = features[index[is_placeholder]]
    assert torch.equal(inserted, embeds.masked_scatter(is_placeholder[:, None], one_by_one))


def indices_of(pack):
    names = ("feature_index", "feature_token", "feature_offsets")
    return [torch.from_numpy(getattr(pack, name)) for name in names]


def test_insertion_gives_features_and_text_their_gradients():
    embeds = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    features = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    token = torch.tensor([1, 4], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda e, f: reference.insert_features(e, f, token), (embeds, features)
    )


def test_features_of_shared_images_sum_their_gradients():
    index = torch.tensor([-1, 2, 0, -1, 1, 2, 0, 2], dtype=torch.int32)
    token = torch.tensor([2, 6, 4, 1, 5, 7], dtype=torch.int32)
    offsets = torch.tensor([0, 2, 3, 6], dtype=torch.int32)

    def placed(features):
        repeated = reference.repeat_features(features, index, token, offsets)
        return reference.insert_features(features.new_zeros(8, 3), repeated, token)

    features = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(placed(features)[index >= 0], features[index[index >= 0]])
    assert torch.autograd.gradcheck(placed, features)
    for dtype in (torch.float32, torch.bfloat16):
        features, dout = (torch.randn(n, 3).to(dtype) for n in (3, 8))
        features.requires_grad_()
        placed(features).backward(dout)
        sums = torch.stack([dout[index == f].float().cumsum(0)[-1] for f in range(3)])  # in order
        rounding = 0 if dtype == torch.float32 else 2**-8 * sums.abs()
        assert ((features.grad.float() - sums).abs() <= rounding).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_varlen_attention_is_masked_attention(causal, heads):
    offsets = [0, 1, 4, 4, 11]
    T, scale = offsets[-1], 0.3
    q, k, v = (torch.randn(T, H, 8, dtype=torch.float64) for H in (heads[0], heads[1], heads[1]))
    segment = torch.bucketize(torch.arange(T), torch.tensor(offsets[1:]), right=True)
    mask = segment[:, None] == segment
    if causal:
        mask &= torch.ones(T, T, dtype=torch.bool).tril()
    k_full, v_full = (x.repeat_interleave(heads[0] // heads[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhk,thk->hqt", q, k_full) * scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = torch.einsum("hqt,thk->qhk", weights, v_full)
    out = reference.varlen_attention(q, k, v, offsets, causal=causal, scale=scale)
    assert out.dtype == torch.float64
    assert (out - expected).abs().max() <= 1e-14


def test_what_cannot_be_assembled_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        assemble([])
    other = replace(SPEC, max_pixels=5)
    with pytest.raises(ValueError, match="different VisionSpecs"):
        assemble([encoded(SPEC, 1), encoded(other, 1)], pixels=False)
    with pytest.raises(ValueError, match="impl must be"):
        assemble([encoded(SPEC, 1)], impl="fast")
    broken = replace(encoded(SPEC, 1, (2, 2)), grid_thw=np.empty((0, 3), dtype=np.int32))
    with pytest.raises(
        ValueError, match="row -1 of : .* got 1 image and video markers and 0 grids"
    ):
        assemble([broken], pixels=False)
    with pytest.raises(ValueError, match="1 grid but 0 media to decode; set"):
        assemble([encoded(SPEC, 1, (2, 2))])

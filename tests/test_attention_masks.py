"""Masks of a pack, against torch's own and a mask written out."""

import pytest
import torch
from builders import loss_and_grads, made_up_rows, small_config, tiny_model, worst_difference
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from mmpack import reference
from mmpack.hf import patch_model
from mmpack.ops import block_mask, dense_mask

PACKS = [[1], [128], [129], [127, 1], [5, 300, 40], [128, 128], [256, 1, 0, 128, 3], [50] * 13, []]


def offsets(lengths, device):
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)


def written_out(lengths, causal, device):
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths).long())
    same = segment[:, None] == segment
    return (same.tril() if causal else same).to(device)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_dense_masks(lengths, causal, device):
    expected = written_out(lengths, causal, device)
    cu_seqlens = offsets(lengths, device)
    mask = dense_mask(cu_seqlens, sum(lengths), causal=causal)
    assert torch.equal(mask[0, 0], expected)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        mask = dense_mask(cu_seqlens, sum(lengths), causal=causal, dtype=dtype)
        scores = torch.zeros(expected.shape, dtype=dtype, device=device)
        assert torch.equal(mask[0, 0], scores.masked_fill(~expected, torch.finfo(dtype).min))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", PACKS[:-1], ids=str)
def test_block_masks_are_torchs(lengths, causal, device):
    """Every array, the unused ends too."""
    T, allowed = sum(lengths), written_out(lengths, causal, device)
    expected = create_block_mask(lambda b, h, q, kv: allowed[q, kv], 1, 1, T, T, device=device)
    mask = block_mask(offsets(lengths, device), T, causal=causal)
    for name in ("kv", "full_kv", "q", "full_q"):
        for part in ("num_blocks", "indices"):
            ours, theirs = (getattr(m, f"{name}_{part}") for m in (mask, expected))
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs), f"{name}_{part}"
    assert mask.seq_lengths == expected.seq_lengths


def test_flex_attention_with_the_block_mask(device):
    lengths, (T, H, K) = PACKS[4], (345, 2, 16)
    q, k, v = torch.randn(3, T, H, K, device=device)
    mask = block_mask(offsets(lengths, device), T)
    out = flex_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask)
    places = offsets(lengths, "cpu").tolist()
    expected = reference.varlen_attention(q, k, v, places, causal=True, scale=K**-0.5)
    torch.testing.assert_close(out[0].transpose(0, 1), expected, rtol=1e-4, atol=1e-5)


def test_an_unpatched_model_with_a_dense_mask():
    """What the mask is for: with it, transformers' own attention separates packed segments."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter's turn")
    batch, _, num_items = made_up_rows()
    expected = loss_and_grads(patch_model(tiny_model(small_config())), [batch], num_items)
    pack = batch.pop("mmpack")
    batch["position_ids"] = batch["position_ids"][1:]  # no text positions: stock sees one segment
    batch["attention_mask"] = dense_mask(pack["cu_seqlens"], pack["offsets"][-1])
    loss, grads = loss_and_grads(tiny_model(small_config()), [batch], num_items)
    assert loss == pytest.approx(expected[0], rel=1e-6)
    assert worst_difference(grads, expected[1])[0] <= 1e-5


def test_meta_and_errors(device):
    on_meta = torch.tensor([0, 3, 200], dtype=torch.int32, device="meta")
    assert dense_mask(on_meta, 200).shape == (1, 1, 200, 200)
    assert block_mask(on_meta, 200).kv_indices.shape == (1, 1, 2, 2)
    with pytest.raises(ValueError, match="cu_seqlens must be flat int32"):
        block_mask(torch.tensor([0, 3], device=device), 3)
    with pytest.raises(ValueError, match="bool or floating, got torch.int64"):
        dense_mask(offsets([3], device), 3, dtype=torch.int64)

"""A rank's part of a pack: equal to the specification, complete, and only own images decoded."""

import contextlib
import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from builders import (
    FAMILIES,
    HYBRIDS,
    SMALL_SPEC,
    encoded,
    item_of,
    packed,
    small_config,
    small_spec,
    tiny_model,
    with_noise,
)
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.models.qwen3_5 import modeling_qwen3_5

from mmpack import ContextGroup, ImageRef, VideoRef, assemble, reference_context
from mmpack.data import images
from mmpack.hf import (
    PackCollator,
    context_parallel,
    loss_denominator,
    model_patch,
    patch_model,
    unpatch_model,
)
from mmpack.hf.context_parallel import check_heads
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


@contextlib.contextmanager
def as_one_of_two(rank):
    """A rank beside another that is not there: nothing is sent, and what is received is anything."""
    dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
    try:
        with mock.patch.object(context_parallel, "check_same_packs"):  # nobody answers
            yield
    finally:
        dist.destroy_process_group()


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


def collators(family="qwen2_vl", size=2, **options):
    """A collator for the whole pack, and one for each rank."""
    model = tiny_model(small_config(family))
    whole = PackCollator(model=patch_model(model), **options)
    ranks = [
        PackCollator(model=patch_model(model, context=ContextGroup(r, size)), **options)
        for r in range(size)
    ]
    return whole, ranks


@pytest.mark.parametrize("pixels", ["float32", "uint8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_the_whole_batch(family, pixels):
    """Tokens, labels, rows and pixels of the ranks, side by side; of each rank only its own images are decoded."""
    item = random_samples(np.random.default_rng(7), family)
    shown = [ref for sample in item for ref in sample.media]
    assert {type(ref) for ref in shown} == {ImageRef, VideoRef}
    whole, ranks = collators(family, 4, pixels=pixels)
    batch = whole([item])
    with mock.patch.object(images, "load_patches", wraps=images.load_patches) as decode:
        parts = [one([item]) for one in ranks]
    distinct = {id(ref) for ref in shown if isinstance(ref, ImageRef)}
    assert decode.call_count == len(distinct)
    for name, dim in (("input_ids", 1), ("labels", 1), ("shift_labels", 1), ("position_ids", 2)):
        assert torch.equal(torch.cat([part[name] for part in parts], dim), batch[name])
    for name in ("pixel_values", "pixel_values_videos"):
        rows = torch.cat([part[name] for part in parts if name in part])
        assert sorted(rows.float().sum(1).tolist()) == sorted(batch[name].float().sum(1).tolist())
        assert sum(map(len, (p[name] for p in parts if name in p))) == len(batch[name])
    assert sum(part["mmpack"]["num_patches"] for part in parts) == batch["mmpack"]["num_patches"]
    grids = ("image_grid_thw", "video_grid_thw")
    for part in parts:
        of_part = [part[name].prod(1).sum() for name in grids if name in part]
        assert sum(of_part) == part["mmpack"]["num_patches"]
    assert {part["mmpack"]["context"]["checksum"] for part in parts} == {
        parts[0]["mmpack"]["context"]["checksum"]
    }


@pytest.mark.parametrize("reduction", ["token", "sample"])
def test_weights_and_counts_of_the_ranks_add_up(reduction):
    whole, ranks = collators(size=4, loss_reduction=reduction)
    rows = [encoded(SMALL_SPEC, *range(n, n + 9)) for n in range(3, 60, 9)]
    rows = [dataclasses.replace(row, source="ab"[n % 2]) for n, row in enumerate(rows)]
    batch, parts = whole(rows), [one(rows) for one in ranks]
    total = loss_denominator([batch]).item()
    assert sum(loss_denominator([part]).item() for part in parts) == pytest.approx(total, rel=1e-12)
    weights = [part["mmpack"]["context"]["weight"] for part in parts]
    assert weights == pytest.approx([total] * 4, rel=1e-12)
    by_source = dict(zip(batch["mmpack"]["sources"], batch["mmpack"]["source_sums"]))
    for name, weight in by_source.items():
        found = [dict(zip(p["mmpack"]["sources"], p["mmpack"]["source_sums"])) for p in parts]
        assert sum(one.get(name, 0) for one in found) == pytest.approx(weight, rel=1e-12)
    if reduction == "sample":
        bits = torch.cat([part["mmpack"]["loss_weight_bits"] for part in parts])
        assert torch.equal(bits, batch["mmpack"]["loss_weight_bits"])


def test_a_pack_has_a_token_for_each_rank():
    whole, ranks = collators(size=4, pad_to=3)
    rows = [encoded(SMALL_SPEC, 1, 2)]
    parts = [one(rows) for one in ranks]
    assert [part["input_ids"].shape[1] for part in parts] == [1, 2, 1, 2]
    assert whole(rows)["input_ids"].shape[1] == 3


def test_dropped_samples_are_dropped_on_every_rank():
    """Each rank decodes all images of a data set that drops samples, or it would not know."""
    rows = [
        encoded(SMALL_SPEC, 1, (4, 4), 2),
        encoded(SMALL_SPEC, 3, (2, 2), 4),
        encoded(SMALL_SPEC, 5, 6),
    ]
    item = with_noise(rows)
    broken = dataclasses.replace(item[1].media[0], data=b"no image")
    samples = [item[0], dataclasses.replace(item[1], media=(broken,)), item[2]]
    whole, ranks = collators()
    for policy in ("raise", "drop"):
        dropping = item_of(samples)
        object.__setattr__(dropping.policy, "on_bad_image", policy)
        if policy == "raise":  # only the rank whose image it is opens it
            with pytest.raises(ValueError, match="cannot be|is in none"):
                ranks[1]([dropping])
            assert ranks[0]([dropping])["mmpack"]["num_patches"] == 16
            continue
        batch, parts = whole([dropping]), [one([dropping]) for one in ranks]
        ids = torch.cat([part["input_ids"] for part in parts], 1)
        assert torch.equal(ids, batch["input_ids"])
        assert [part["mmpack"]["num_patches"] for part in parts] == [16, 0]


def test_processor_outputs_are_divided():
    """Pixels that are there already."""
    item = with_noise([encoded(SMALL_SPEC, 1, (4, 4), 2, (2, 4), 3)])
    whole, ranks = collators()
    alone = whole([item])
    features = {
        "input_ids": alone["input_ids"][0],
        "labels": alone["labels"][0],
        "pixel_values": alone["pixel_values"],
        "image_grid_thw": alone["image_grid_thw"],
    }
    encoder = mock.Mock(vision=SMALL_SPEC)
    for one in ranks:
        one.encoder = encoder
        expected = one([item])
        found = one([features])
        assert torch.equal(found["pixel_values"], expected["pixel_values"])
        assert torch.equal(found["image_grid_thw"], expected["image_grid_thw"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContextGroup(2, 2), "rank 2 is no place in a context group of 2 ranks"),
        (lambda: ContextGroup(0, 0), "at least one rank, got size=0"),
        (lambda: ContextGroup.of(0, 6, 4), "6 ranks do not divide into context groups of 4"),
        (lambda: ContextGroup.of(6, 6, 3), "rank 6 is none of 6 ranks"),
        (lambda: ContextGroup.of(0, 6, 0), "at least one rank, got size=0"),
    ],
)
def test_what_is_no_group(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_consecutive_ranks_are_a_group():
    places = [ContextGroup.of(rank, 6, 3) for rank in range(6)]
    assert [(place.rank, place.size) for place in places] == [(0, 3), (1, 3), (2, 3)] * 2


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("qwen2_vl", 3, r"4 heads \(num_attention_heads\) do not divide among the 3 ranks"),
        ("qwen3_5", 8, r"4 heads \(num_attention_heads\) do not divide among the 8 ranks"),
    ],
)
def test_heads_must_divide(family, size, message):
    with pytest.raises(ValueError, match=message):
        patch_model(tiny_model(small_config(family)), context=ContextGroup(0, size))


def test_key_heads_and_ranks_must_divide_each_other():
    config = small_config()
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 12, 3
    config.text_config.hidden_size = 12 * 8
    check_heads(config, 6)
    with pytest.raises(ValueError, match=r"3 heads \(num_key_value_heads\) and the 4 ranks"):
        check_heads(config, 4)
    with pytest.raises(ValueError, match=r"2 heads \(linear_num_value_heads\) do not divide"):
        hybrid = small_config("qwen3_5")
        hybrid.text_config.linear_num_value_heads = 2
        check_heads(hybrid, 4)


def test_what_does_not_work_is_refused():
    model = patch_model(tiny_model(small_config()), context=ContextGroup(0, 2))
    for options, message in (
        ({"full_logits": True}, "full_logits=True does not work under context parallelism"),
        ({"assemble": "device"}, "assemble='device' does not work under context parallelism"),
    ):
        with pytest.raises(ValueError, match=message):
            PackCollator(model=model, **options)
    collate = PackCollator(model=model)
    batch = collate([encoded(SMALL_SPEC, 1, 2, 3)])
    with pytest.raises(
        ValueError, match="torch.distributed is not initialized; .* torchrun --nproc_per_node 2"
    ):
        model(**batch)
    with pytest.raises(
        ValueError, match=r"for ContextGroup\(rank=0, size=2\), but the model is patched for a rank"
    ):
        patch_model(model)(**batch)
    whole = PackCollator(model=model)([encoded(SMALL_SPEC, 1, 2, 3)])
    assert model(**whole).loss.isfinite()
    patch_model(model, context=ContextGroup(1, 2))
    for one in (batch, whole):
        with pytest.raises(ValueError, match="PackCollator\\(model=model\\) after"):
            model(**one)
    patch_model(model, context=ContextGroup(0, 1))
    assert model(**whole).loss.isfinite() and PackCollator(model=model).context is None
    unpatch_model(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pieces", [(1, 2, 3), (1, (4, 4), 2, 3)])
def test_an_unpatched_model_refuses_a_part(family, pieces):
    """It would train on a half of each pack."""
    model = patch_model(tiny_model(small_config(family)), context=ContextGroup(0, 2))
    batch = PackCollator(model=model)([packed([encoded(small_spec(family), *pieces)], family)])
    theirs = "specify exactly one of input_ids or inputs_embeds"
    with pytest.raises(ValueError, match=f"a rank's part of a pack, which only|{theirs}"):
        unpatch_model(model)(**batch)


def test_a_routers_auxiliary_loss_is_refused():
    model = patch_model(tiny_model(small_config("qwen3_vl_moe")), context=ContextGroup(0, 2))
    batch = PackCollator(model=model)([packed([encoded(SMALL_SPEC, 1, 2, 3)], "qwen3_vl_moe")])
    with pytest.raises(ValueError, match="output_router_logits asks for the router's auxiliary"):
        model(**batch, output_router_logits=True)
    model.config.text_config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits asks for the router's auxiliary"):
        model(**batch)
    with pytest.raises(ValueError, match="output_router_logits asks for the router's auxiliary"):
        patch_model(unpatch_model(model), context=ContextGroup(0, 2))


@pytest.mark.parametrize("context", [None, ContextGroup(1, 2)])
def test_the_convolution_gets_strides_that_its_kernel_takes(context):
    """causal-conv1d refuses channels in rows whose strides are no multiple of 8."""
    model = patch_model(tiny_model(small_config("qwen3_5")), context=context)
    batch = PackCollator(model=model)([encoded(small_spec("qwen3_5"), range(2, 18))])
    stock, strides = modeling_qwen3_5.causal_conv1d_fn, []

    def noted(x, *args, **kwargs):
        strides.append(x.stride())
        return stock(x, *args, **kwargs)

    with (
        as_one_of_two(1),
        torch.no_grad(),
        mock.patch.object(modeling_qwen3_5, "causal_conv1d_fn", noted),
    ):
        model(**batch)
    assert strides and all(one[1] == 1 for one in strides)
    assert not any(stride % 8 for one in strides for stride in (one[0], one[2]))


@pytest.mark.slow
def test_one_graph_for_packs_of_all_sizes():
    """torch.compile, on a rank whose exchanges send nothing."""
    model = patch_model(tiny_model(small_config()), context=ContextGroup(1, 2))
    collate = PackCollator(model=model)
    dynamo = torch._dynamo
    dynamo.reset()
    dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="eager")
    with as_one_of_two(1):
        for n in (5, 7, 9, 11):
            rows = [
                encoded(SMALL_SPEC, 1, (4, 4), *range(2, 2 + n)),
                encoded(SMALL_SPEC, *range(30)),
            ]
            compiled(
                **collate(with_noise(rows)), num_items_in_batch=torch.tensor(3)
            ).loss.backward()
    assert not dynamo.utils.counters["graph_break"]
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the first pack's sizes, and all


def test_the_self_test_runs_without_ranks():
    """At patch time, on the whole pack of each rank."""
    with mock.patch.object(
        model_patch, "check_isolation", wraps=model_patch.check_isolation
    ) as ran:
        patch_model(tiny_model(small_config("qwen3_5")), context=ContextGroup(1, 2))
    ran.assert_called_once()


@pytest.mark.smoke
@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_no_question_to_the_device(family):
    """Forward and backward of one rank on the meta device, where a question to the data is an error."""
    from test_matrix import on_meta

    if torch.cuda.is_available():
        pytest.skip("the interpreter's turn")
    model = patch_model(tiny_model(small_config(family)), context=ContextGroup(1, 2))
    item = random_samples(np.random.default_rng(7), family)
    batch = PackCollator(model=model)([item])
    if family.endswith("_moe"):
        model.to(torch.bfloat16)  # the one dtype of torch's grouped products on the meta device
    with as_one_of_two(1):
        loss = model.to("meta")(**on_meta(batch), num_items_in_batch=torch.tensor(3)).loss
        loss.backward()
    assert loss.is_meta
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())

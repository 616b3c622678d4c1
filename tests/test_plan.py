from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpack import PackPlan, plan_packs
from mmpack.packing.plan import padded_utilization, plan_epoch
from mmpack.store.plan_file import load_plan, save_plan

sizes = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 90)), max_size=60)


@settings(max_examples=400, deadline=None)
@given(sizes=sizes, capacity=st.integers(1, 130), patch_capacity=st.none() | st.integers(1, 100))
@pytest.mark.parametrize("on_overflow", ["drop", "truncate"])
def test_every_sample_once_and_no_capacity_exceeded(on_overflow, sizes, capacity, patch_capacity):
    tokens, patches = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
    plan = plan_packs(
        tokens,
        capacity,
        num_patches=patches,
        patch_capacity=patch_capacity,
        on_overflow=on_overflow,
    )
    too_long = tokens > capacity
    if patch_capacity is not None:
        too_long |= patches > patch_capacity
    if on_overflow == "drop":
        assert plan.dropped.tolist() == np.flatnonzero(too_long).tolist()
        assert plan.num_truncated == 0
    else:
        assert plan.truncated.tolist() == np.flatnonzero(too_long).tolist()
        assert plan.num_dropped == 0
        tokens = np.minimum(tokens, capacity)
        patches = np.minimum(patches, patch_capacity or 10**9)

    planned = sorted([*plan.sample_index.tolist(), *plan.dropped.tolist()])
    assert planned == list(range(len(tokens)))
    assert plan.bin_offsets[0] == 0
    assert plan.bin_offsets[-1] == len(plan.sample_index)
    for pack in range(plan.num_packs):
        samples = plan.samples_of(pack)
        assert len(samples) > 0
        assert tokens[samples].sum() == plan.pack_tokens[pack] <= capacity
        assert patch_capacity is None or patches[samples].sum() <= patch_capacity


@settings(max_examples=100, deadline=None)
@given(sizes=sizes, seed=st.integers(0, 2**63))
def test_the_same_seed_gives_the_same_plan(sizes, seed):
    tokens = [size for size, _ in sizes]
    one, two = (plan_packs(tokens, 120, seed=seed) for _ in range(2))
    assert one.sample_index.tolist() == two.sample_index.tolist()
    assert one.bin_offsets.tolist() == two.bin_offsets.tolist()


def test_the_plan_is_the_same_on_every_machine():
    tokens = [7, 3, 9, 1, 4, 4, 8, 2, 6, 5]
    plan = plan_packs(tokens, 10, seed=3)
    packs = [plan.samples_of(n).tolist() for n in range(plan.num_packs)]
    assert packs == [[6, 7], [9, 5], [8, 4], [2, 3], [0, 1]]
    other = plan_packs(tokens, 10, seed=4)
    assert other.sample_index.tolist() != plan.sample_index.tolist()


def test_best_fit_decreasing_takes_the_tightest_pack():
    # 60 and 50 open packs; 40 closes the first; 30 goes to the second (room 50), 20 closes it.
    plan = plan_packs([60, 50, 40, 30, 20], 100)
    packs = sorted(sorted(plan.samples_of(n).tolist()) for n in range(plan.num_packs))
    assert packs == [[0, 2], [1, 3, 4]]
    assert plan.utilization == 1.0


def test_a_huge_capacity_holds_everything():
    plan = plan_packs(np.full(1000, 10**9), 10**15)
    assert plan.num_packs == 1


def test_a_capacity_above_the_trees_resolution_is_never_exceeded():
    tokens = np.random.default_rng(0).integers(1, 3_000_000, 2000)
    plan = plan_packs(tokens, 5_000_000)
    assert plan.pack_tokens.max() <= 5_000_000
    assert plan.utilization > 0.99


def test_real_lengths_fill_their_packs(shared):
    data = np.load(shared / "lengths" / "sft_mix.npz")
    real = ~data["imputed"]
    tokens = (data["text_tokens"] + data["image_tokens"])[real]
    plan = plan_packs(tokens, 8192, on_overflow="drop")
    assert plan.num_dropped == (tokens > 8192).sum()
    fullest = np.sort(plan.pack_tokens)[1:]  # the last pack aside
    assert fullest.mean() / 8192 >= 0.99


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            ([10, 200, 30, 300], 100),
            {},
            "too long for a pack: 2 of 4 samples; sample 3 needs 300 tokens",
        ),
        (
            ([10, 20], 100),
            {"num_patches": [5, 50], "patch_capacity": 20},
            "1 of 2 .* sample 1 needs 50 patches, the capacity is 20",
        ),
        (([1, -2], 10), {}, "must not be negative, sample 1 is"),
        (([1.5], 10), {}, "must be a flat array of integers"),
        (([[1]], 10), {}, "must be a flat array of integers"),
        (([1], 0), {}, "capacity and patch_capacity must be positive"),
        (([1], 10), {"seed": -1}, "seed must not be negative"),
        (([1], 10), {"patch_capacity": 4}, "patch_capacity needs num_patches"),
        (([1], 10), {"num_patches": [1, 2], "patch_capacity": 4}, "1 num_tokens but 2 num_patches"),
        (([1], 10), {"on_overflow": "split"}, "must be 'error', 'drop' or 'truncate'"),
        (([1], 10), {"cost": [1, 2]}, r"cost must be a flat array of 1 numbers, got int64 \(2,\)"),
        (([1], 10), {"cost": ["a"]}, "cost must be a flat array of 1 numbers"),
        (([1, 1], 10), {"cost": [1, -1]}, "must be finite and not negative, sample 1 has -1.0"),
        (([1, 1], 10), {"cost": [np.nan, 1]}, "must be finite and not negative, sample 0 has nan"),
    ],
)
def test_arguments_that_make_no_sense(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        plan_packs(*arguments, **options)


def test_padded_batches_hold_their_longest():
    assert padded_utilization([5, 5, 5, 5], batch_size=2) == 1.0
    assert padded_utilization([1, 1, 1, 5], batch_size=4) == 8 / 20
    # Five samples: the last batch holds one, the 5 shares a batch of four or is alone.
    assert padded_utilization([1, 1, 1, 1, 5], batch_size=4) in (9 / 21, 9 / 9)
    assert padded_utilization([]) == 1.0


def test_no_samples_make_no_packs():
    plan = plan_packs([], 100)
    assert (plan.num_packs, plan.utilization) == (0, 1.0)


@pytest.mark.parametrize("cost", [None, [3.0, 1.0, 4.0, 1.0]])
@pytest.mark.parametrize("patch_capacity", [None, 400])
def test_a_plan_is_saved_and_loaded(tmp_path, patch_capacity, cost):
    plan = plan_packs(
        [50, 60, 70, 200],
        100,
        num_patches=[1, 2, 3, 4],
        patch_capacity=patch_capacity,
        cost=cost,
        seed=7,
        on_overflow="drop",
    )
    save_plan(plan, tmp_path)
    loaded = load_plan(tmp_path)
    for name in PackPlan.__slots__:
        assert np.array_equal(getattr(loaded, name), getattr(plan, name)), name
    assert plan_epoch(loaded, 1).sample_index.tolist() == plan_epoch(plan, 1).sample_index.tolist()


def test_a_plan_of_an_earlier_version_is_refused(tmp_path):
    save_plan(plan_packs([1], 2), tmp_path)
    (tmp_path / "plan.json").unlink()
    with pytest.raises(ValueError, match=r"plan\.json is damaged: it is missing; pack again"):
        load_plan(tmp_path)


GOOD = plan_packs(
    [5, 3, 9, 2, 6], 8, num_patches=[0, 4, 0, 2, 1], patch_capacity=4, on_overflow="drop"
)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"sample_index": GOOD.sample_index + 2}, "sample_index names samples that are not among"),
        ({"sample_index": GOOD.sample_index - 2}, "sample_index names samples that are not among"),
        (
            {"sample_index": GOOD.sample_index[[0, 0, 1, 2]]},
            "a sample is neither in exactly one pack nor dropped",
        ),
        ({"dropped": GOOD.dropped[:0]}, "a sample is neither in exactly one pack nor dropped"),
        ({"dropped": GOOD.dropped + 3}, "dropped names samples"),
        ({"truncated": np.array([5])}, "truncated names samples"),
        ({"truncated": np.array([1, 1])}, "not in ascending order"),
        ({"bin_offsets": GOOD.bin_offsets + 1}, "bin_offsets do not go from 0 to 4"),
        ({"bin_offsets": GOOD.bin_offsets[:0]}, "bin_offsets do not go from 0 to 4"),
        ({"bin_offsets": np.array([0, 2, 2, 4])}, "bin_offsets do not increase"),
        ({"bin_offsets": np.array([0, 9, -9, 4])}, "bin_offsets do not increase"),
        ({"bin_offsets": np.array([0, 2**63 - 1, -(2**63), 4])}, "bin_offsets do not increase"),
        ({"pack_tokens": GOOD.pack_tokens + 1}, "not the sums"),
        ({"pack_tokens": GOOD.pack_tokens[:1]}, "not the sums"),
        ({"capacity": 7}, "more tokens than its capacity of 7"),
        ({"capacity": 0}, "'capacity' is 0, not an integer from 1 to"),
        ({"seed": -1}, "'seed' is -1"),
        ({"patch_capacity": 3}, "more patches than its capacity of 3"),
        ({"patch_capacity": None}, "only one of num_patches and patch_capacity"),
        ({"num_patches": GOOD.num_patches[1:]}, r"num_patches has shape \(4,\)"),
        ({"num_tokens": GOOD.num_tokens - 9}, "num_tokens of sample 3 is negative"),
        ({"cost": -GOOD.num_tokens}, "cost of sample 2 is negative"),
        ({"cost": np.ones(6)}, r"cost has shape \(6,\)"),
    ],
)
def test_what_is_no_plan_is_refused(change, why, tmp_path):
    """Sealed with checksums: a store may be made by anybody."""
    save_plan(GOOD, tmp_path)
    load_plan(tmp_path)
    save_plan(replace(GOOD, **change), tmp_path)
    with pytest.raises(ValueError, match=rf"plan\.json is damaged: .*{why}.*; pack again"):
        load_plan(tmp_path)


def test_an_epoch_of_a_plan_that_was_not_planned_is_an_error(tmp_path):
    """It has packs for some samples, but not the packs that there would be."""
    plan = plan_packs([1, 1, 1], 1)
    save_plan(replace(plan, capacity=3), tmp_path)
    with pytest.raises(ValueError, match="the plan has 3 packs, .* give 1 in epoch 2; pack again"):
        plan_epoch(load_plan(tmp_path), 2)


@pytest.mark.parametrize(
    ("tokens", "patches", "costs"),
    [
        ([-1], None, None),
        ([101], None, None),
        ([1], [51], None),
        ([1, 2], [3], None),
        ([[1]], None, None),
        ([1], None, [-1]),
        ([1], None, [2**62 + 1]),
        ([1, 1], None, [2**62, 1]),
        ([1, 2], None, [3]),
    ],
)
def test_the_native_core_refuses_hostile_arrays(tokens, patches, costs):
    from mmpack import _native

    patches, costs = (None if array is None else np.array(array) for array in (patches, costs))
    with pytest.raises(ValueError, match="must"):
        _native.plan(np.array(tokens), 100, patches, 50, costs, 0)

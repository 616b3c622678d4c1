"""Packs whose samples show the same images: their exact costs, and samples that are planned together for them."""

import dataclasses
import json

import numpy as np
import pytest
from builders import encoded, small_config, small_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpack import PackedDataset, plan_packs
from mmpack.cli.main import main
from mmpack.media_options import MediaOptions
from mmpack.packing.cost import costs_of, image_flops, sample_flops
from mmpack.packing.held_out import held_out, part_of, within_limits
from mmpack.packing.image_units import UnitSizes, units_of
from mmpack.packing.pack_stats import cost_floor, rank_imbalance
from mmpack.packing.plan import plan_epoch
from mmpack.packing.plan_samples import SampleSizes, plan_by_images, plan_samples
from mmpack.packing.sample_images import (
    ImageNumbers,
    SampleImages,
    images_in,
    images_of,
    pack_costs,
    pack_of,
    patches_in,
)
from mmpack.packing.shared_images import first_shown
from mmpack.store.plan_file import load_plan, save_plan
from mmpack.types import ImageRef, VideoRef

SPEC = small_spec()
# How high an image of a number is; wide enough that capacities matter.
HEIGHTS = (2, 2, 4, 8)


def sample_of(text, *images):
    """A sample of `text` supervised tokens after images of these numbers, each 2 patches wide."""
    sample = encoded(SPEC, *((HEIGHTS[n % 4], 2) for n in images), [1] * text)
    return dataclasses.replace(sample, media=tuple(ImageRef(f"/{n}.png") for n in images))


made_up = st.lists(
    st.tuples(st.integers(2, 30), st.lists(st.integers(0, 9), max_size=3)), min_size=1, max_size=40
)


@settings(max_examples=100, deadline=None)
@given(
    rows=made_up,
    limits=st.tuples(st.integers(8, 60), st.none() | st.integers(8, 60)),
    balances=st.booleans(),
    seed=st.integers(0, 2**63),
)
def test_plans_by_units_keep_every_law_of_plans(rows, limits, balances, seed):
    samples = [sample_of(text, *images) for text, images in rows]
    capacity, patch_capacity = limits
    options = {"patch_capacity": patch_capacity, "on_overflow": "drop", "seed": seed}
    cost = small_config() if balances else None
    plan = PackedDataset.from_samples(samples, capacity, cost, group_images=True, **options).plan
    alone = PackedDataset.from_samples(samples, capacity, cost, **options).plan
    assert plan.dropped.tolist() == alone.dropped.tolist()
    assert sorted([*plan.sample_index, *plan.dropped]) == list(range(len(samples)))
    again = PackedDataset.from_samples(samples, capacity, cost, group_images=True, **options).plan
    assert again.sample_index.tolist() == plan.sample_index.tolist()
    for epoch in range(3):
        other = plan_epoch(plan, epoch)
        assert other.num_packs == plan.num_packs
        assert sorted(other.sample_index) == sorted(plan.sample_index)
        packs = pack_of(other)
        assert len({*zip(plan.unit, packs)}) == len({*plan.unit})  # a unit is in one pack
        for pack in range(other.num_packs):
            inside = [samples[n] for n in other.samples_of(pack)]
            assert sum(one.num_tokens for one in inside) == other.pack_tokens[pack] <= capacity
            assert patch_capacity is None or distinct_patches(inside) <= patch_capacity
    assert patches_in(plan, images_of(samples)) == (
        sum(samples[n].num_patches for n in plan.sample_index),
        sum(distinct_patches([samples[n] for n in plan.samples_of(b)]) for b in range(plan.num_packs)),
    )  # fmt: skip


def distinct_patches(samples):
    """As a pack of these has them."""
    grids = np.concatenate([sample.grid_thw for sample in samples])
    shown = first_shown(samples)
    return int(grids.prod(axis=1)[shown == np.arange(len(shown))].sum())


@settings(max_examples=100, deadline=None)
@given(rows=made_up, most=st.tuples(*[st.integers(10, 80)] * 3), alone=st.integers(0, 40))
def test_units_are_within_their_limits_and_show_a_common_image(rows, most, alone):
    samples = [sample_of(text, *images) for text, images in rows]
    tokens = np.array([sample.num_tokens for sample in samples])
    images = images_of(samples)
    is_alone = np.arange(len(rows)) == alone
    one_each = np.ones_like(images.ids)
    cost = np.array([5 + len({*shown}) for _, shown in rows])  # an image costs 1, all else 5
    unit = units_of(
        images, UnitSizes(tokens, most[0], most[1], is_alone, cost, one_each, most_cost=most[2])
    )
    for number in {*unit}:
        members = np.flatnonzero(unit == number)
        assert number == members[0]
        if len(members) == 1:
            continue
        shown = [{*rows[n][1]} for n in members]
        assert tokens[members].sum() <= most[0]
        assert distinct_patches([samples[n] for n in members]) <= most[1]
        assert 5 * len(members) + len(set.union(*shown)) <= most[2]
        assert not is_alone[members].any()
        assert all(any(one & other for other in shown if other is not one) for one in shown)


def test_an_image_in_very_many_samples_fills_units():
    count = 20_000
    ids, offsets = np.zeros(count, dtype=np.int64), np.arange(count + 1)
    images = SampleImages(ids, np.full((count, 3), (1, 4, 4), dtype=np.int32), offsets)
    unit = units_of(images, UnitSizes(np.full(count, 30), 1000))
    assert np.bincount(np.unique(unit, return_inverse=True)[1]).tolist() == [33] * 606 + [2]


def test_a_unit_that_does_not_fit_is_refused():
    with pytest.raises(
        ValueError, match="unit 7 has 11 tokens in all its samples, but a pack holds 10"
    ):
        plan_packs([5, 6, 4], 10, unit=[7, 7, 1])
    patches = {"num_patches": [3, 3, 1], "patch_capacity": 5}
    with pytest.raises(
        ValueError, match="unit 7 has 6 patches in all its samples, but a pack holds 5"
    ):
        plan_packs([5, 5, 4], 10, unit=[7, 7, 1], **patches)
    for unit in ([1, 2], [[1, 2, 3]], [0.5, 1, 2]):
        with pytest.raises(ValueError, match="unit must be a flat array of 3 integers, got"):
            plan_packs([5, 6, 4], 10, unit=unit)
    plan = plan_packs([5, 60, 4], 10, unit=[7, 7, 1], on_overflow="drop")  # what is left fits
    assert sorted(plan.sample_index) == [0, 2]
    assert plan_packs([], 10, unit=[]).num_packs == 0


@pytest.mark.parametrize("frozen", [(), ("vision",)])
def test_the_cost_of_a_pack_counts_an_image_once(frozen):
    rng = np.random.default_rng(0)
    rows = [
        (int(rng.integers(2, 40)), rng.integers(0, 6, rng.integers(0, 4)).tolist())
        for _ in range(60)
    ]
    samples, config = [sample_of(text, *images) for text, images in rows], small_config()
    plan = PackedDataset.from_samples(samples, 80, on_overflow="truncate").plan
    assert plan.num_truncated == 0
    alone, packs = pack_costs(plan, samples, config, frozen=frozen)
    for pack in range(plan.num_packs):
        inside = [samples[n] for n in plan.samples_of(pack)]
        grids = np.concatenate([sample.grid_thw for sample in inside])
        shown = first_shown(inside)
        again = grids[shown != np.arange(len(shown))]
        whole = costs_of(inside, config, frozen).sum()
        assert packs[pack] == whole - image_flops(config, again, frozen).sum()
    none = {"num_tokens": [7], "num_supervised": [3], "grid_thw": [], "image_offsets": [0, 0]}
    text = sample_flops(config, **none, frozen=frozen)[0]
    twice = sample_of(3, 2, 2)  # 7 tokens: of the same image, two
    alone, packs = pack_costs(plan_packs([twice.num_tokens], 99), [twice], config, frozen=frozen)
    longer = {**none, "num_tokens": [twice.num_tokens], "num_supervised": [twice.num_supervised]}
    once = sample_flops(config, **longer, frozen=frozen) + image_flops(config, [1, 4, 2], frozen)
    assert alone.tolist() == packs.tolist() == once.tolist() > [text]


def test_what_a_truncated_sample_has_lost_is_not_counted():
    samples = [sample_of(4, 3), dataclasses.replace(sample_of(4, 3))]
    long = encoded(SPEC, [1] * 20, (8, 2))
    samples.append(dataclasses.replace(long, media=(ImageRef("/3.png"),)))
    options = {"on_overflow": "truncate", "group_images": True}
    plan = PackedDataset.from_samples(samples, 21, **options).plan
    assert plan.truncated.tolist() == [2]
    images = images_in(plan, samples)
    assert np.diff(images.offsets).tolist() == [1, 1, 0]
    assert patches_in(plan, images) == (32, 16)
    assert plan.unit.tolist() == [0, 0, 2]
    text = dataclasses.replace(encoded(SPEC, [1] * 20))
    _, packs = pack_costs(plan, samples, small_config())
    assert packs[pack_of(plan)[2]] == costs_of([text], small_config())[0]


def samples_with_everything():
    """Images in files and bytes, with options, videos with and without timestamps, no references, documents."""
    of = {"media": (ImageRef("/a.png"), ImageRef("b", b"bytes"))}
    both = dataclasses.replace(encoded(SPEC, 1, (4, 2), 2, (4, 2), 3), **of)
    given = ImageRef("/a.png", options=MediaOptions(max_pixels=784))
    one = encoded(SPEC, 1, (4, 2), 2)
    clip = VideoRef("/v.mp4", num_frames=4, fps=2.0)
    frames = VideoRef("/f", frames=(ImageRef("/a.png"), ImageRef("c", b"bytes")), num_frames=2)
    video = encoded(SPEC, 1, (2, 4, 2), 2)
    media = [
        (one, ImageRef("/a.png")), (one, given), (one, ImageRef("other", b"bytes")), (one, ImageRef("/d.png")),
        (video, clip), (video, frames), (video, clip), (one, given), (one, dataclasses.replace(given, data=b"bytes")),
        (encoded(SPEC, 1, (2, 2), 2), ImageRef("/a.png")), (video, frames),
    ]  # fmt: skip
    found = [both, one, *(dataclasses.replace(sample, media=(ref,)) for sample, ref in media), one]
    return [dataclasses.replace(sample, row=row) for row, sample in enumerate(found)]


def test_a_list_and_a_store_show_the_same_images(tmp_path):
    pytest.importorskip("pyarrow")
    from mmpack.store.arrow_schema import as_batch
    from mmpack.store.encoded_store import write_batches

    samples = samples_with_everything()
    batches = map(as_batch, (samples[:1], samples[1:6], samples[6:]))
    store = write_batches(tmp_path / "store", batches, SPEC)
    shown = [images_of(samples), images_of(store)]
    for one in shown:
        assert one.ids.tolist() == [0, 1, 2, 0, 3, 1, 4, 5, 6, 5, 3, 7, 8, 6, 9]
        assert one.grid_thw.tolist() == np.concatenate([s.grid_thw for s in samples]).tolist()
        assert one.offsets.tolist() == np.cumsum([0, *(len(s.grid_thw) for s in samples)]).tolist()
    numbers = ImageNumbers(hash)  # as mmpack check, which does not keep bytes
    assert sum((numbers.of(sample) for sample in samples), []) == shown[0].ids.tolist()


def test_parts_of_a_video_with_timestamps_and_pieces_of_documents():
    third = small_spec("qwen3_vl")
    video = VideoRef("/v.mp4", num_frames=6, fps=2.0)
    sample = dataclasses.replace(encoded(third, 1, (3, 4, 2), 2), media=(video,))
    assert images_of([sample, sample]).ids.tolist() == [0, 1, 2, 0, 1, 2]
    refs = tuple(ImageRef(f"/{n}.png") for n in (0, 1, 0))
    document = dataclasses.replace(
        encoded(SPEC, [1] * 9, (4, 2), [2] * 9, (4, 2), [3] * 9, (4, 2), [4] * 9), media=refs
    )
    short = dataclasses.replace(encoded(SPEC, 1, (4, 2), 2), media=refs[:1])
    pieces = PackedDataset.from_samples(
        [document, document, short, short], 24, on_overflow="split", group_images=True
    )
    images = images_of(pieces.samples)
    assert len(pieces.samples) > 4 and images.ids.tolist() == [0, 1, 0] * 2 + [0, 0]
    each = [images_of([piece]).num_patches.tolist() for piece in pieces.samples]
    assert [len(one) for one in each] == np.diff(images.offsets).tolist()
    assert pieces.plan.unit[-1] == pieces.plan.unit[-2]


def test_a_plan_by_units_is_saved_and_loaded(tmp_path):
    pytest.importorskip("pyarrow")
    samples = [sample_of(4, n % 3) for n in range(12)]
    options = {"patch_capacity": 16, "group_images": True}
    dataset = PackedDataset.from_samples(samples, 30, small_config(), **options)
    dataset.save(tmp_path / "packed")
    loaded = PackedDataset.from_store(tmp_path / "packed")
    assert loaded.fingerprint() == dataset.fingerprint()
    assert loaded.plan.unit.tolist() == dataset.plan.unit.tolist()
    for epoch in (0, 1):
        one, other = (plan_epoch(plan, epoch) for plan in (dataset.plan, loaded.plan))
        assert one.sample_index.tolist() == other.sample_index.tolist()
    same_packs = dataclasses.replace(dataset.plan, unit=np.arange(12))
    assert PackedDataset(samples, same_packs).fingerprint() != dataset.fingerprint()
    plan = dataset.plan
    split = plan.unit.copy()
    split[plan.samples_of(1)[0]] = split[plan.samples_of(0)[0]]
    save_plan(dataclasses.replace(plan, unit=split), tmp_path)
    with pytest.raises(ValueError, match=r"plan\.json is damaged: unit \d+ is in several packs"):
        load_plan(tmp_path)


def test_parts_of_a_plan_are_whole_units(tmp_path):
    """Those that are held out, and those that an entry's num_samples leaves out."""
    samples = [dataclasses.replace(sample_of(4, n % 7), row=n, source="a.json") for n in range(40)]
    used = within_limits(samples, {"a.json": (30, 35)})
    is_val = held_out(samples, 0.3, used)
    side = used + 2 * is_val
    plan = plan_samples(samples, 40, 24, "error", 0, group_images=True, side=side)
    assert max(np.bincount(plan.unit)) > 1
    for own in (used & ~is_val, is_val):
        one = part_of(plan, own)
        assert sorted(one.sample_index) == np.flatnonzero(own).tolist()
        in_units = images_of(samples).counted_once(images_of(samples).num_patches, plan.unit)
        assert one.totals(plan.num_patches).tolist() == one.totals(in_units).tolist()
        for pack in range(one.num_packs):
            inside = [samples[n] for n in one.samples_of(pack)]
            assert distinct_patches(inside) <= one.totals(plan.num_patches)[pack] <= 24
        save_plan(one, tmp_path)
        assert load_plan(tmp_path).unit.tolist() == plan.unit.tolist()
        assert plan_epoch(one, 1).num_packs == one.num_packs
    with pytest.raises(AssertionError):
        part_of(plan, np.arange(40) != np.flatnonzero(np.bincount(plan.unit) > 1)[0])


def test_a_mixture_plans_rows_by_themselves_and_says_so(caplog):
    samples = [dataclasses.replace(sample_of(4, n % 3), row=n) for n in range(12)]
    limits = {"capacity": 40, "patch_capacity": 32}
    grouped = PackedDataset.from_samples(samples, **limits, group_images=True)
    plain = PackedDataset.from_samples(samples, **limits)
    assert grouped.plan.num_patches.sum() < plain.plan.num_patches.sum()
    mixed = PackedDataset.mixed({"a": (grouped, 1), "b": (plain, 1)})
    assert (
        "packed with --group-images (group_images): a; a mixture plans each row by" in caplog.text
    )
    expected = PackedDataset.mixed({"a": (plain, 1), "b": (plain, 1)})
    assert mixed.plan.sample_index.tolist() == expected.plan.sample_index.tolist()
    for pack in range(mixed.plan.num_packs):
        numbers = mixed.plan.samples_of(pack)
        assert sum(mixed.samples[n].num_patches for n in numbers) <= 32


def real_images(shared, realset_rows):
    """(images, tokens, costs for Qwen2-VL-2B, of that the images') of the real set's rows."""
    lengths = json.loads((shared / "realset" / "lengths.json").read_text(encoding="utf-8"))["sft"]
    config = json.loads((shared / "configs" / "qwen2_vl_2b.json").read_text(encoding="utf-8"))
    assert [row["id"] for row in lengths] == [row["id"] for row in realset_rows]
    paths = [path for row in realset_rows for path in row.get("images", ())]
    grids = np.array([grid for row in lengths for grid in row["grid_thw"]], dtype=np.int32)
    number = {path: n for n, path in enumerate(dict.fromkeys(paths))}
    ids = np.array([number[path] for path in paths])
    images = SampleImages(ids, grids, np.cumsum([0, *(len(row["grid_thw"]) for row in lengths)]))
    tokens = np.array([row["text_tokens"] + row["image_tokens"] for row in lengths])
    costs = sample_flops(config, tokens, tokens // 4, grids, images.offsets)
    return images, tokens, costs, image_flops(config, grids)


def planned(images, tokens, capacity, cost=None, image_cost=None):
    """The plan by units of rows that fit."""
    fits = tokens <= capacity
    entries = fits[images.sample_of]
    cost = None if cost is None else cost[fits]
    image_cost = None if image_cost is None else image_cost[entries]
    images, tokens = images.of_samples(fits), tokens[fits]
    sizes = SampleSizes(tokens, images.sums(images.num_patches), fits[fits] < 0, cost, image_cost)
    return plan_by_images(images, sizes, (capacity, None), 0, "error"), images


@pytest.mark.parametrize(
    ("capacity", "saved_before", "saved"), [(8192, 0.07, 0.38), (32768, 0.16, 0.5)]
)
def test_real_rows_in_packs_as_full_have_fewer_patches(
    shared, realset_rows, capacity, saved_before, saved
):
    images, tokens, *_ = real_images(shared, realset_rows)
    plan, shown = planned(images, tokens, capacity)
    before = plan_packs(tokens[tokens <= capacity], capacity)
    assert plan.utilization >= before.utilization - 0.005
    for one, least in ((before, saved_before), (plan, saved)):
        in_rows, in_packs = patches_in(one, shown)
        assert in_rows == 4 * (tokens[tokens <= capacity].sum() - text_tokens(shared, capacity))
        assert 1 - in_packs / in_rows == pytest.approx(least, abs=0.02)


def text_tokens(shared, capacity):
    lengths = json.loads((shared / "realset" / "lengths.json").read_text(encoding="utf-8"))["sft"]
    pairs = [(row["text_tokens"], row["image_tokens"]) for row in lengths]
    return sum(text for text, image in pairs if text + image <= capacity)


@pytest.mark.parametrize(("capacity", "saved"), [(8192, 0.19), (16384, 0.37), (32768, 0.46)])
def test_real_rows_by_units_cost_the_same(shared, realset_rows, capacity, saved):
    images, tokens, costs, image_cost = real_images(shared, realset_rows)
    plan, shown = planned(images, tokens, capacity, costs, image_cost)
    assert plan.utilization >= 0.99
    fits = tokens <= capacity
    each = image_cost[fits[images.sample_of]]
    text = costs[fits] - shown.sums(each)
    for epoch in (0, 1):
        one = plan_epoch(plan, epoch)
        by_unit = one.totals(text + shown.counted_once(each, one.unit))
        exact = one.totals(text + shown.counted_once(each, pack_of(one)))
        floor = rank_imbalance(cost_floor(one, costs[fits], by_unit), 8, seed=1)
        assert rank_imbalance(by_unit, 8, seed=1) <= floor + 0.005
        # Two units of a pack may show the same image, which then costs less than planned.
        assert (exact <= by_unit).all() and rank_imbalance(exact, 8, seed=1) <= floor + 0.01
    in_rows, in_packs = patches_in(plan, shown)
    assert 1 - in_packs / in_rows == pytest.approx(saved, abs=0.02)


def test_costs_in_numbers_are_balanced_as_they_are():
    rng = np.random.default_rng(0)
    samples = [sample_of(int(rng.integers(2, 30)), int(rng.integers(0, 40))) for _ in range(400)]
    cost = rng.random(400) + 1
    plan = PackedDataset.from_samples(samples, 200, cost, group_images=True).plan
    given = plan.cost / plan.cost.sum()
    assert given == pytest.approx(cost / cost.sum(), rel=1e-9)
    assert len({*plan.unit}) < 400


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A folder with rows of which several show one picture, a tokenizer and a config."""
    pytest.importorskip("pyarrow")
    from mmpack.cli.demo import write_data

    folder = tmp_path_factory.mktemp("rows")
    write_data(folder, 24)
    made = json.loads((folder / "train.json").read_text())
    made = [row for row in made if len(row.get("images", ())) == 1] * 4
    (folder / "rows.json").write_text(json.dumps(made))
    return folder


def run(capsys, command, folder, *options):
    words = [command, folder / "rows.json", "--tokenizer", folder / "tokenizer", *options]
    assert main(list(map(str, words))) == 0
    return capsys.readouterr().out


def test_check_and_pack_say_what_is_saved(rows, tmp_path, capsys):
    *_, last = run(capsys, "check", rows, "--json").splitlines()
    by_capacity = {
        one["capacity"]: one["patches"] for one in json.loads(last)["summary"]["by_capacity"]
    }
    table = run(capsys, "check", rows)
    figures, said = {}, {}
    for name, options in {"packs": [], "grouped": ["--group-images"]}.items():
        for how, words in ((figures, ["--json"]), (said, ["--overwrite"])):
            all_words = [*options, "--capacity", 2048, "--out", tmp_path / name, *words]
            how[name] = run(capsys, "pack", rows, *all_words)
    for name, printed in figures.items():
        patches = json.loads(printed)["patches"]
        assert patches["rows"] == by_capacity[2048]["rows"]
        assert patches["packs"] == by_capacity[2048][name]
        less = f"{1 - patches['packs'] / patches['rows']:.0%} fewer"
        line = next(one for one in said[name].splitlines() if one.startswith("vision tower"))
        assert f"{patches['rows']:,} patches in rows, {patches['packs']:,} in packs" in line
        assert less in line and less in next(one for one in table.splitlines() if "2,048" in one)
        assert ("planned together" in said[name]) == (name == "grouped")
    assert by_capacity[2048]["grouped"] < by_capacity[2048]["packs"] < by_capacity[2048]["rows"]
    dataset = PackedDataset.from_store(tmp_path / "grouped")
    assert dataset.plan.unit is not None
    assert sum(distinct_patches(pack) for pack in dataset) == by_capacity[2048]["grouped"]


def test_the_balance_that_pack_reports_is_that_of_its_packs(rows, tmp_path, capsys):
    options = ["--config", rows / "config.json", "--capacity", 2048, "--out", tmp_path / "packed"]
    report = json.loads(run(capsys, "pack", rows, *options, "--json"))
    dataset = PackedDataset.from_store(tmp_path / "packed")
    config = json.loads((rows / "config.json").read_text())
    alone, packs = pack_costs(dataset.plan, dataset.samples, config)
    assert report["busiest"] == round(packs.max() / packs.mean(), 4)
    assert report["busiest_floor"] == round(max(1, alone.max() / packs.mean()), 4)
    assert (packs < dataset.plan.totals(alone)).any()

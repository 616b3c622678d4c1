"""Mixtures: how often each sample comes, shares in every part of an epoch, workers, resuming, what is refused."""

import io
import json
from collections import Counter
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
from builders import QUIET, SMALL_SPEC, encoded, small_config, tiny_config, tiny_model
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from mmpack import (
    ContextGroup,
    PackedDataset,
    PackStream,
    assemble,
    cost_floor,
    plan_packs,
    rank_imbalance,
)
from mmpack.hf import PackCollator, PackingCallback, patch_model
from mmpack.packing.mixed_dataset import joined
from mmpack.packing.mixture import Mixture, check_alike, even_order, mixture_of
from mmpack.packing.split_documents import split_samples
from mmpack.types import ImageRef

SPEC = replace(SMALL_SPEC, max_pixels=28 * 28 * 16)
CONFIG = tiny_config(100, vision=SPEC)


def mixed(seed, capacity, count, shares=(0.2, 0.3, 0.5), **options):
    """A mixture of short text, long text, and images, whose tokens cost about twice as much."""
    rng = np.random.default_rng(seed)
    sizes = [
        np.clip(rng.lognormal(np.log(mean), 0.7, count) * capacity / 8192, 4, capacity // 4)
        for mean in (150, 500, 700)
    ]
    sizes = [one.astype(np.int64) for one in sizes]
    plans = {
        f"source {n}": (plan_packs(one, capacity), share)
        for n, (one, share) in enumerate(zip(sizes, shares))
    }
    costs = [one * (1 + one / 4 / capacity) for one in sizes]
    costs[-1] = costs[-1] * rng.uniform(1.7, 2.3, count)
    values = {"by": "tokens", "epoch_tokens": None, "seed": seed, **options}
    return mixture_of(plans, np.concatenate(costs), **values)


@pytest.mark.parametrize("by", ["tokens", "samples"])
@pytest.mark.parametrize("epoch_tokens", [None, 3_000])
def test_samples_of_a_source_come_equally_often(by, epoch_tokens):
    """Over any number of epochs, up to one; the source with the most per weight once in every epoch."""
    mixture = mixed(1, 512, 60, (0.1, 0.6, 0.3), by=by, epoch_tokens=epoch_tokens)
    seen = [Counter() for _ in mixture.sources]
    tokens = mixture.union.num_tokens
    for epoch in range(6):
        for source, count in zip(mixture.sources, seen):
            drawn = source.samples_of(epoch, mixture.seed)
            assert drawn.tolist() == source.samples_of(epoch, mixture.seed).tolist()
            count.update(drawn.tolist())
            of = [count[number] for number in source.numbers]
            assert max(of) - min(of) <= 1
            units = len(drawn) if by == "samples" else int(tokens[drawn].sum())
            assert abs(units - source.budget) <= source.sizes.max()
    passes = [source.passes for source in mixture.sources]
    if epoch_tokens is None:
        assert min(passes) == 1
        once = mixture.sources[passes.index(1)]
        assert once.is_whole
        assert sorted(once.samples_of(3, 1)) == once.numbers.tolist()
        assert not np.array_equal(once.samples_of(2, 1), once.samples_of(3, 1))
    if by == "tokens":
        total = sum(source.budget for source in mixture.sources)
        shares = [source.budget / total for source in mixture.sources]
        np.testing.assert_allclose(shares, [0.1, 0.6, 0.3], atol=1e-3)
        assert epoch_tokens is None or abs(total - epoch_tokens) <= len(passes)
    elif epoch_tokens is not None:
        found = sum(tokens[s.numbers].mean() * s.budget for s in mixture.sources)
        assert found == pytest.approx(epoch_tokens, rel=0.1)


def worst_share(mixture, plan, window=100):
    """The largest difference of a source's share in `window` consecutive packs from the asked one."""
    tokens = mixture.tokens_of(plan)
    sums = np.concatenate([np.zeros((len(tokens), 1)), tokens.cumsum(axis=1)], axis=1)
    window = min(window, plan.num_packs)
    parts = sums[:, window:] - sums[:, :-window]
    asked = np.array([source.share for source in mixture.sources])
    return np.abs(parts / parts.sum(axis=0) - asked[:, None]).max()


@pytest.mark.parametrize(
    ("seed", "capacity", "count"),
    [
        (0, 8192, 800),  # 140 packs
        (1, 2048, 1_000),
        *(
            pytest.param(seed, capacity, count, marks=pytest.mark.slow)
            for seed in range(2, 8)
            for capacity, count in ((8192, 1_000), (8192, 20_000), (2048, 4_000), (32768, 10_000))
        ),
    ],
)
def test_packing_keeps_the_shares(seed, capacity, count):
    """In any 100 consecutive packs within 2 points, plus one longest row; packs are full, and cost the same."""
    mixture = mixed(seed, capacity, count)
    longest = int(mixture.union.num_tokens.max())
    for epoch in range(2):
        plan = mixture.plan(epoch)
        assert plan.num_packs > 100
        assert plan.utilization >= 0.99
        assert worst_share(mixture, plan) <= 0.02 + longest / (100 * capacity)
        cost = rank_imbalance(plan.totals(plan.cost), 8)
        floor = rank_imbalance(cost_floor(plan, plan.cost), 8)
        assert cost <= floor + 0.01
        drawn = np.concatenate([source.samples_of(epoch, seed) for source in mixture.sources])
        assert Counter(plan.sample_index.tolist()) == Counter(drawn.tolist())
        assert np.array_equal(plan.pack_tokens, plan.totals(plan.num_tokens))
        print(
            f"{plan.num_packs} packs, {plan.utilization:.4f} full, share off by {worst_share(mixture, plan):.4f} "
            f"(as planned: {worst_share(mixture, shuffled(plan)):.4f}), busiest of 8 ranks {cost:.4f}, floor {floor:.4f}"
        )


def shuffled(plan):
    """The plan with its packs in random order."""
    order = np.random.default_rng(0).permutation(plan.num_packs)
    index = np.concatenate([plan.samples_of(pack) for pack in order])
    offsets = np.cumsum([0, *np.diff(plan.bin_offsets)[order]])
    return replace(plan, sample_index=index, bin_offsets=offsets)


def test_an_order_has_every_pack_once():
    rng = np.random.default_rng(0)
    for packs in (0, 1, 7, 600):
        for sources in (1, 3):
            order = even_order(rng.integers(0, 100, (sources, packs)), 5)
            assert sorted(order.tolist()) == list(range(packs))


def test_every_epoch_has_as_many_packs():
    """Parts of passes differ in length: an epoch that needs more packs loses its last samples, a few."""
    for seed in range(6):
        mixture = mixed(seed, 512, 40, (0.17, 0.41, 0.42))
        first = mixture.plan(0)
        lost = []
        for epoch in range(1, 6):
            plan = mixture.plan(epoch, first.num_packs)
            assert plan.num_packs <= first.num_packs
            drawn = sum(len(source.samples_of(epoch, seed)) for source in mixture.sources)
            lost.append(drawn - len(plan.sample_index))
            for source in mixture.sources:
                if source.is_whole:
                    found = plan.sample_index[np.isin(plan.sample_index, source.numbers)]
                    assert sorted(found) == source.numbers.tolist()
        assert min(lost) >= 0
        assert max(lost) <= 24


# Data sets


def chats(count=40, spec=SPEC, capacity=64):
    samples = [
        replace(encoded(spec, 1, n, [2] * (4 + 5 * n % 13)), source="rows.json", row=n)
        for n in range(count)
    ]
    return PackedDataset.from_samples(samples, capacity)


def images(count=20):
    data = io.BytesIO()
    Image.linear_gradient("L").resize((56, 56)).convert("RGB").save(data, "PNG")
    image = ImageRef("an image in the row", data.getvalue(), (56, 56))
    samples = []
    for n in range(count):
        one = encoded(SPEC, 3, n, (4, 4), [4] * (3 + n % 9))
        samples.append(replace(one, media=(image,), source="rows.json", row=n))
    return PackedDataset.from_samples(samples, 64)


def documents(count=6):
    """Some are longer than a pack."""
    samples = [
        replace(encoded(SPEC, 5, n, [6] * (20 + 30 * n)), source="docs.jsonl", row=n)
        for n in range(count)
    ]
    return PackedDataset.from_samples(split_samples(samples, 64), 64)


def mixed_dataset(shares=(0.5, 0.2, 0.3), **options):
    sources = {"chat": chats(), "images": images(), "docs": documents()}
    named = {name: (one, share) for (name, one), share in zip(sources.items(), shares)}
    return PackedDataset.mixed(named, CONFIG, **options)


def ids_of(dataset):
    return [[sample.input_ids.tolist() for sample in dataset[n]] for n in range(len(dataset))]


def test_text_images_and_documents_share_packs():
    dataset = mixed_dataset()
    names = {sample.source for n in range(len(dataset)) for sample in dataset[n]}
    assert names == {"chat::rows.json", "images::rows.json", "docs::docs.jsonl"}
    assert max(len({s.source for s in dataset[n]}) for n in range(len(dataset))) == 3
    report = {one["name"]: one for one in dataset.report()}
    assert sum(one["share"] for one in report.values()) == pytest.approx(1, abs=1e-3)
    tokens = {name: int(one.plan.pack_tokens.sum()) for name, one in
              {"chat": chats(), "images": images(), "docs": documents()}.items()}  # fmt: skip
    most = max(tokens, key=lambda name: tokens[name] / report[name]["asked"])
    assert report[most]["passes"] == 1
    assert report[most]["drawn"] == report[most]["samples"]
    for name, one in report.items():
        assert one["share"] == pytest.approx(one["asked"], abs=64 / sum(tokens.values()))
        assert one["tokens"] / tokens[name] == pytest.approx(one["passes"], abs=64 / tokens[name])
    dataset.source_weights = {"chat": 2.0}
    with pytest.raises(ValueError, match="sources are 'chat', 'docs', 'images'; use one"):
        dataset.source_weights = {"rows.json": 2.0}
    assert dataset.id_range() == (0, 93)
    assert "MixedSamples(" in repr(dataset.samples)
    with pytest.raises(ValueError, match="a mixture has no store of its own; save its sources"):
        dataset.save("anywhere")


def test_stores_are_mixed_as_the_data_sets_they_hold(tmp_path):
    parts = {"chat": chats(), "images": images(), "docs": documents()}
    for name, one in parts.items():
        one.save(tmp_path / name)
    stores = PackedDataset.mixed({name: (tmp_path / name, 1) for name in parts}, CONFIG, seed=3)
    lists = PackedDataset.mixed({name: (one, 1) for name, one in parts.items()}, CONFIG, seed=3)
    assert ids_of(stores) == ids_of(lists)
    assert stores.fingerprint() == lists.fingerprint()
    for dataset in (stores, lists):
        dataset.set_epoch(2)
    assert ids_of(stores) == ids_of(lists)
    other = PackedDataset.mixed({name: (one, 1) for name, one in parts.items()}, CONFIG, seed=4)
    assert ids_of(other) != ids_of(mixed_dataset((1, 1, 1), seed=3))


def test_an_epoch_is_planned_once_and_workers_see_it(monkeypatch):
    planned = []
    plan = Mixture.plan

    def counted(self, epoch, num_packs=None):
        planned.append(epoch)
        return plan(self, epoch, num_packs)

    monkeypatch.setattr(Mixture, "plan", counted)
    dataset = mixed_dataset()
    dataset.append_empty_packs(len(dataset) + 1)
    loader = DataLoader(
        dataset, None, num_workers=2, persistent_workers=True, collate_fn=ids_of_item
    )
    seen = []
    for epoch in (0, 1, 5):
        dataset.set_epoch(epoch)
        seen.append(list(loader))
        assert seen[-1] == ids_of(dataset)
    assert planned == [0, 1, 5]
    assert seen[0] != seen[1] != seen[2]
    dataset.set_epoch(0)
    assert ids_of(dataset) == seen[0]


def ids_of_item(item):
    return [sample.input_ids.tolist() for sample in item]


def train(folder, dataset, resume=None, **options):
    model = patch_model(tiny_model(small_config()))
    seen = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 24, "learning_rate": 1e-2}
    args = TrainingArguments(str(folder), **{**QUIET, **settings, **options})
    trainer = Trainer(model, args, PackCollator(model=model), dataset)
    PackingCallback(dataset).attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return seen, [entry["loss"] for entry in log], log


def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path):
    shares = (0.6, 0.1, 0.3)
    order, losses, log = train(tmp_path, mixed_dataset(shares, epoch_tokens=700))
    names = {name for entry in log for name in entry if name.startswith("pack/loss/")}
    assert names == {f"pack/loss/{name}" for name in ("chat", "images", "docs")}
    assert len(mixed_dataset(shares, epoch_tokens=700)) < 20  # over the end of an epoch
    checkpoint = str(tmp_path / "checkpoint-15")
    rest, again, _ = train(tmp_path, mixed_dataset(shares, epoch_tokens=700), checkpoint)
    assert rest == order[15:]
    assert again == losses
    with pytest.raises(
        ValueError, match=r"mixture was \{'chat': 0.6, .* and is \{'chat': 0.5, .*from_pretrained"
    ):
        train(tmp_path, mixed_dataset(epoch_tokens=700), checkpoint)
    with pytest.raises(ValueError, match=r"shares of was tokens and is samples"):
        train(tmp_path, mixed_dataset(shares, epoch_tokens=700, by="samples"), checkpoint)


OTHER = replace(SPEC, image_mean=(0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("sources", "options", "reason"),
    [
        ({}, {}, "a mixture needs at least one source"),
        ({"a": 0.0}, {}, r"--mix \(sources\): the weight of 'a' is 0.0, not a positive number"),
        ({"a": float("inf")}, {}, "the weight of 'a' is inf"),
        ({"a::b": 1}, {}, "a source's name must be a text without ::, .* got 'a::b'"),
        ({"a": 1}, {"by": "rows"}, r"--mix-by \(by\) must be 'tokens' or 'samples', got 'rows'"),
        ({"a": 1}, {"epoch_tokens": 63}, r"must be at least the tokens of a pack, 64, got 63"),
        ({"a": 1}, {"seed": -1}, "seed must not be negative"),
        ({"a": 1e-320, "b": 1}, {}, "has more than 2,147,483,647 samples; give 'b' a smaller"),
        (
            {"a": 1},
            {"epoch_tokens": 10**18},
            "2,147,483,647 samples; give 'a' a smaller share of --mix",
        ),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(sources, options, reason):
    with pytest.raises(ValueError, match=reason):
        PackedDataset.mixed(
            {name: (chats(), weight) for name, weight in sources.items()}, **options
        )


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (
            lambda: chats(capacity=80),
            "'a' and 'b' .* not packed alike, they differ in --capacity 64 and 80; pack one",
        ),
        (lambda: chats(spec=OTHER), r"the spec's image_mean \[0.48.* and \[0.5, 0.5, 0.5\]"),
        (lambda: PackedDataset.mixed({"c": (chats(), 1)}), "'b' is a mixture itself; mix its"),
        (lambda: PackedDataset.from_samples([], 64), "the source 'b' of a mixture has no samples"),
        (
            lambda: PackStream([], None, 64),
            "a PackStream cannot be mixed, because its sizes are not",
        ),
    ],
)
def test_sources_that_differ_are_refused(other, reason):
    with pytest.raises(ValueError, match=reason):
        PackedDataset.mixed({"a": (chats(), 1), "b": (other(), 1)})


def test_the_example_of_the_docs_names_a_store_that_is_not_there():
    with pytest.raises(
        ValueError, match=r"nowhere has no finished store \(there is no such folder\)"
    ):
        PackedDataset.mixed({"a": (Path("nowhere"), 1)})


def test_what_is_no_mixture_is_named():
    with pytest.raises(ValueError, match=r"a dict, name -> \(source, weight\), got a list"):
        PackedDataset.mixed([(chats(), 1)])
    with pytest.raises(
        ValueError, match=r"source 'a' of a mixture must be \(source, weight\), got a Pack"
    ):
        PackedDataset.mixed({"a": chats()})
    with pytest.raises(
        ValueError, match="must be a flat array of .* the model's config, got a str"
    ):
        PackedDataset.mixed({"a": (chats(), 1)}, "config.json")


def test_a_report_is_json():
    assert json.loads(json.dumps(mixed_dataset().report()))[0]["by"] == "tokens"


def shared_images(count=12):
    """Pairs of rows that show one image, planned together."""
    samples = []
    for n in range(count):
        data = io.BytesIO()
        picture = Image.linear_gradient("L").resize((56, 56)).convert("RGB")
        picture.putpixel((0, 0), (n // 2, 0, 0))
        picture.save(data, "PNG")
        one = encoded(SPEC, 3, n, (4, 4), [4] * 5)
        image = ImageRef("in the row", data.getvalue(), (56, 56))
        samples.append(replace(one, media=(image,), source="rows.json", row=n))
    return samples


def test_a_mixture_counts_every_image_of_rows_that_were_grouped(caplog):
    """Rows of one image may come to other packs, whose patches are limited."""
    samples = shared_images()
    grouped = PackedDataset.from_samples(samples, 64, patch_capacity=32, group_images=True)
    assert grouped.plan.num_patches.sum() < sum(one.num_patches for one in samples)
    mixture = PackedDataset.mixed({"a": (grouped, 1), "b": (grouped, 3)}, CONFIG, epoch_tokens=640)
    assert (
        "packed with --group-images (group_images): a, b; a mixture plans each row" in caplog.text
    )
    for epoch in range(3):
        mixture.set_epoch(epoch)
        for number in range(len(mixture)):
            assert sum(one.num_patches for one in mixture[number]) <= 32


def picture(folder, name):
    folder.mkdir(exist_ok=True)
    Image.linear_gradient("L").resize((56, 56)).convert("RGB").save(folder / name)
    return ImageRef(str(folder / name), size=(56, 56))


def rows_with(*refs):
    return [
        replace(encoded(SPEC, 3, n, (4, 4), [4] * 9), media=(ref,), source="rows.json", row=n)
        for n, ref in enumerate(refs)
    ]


def refused(dataset):
    """Rows whose file may not be opened, and the samples of packs that are assembled together."""
    dataset.on_bad_image = "drop"
    dataset.max_bad = 1
    found = []
    for number in range(len(dataset)):
        item = dataset[number]
        assemble(item)
        found += [(bad.source, bad.row) for _, bad in item.policy.left_out]
    return sorted(set(found))


@pytest.mark.parametrize("make", [PackedDataset.mixed, joined])
@pytest.mark.parametrize("confined", [True, False])
def test_rows_of_a_source_open_no_files_of_another(make, confined, tmp_path):
    """Also if the other's may be anywhere, and if the image was decoded for a row of the other."""
    own, other = picture(tmp_path / "own", "a.png"), picture(tmp_path / "other", "b.png")
    first = PackedDataset.from_samples(rows_with(own, other), 64)
    first.media_folders = [tmp_path / "own"]
    second = PackedDataset.from_samples(rows_with(other, other, own), 64)
    second.media_folders = [tmp_path / "other"] if confined else None
    sources = {"a": first, "b": second}
    for names in (["a", "b"], ["b", "a"]):
        given = {name: sources[name] for name in names}
        dataset = make({n: (one, 1) for n, one in given.items()} if make != joined else given)
        folders = {str(tmp_path / "own"), str(tmp_path / "other")}
        assert dataset.media_folders is None or set(dataset.media_folders) == folders
        assert (dataset.media_folders is None) is not confined
        bad = [("a::rows.json", 1), *([("b::rows.json", 2)] if confined else [])]
        assert refused(dataset) == bad
    with pytest.raises(ValueError, match="media folders of their own, a store has one list"):
        joined(sources).save(tmp_path / "store")
    dataset.media_folders = [tmp_path]
    assert refused(dataset) == []
    dataset.media_folders = [tmp_path / "own"]
    assert {source for source, _ in refused(dataset)} == {"a::rows.json", "b::rows.json"}


def test_a_name_does_not_end_with_half_a_mark():
    """Who reads names would take the sources "a:" and "a" for one."""
    with pytest.raises(ValueError, match="also not ending with :, got 'a:'"):
        PackedDataset.mixed({"a:": (chats(), 1)})


@pytest.mark.parametrize(
    ("name", "value"),
    [("source_weights", {"rows.json": 2.0}), ("on_bad_image", "drop"), ("max_bad", 0.5)],
)
@pytest.mark.parametrize("make", [PackedDataset.mixed, joined])
def test_what_is_set_on_a_source_is_not_dropped(make, name, value):
    rows = rows_with(*[ImageRef("a.png", size=(56, 56))] * 3)
    one = PackedDataset.from_samples([*rows, replace(rows[0], source="b.json")], 64)
    setattr(one, name, value)
    sources = {"a": chats(), "b": one}
    with pytest.raises(ValueError, match=f"'b' of a mixture has {name} .* set it on the mixture"):
        make({n: (one, 1) for n, one in sources.items()} if make != joined else sources)


def test_a_small_source_is_not_cut_from_every_epoch():
    """What epochs that need too many packs leave out is of each source by its share, up to one sample: the rest is
    of the largest."""
    lost, planned = np.zeros(3, dtype=int), np.zeros(3, dtype=int)
    shares = np.array([0.03, 0.1, 0.87])
    for seed in range(3):
        mixture = mixed(seed, 256, 60, shares, epoch_tokens=20 * 256 - 40)
        first = mixture.plan(0)
        for epoch in range(1, 20):
            plan = mixture.plan(epoch, first.num_packs)
            cut = np.zeros(3, dtype=int)
            for n, source in enumerate(mixture.sources):
                drawn = source.samples_of(epoch, seed)
                planned[n] += mixture.union.num_tokens[drawn].sum()
                cut[n] = mixture.union.num_tokens[drawn].sum() - mixture.tokens_of(plan)[n].sum()
            assert (cut >= 0).all()
            assert cut[2] > 0 or not cut.any()
            assert (cut[:2] <= cut.sum() * shares[:2] * 1.5).all()
            lost += cut
    print(f"cut: {lost} of {planned} tokens")
    assert lost[2] > 0
    assert (lost[:2] / planned[:2] <= lost[2] / planned[2]).all()


def test_settings_that_the_first_source_does_not_know_are_compared():
    unknown, one, other = {"x": 1}, {"x": 1, "the tokenizer": "a"}, {"x": 1, "the tokenizer": "b"}
    check_alike({"a": unknown, "b": one, "c": one})
    with pytest.raises(ValueError, match="'b' and 'c' .*not packed alike, .* the tokenizer; pack"):
        check_alike({"a": unknown, "b": one, "c": other})


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.float32, float])
def test_numbers_of_numpy_are_numbers(kind):
    """Data sets made with them are those made with int and float, down to what checkpoints have as JSON."""
    made = []
    for of in (int, kind):
        sources = {
            name: (
                PackedDataset.from_samples(
                    chats().samples, of(64), patch_capacity=of(99), seed=of(3)
                ),
                of(n),
            )
            for n, name in enumerate(("a", "b"), 2)
        }
        mixed = PackedDataset.mixed(sources, epoch_tokens=of(700), seed=of(5))
        mixed.set_epoch(of(2))
        mixed.append_empty_packs(of(7))
        rows = {name: (chats().samples, of(n)) for n, name in enumerate(("a", "b"), 2)}
        stream = PackStream(rows, None, of(64), buffer=of(9), seed=of(3))
        pack = next(iter(stream))
        stream.consume(pack.resume)
        record = [mixed.fingerprint(), mixed.report(), stream.state_dict()]
        made.append((json.dumps(record), len(mixed), repr(list(mixed[1])), repr(list(pack))))
        assert json.loads(json.dumps(astuple(ContextGroup(of(1), of(2))))) == [1, 2]
    assert made[0] == made[1]


@pytest.mark.parametrize("value", ["64", 64.5, True, None, np.bool_(True), np.array(64)])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match=r"--capacity \(capacity\) must be an integer, got ."):
        PackedDataset.from_samples(chats().samples, value)
    with pytest.raises(ValueError, match=r"--capacity \(capacity\) must be an integer, got ."):
        PackedDataset.from_files("nowhere.json", None, value)
    with pytest.raises(ValueError, match=r"--capacity \(capacity\) must be an integer, got ."):
        PackStream(chats().samples, None, value)
    with pytest.raises(ValueError, match="buffer must be an integer, got ."):
        PackStream(chats().samples, None, 64, buffer=value)
    with pytest.raises(ValueError, match="epoch must be an integer, got ."):
        PackedDataset.from_samples(chats().samples, 64).set_epoch(value)
    if not isinstance(value, float):
        with pytest.raises(ValueError, match="the weight of 'a' is .*, not a positive number"):
            PackedDataset.mixed({"a": (chats(), value)})

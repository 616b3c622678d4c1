import json
from dataclasses import replace

import numpy as np
import pytest
from builders import stock_processor
from PIL import Image
from test_assemble import same
from torch.utils.data import DataLoader

pytest.importorskip("datasets")

from mmpack import Encoder, PackedDataset, VisionSpec, assemble
from mmpack.hf import PackCollator, PackingCallback
from mmpack.packing.cost import sizes_of
from mmpack.packing.even_packs import EvenPacks
from mmpack.store.encoded_store import open_store, write_store
from mmpack.store.manifest import About
from mmpack.store.plan_file import save_plan


def test_every_sample_is_in_one_pack(realset):
    dataset = PackedDataset.from_samples(realset, 8192)
    assert sorted(dataset.plan.sample_index) == list(range(2109))
    tokens, _ = sizes_of(realset)
    assert dataset.plan.pack_tokens.sum() == tokens.sum()
    assert np.sort(dataset.plan.pack_tokens)[1:].mean() / 8192 >= 0.99  # the last pack aside


def documents(samples, count=40):
    """Samples with all of their text supervised; conversations are not split."""
    vision = samples[0].vision
    unlabelled = [vision.image_token_id, vision.vision_start_token_id, vision.vision_end_token_id]
    return [
        replace(one, labels=np.where(np.isin(one.input_ids, unlabelled), -100, one.input_ids))
        for one in samples[:count]
    ]


def test_an_item_is_its_samples_assembled(realset):
    dataset = PackedDataset.from_samples(realset[:40], 8192)
    samples = [realset[n] for n in dataset.plan.samples_of(1)]
    assert [*dataset[1]] == samples
    assert [*dataset[1 - len(dataset)]] == samples
    assert same(assemble(dataset[1]), assemble(samples))
    media = sum(len(sample.media) for sample in samples)
    of = f"{dataset.plan.pack_tokens[1]:,} of 8,192 tokens, {len(samples)} segments, {media} images"
    assert repr(dataset[1]) == f"PackSamples({of} and videos)"


def test_indices_are_a_lists(realset, tmp_path):
    dataset = PackedDataset.from_samples(realset[:40], 4096)
    store = write_store(tmp_path / "store", realset[:40], realset[0].vision)
    pieces = PackedDataset.from_samples(documents(realset), 2048, on_overflow="split")
    for items in (dataset, EvenPacks(dataset, 8), store, pieces.samples, dataset[0]):
        numbers = range(len(items))
        for chosen in (slice(1, 3), slice(None, None, -2), slice(9**9, None)):
            expected = [repr(items[n]) for n in numbers[chosen]]
            assert [repr(item) for item in items[chosen]] == expected
        assert repr(items[np.int64(-1)]) == repr(items[len(items) - 1])
        for wrong, error in ((len(items), IndexError), (~len(items), IndexError), ("0", TypeError)):
            with pytest.raises(error):
                items[wrong]


def test_what_they_say_they_are(realset, tmp_path):
    dataset = PackedDataset.from_samples(realset[:40], 8192)
    full = f"{dataset.plan.num_packs} packs of 8,192 tokens, {dataset.plan.utilization:.0%}"
    described = f"{full.replace('%', ' %')} full, 40 samples"
    assert repr(dataset) == f"PackedDataset({described})"
    assert repr(dataset.plan) == f"PackPlan({described})"
    assert repr(PackingCallback(dataset)) == f"PackingCallback(PackedDataset({described}))"
    store = write_store(tmp_path / "store", realset[:40], realset[0].vision)
    tokens = f"40 samples, {store.num_tokens.sum():,} tokens"
    assert repr(store) == f"EncodedStore({str(tmp_path / 'store')!r}, {tokens})"
    sample = realset[0]
    found = f"{sample.num_tokens:,} tokens, {sample.num_supervised} supervised"
    images = f"{len(sample.media)} image{'' if len(sample.media) == 1 else 's'}"
    name = f"row {sample.row} of {sample.source!r}"
    assert repr(sample) == f"EncodedSample({name}: {found}, {images})"
    assert repr(PackCollator(pad_to=64)) == "PackCollator(pad_to=64)"


@pytest.mark.parametrize("on_overflow", ["error", "truncate", "split"])
def test_saved_and_opened_again(on_overflow, realset, tmp_path):
    capacity = 8192 if on_overflow == "error" else 2048
    samples = documents(realset) if on_overflow == "split" else realset[:40]
    dataset = PackedDataset.from_samples(samples, capacity, on_overflow=on_overflow, seed=3)
    dataset.media_folders = ["."]
    dataset.save(tmp_path / "new" / "packed")
    opened = PackedDataset.from_store(tmp_path / "new" / "packed")
    assert opened.fingerprint() == dataset.fingerprint()
    assert opened.media_folders == dataset.media_folders
    assert [repr(s) for s in opened[0]] == [repr(s) for s in dataset[0]]
    with pytest.raises(ValueError, match="is not empty; save to another folder"):
        dataset.save(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["packed"]


def test_the_vision_budget_is_kept(realset):
    _, patches = sizes_of(realset)
    budget = int(patches.max())
    plan = PackedDataset.from_samples(realset, 8192, patch_capacity=budget).plan
    assert max(patches[plan.samples_of(n)].sum() for n in range(plan.num_packs)) <= budget


def test_long_rows_stop_the_plan_with_their_place(realset):
    with pytest.raises(
        ValueError,
        match=r"too long for a pack of 4,096 tokens: .* of 2,109 samples; the longest, row ",
    ):
        PackedDataset.from_samples(realset, 4096)


def test_long_rows_dropped_are_listed(realset):
    tokens, _ = sizes_of(realset)
    plan = PackedDataset.from_samples(realset, 4096, on_overflow="drop").plan
    assert plan.dropped.tolist() == np.flatnonzero(tokens > 4096).tolist()


def test_long_rows_cut_keep_their_answer_or_are_dropped(realset):
    tokens, _ = sizes_of(realset)
    long = [n for n in range(len(realset)) if tokens[n] > 4096]
    dataset = PackedDataset.from_samples([realset[n] for n in long], 4096, on_overflow="truncate")
    plan = dataset.plan
    assert sorted([*plan.dropped, *plan.truncated]) == list(range(len(long)))
    assert plan.num_dropped > 0 < plan.num_truncated
    for n in range(len(dataset)):
        pack = assemble([dataset._sample(number) for number in plan.samples_of(n)], pixels=False)
        assert len(pack.input_ids) == plan.pack_tokens[n] <= 4096
        assert len(pack.supervised_index) > 0


def test_a_store_gives_back_what_it_was_given(realset, vision, tmp_path):
    samples = realset[:300]
    store = write_store(tmp_path / "store", iter(samples), vision, About(tokenizer="here"))
    reopened = open_store(tmp_path / "store")
    assert len(store) == len(reopened) == 300
    assert reopened.about == About(tokenizer="here")
    for one, other in zip(samples, reopened):
        for name in ("input_ids", "labels", "grid_thw"):
            assert getattr(one, name).dtype == getattr(other, name).dtype
            assert np.array_equal(getattr(one, name), getattr(other, name))
        assert [image.path for image in one.media] == [image.path for image in other.media]
        assert (one.vision, one.source, one.row) == (other.vision, other.source, other.row)
    assert [sizes.tolist() for sizes in sizes_of(reopened)] == [
        s.tolist() for s in sizes_of(samples)
    ]
    with pytest.raises(ValueError, match="already holds a store"):
        write_store(tmp_path / "store", iter(samples), vision)


def test_an_empty_store_is_refused(vision, tmp_path):
    with pytest.raises(ValueError, match="no row of the data is usable"):
        write_store(tmp_path / "store", [], vision)


def test_a_folder_that_is_no_store(tmp_path):
    with pytest.raises(ValueError, match="has no finished store"):
        open_store(tmp_path)
    (tmp_path / "mmpack.json").write_text(json.dumps({"format": 0}))
    with pytest.raises(ValueError, match=r"store format 0, not \d+; pack again: mmpack pack"):
        open_store(tmp_path)


def test_workers_assemble_the_same_packs(realset):
    dataset = PackedDataset.from_samples(realset[:60], 8192)
    loader = DataLoader(dataset, batch_size=1, num_workers=2, collate_fn=PackCollator())
    for batch, pack in zip(loader, map(assemble, dataset)):
        assert np.array_equal(batch["input_ids"][0].numpy(), pack.input_ids)
        assert batch["mmpack"]["num_patches"] == len(pack.pixels) == len(batch["pixel_values"])


def test_an_image_that_breaks_after_planning_names_its_row(encoder, tmp_path):
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "!"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": turns, "images": ["a.png"]}]))
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    dataset = PackedDataset.from_files(tmp_path / "rows.json", encoder, 1000)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"row 0 of rows.json: image .*a\.png does not exist"):
        PackCollator()([dataset[0]])


def test_from_files_reads_several(encoder, vision, tmp_path):
    for name in ("a.json", "b.jsonl"):
        row = {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": name}]
        }
        text = json.dumps([row]) if name.endswith("json") else json.dumps(row)
        (tmp_path / name).write_text(text)
    paths = [tmp_path / "a.json", tmp_path / "b.jsonl"]
    dataset = PackedDataset.from_files(paths, replace(encoder, mask_history=True), 1000)
    assert [sample.source for sample in dataset.samples] == ["a.json", "b.jsonl"]
    assert dataset.vision == vision


@pytest.mark.filterwarnings("ignore:left out")
def test_from_files_leaves_bad_rows_out_and_plans_by_seed(encoder):
    """Rows that cannot be read and rows that cannot be encoded count together."""
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    pictured = [{"from": "human", "value": "<image>q"}, turns[1]]
    narrow = {"conversations": pictured, "images": [Image.new("RGB", (900, 3))]}
    rows = [{"text": "?"}] * 30 + [narrow] * 30 + [{"conversations": turns}] * 940
    with pytest.raises(ValueError, match="row 0 of rows: "):
        PackedDataset.from_files(rows, encoder, 200)
    with pytest.raises(ValueError, match="60 of 1,000 rows were left out, at most 5.0% may be"):
        PackedDataset.from_files(rows, replace(encoder, on_error="skip"), 200)
    bad_rows = []
    collecting = replace(encoder, on_error=bad_rows)
    datasets = [PackedDataset.from_files(rows[20:90], collecting, 99, seed=n) for n in (3, 4)]
    assert [len(dataset.samples) for dataset in datasets] == [30, 30]
    assert [bad.row for bad in bad_rows] == [*range(40)] * 2
    assert [dataset.plan.seed for dataset in datasets] == [3, 4]


def test_from_files_takes_transformers_own_processor(shared, tokenizer):
    processor = stock_processor(tokenizer, max_pixels=28 * 28 * 16)
    path = shared / "realset" / "realset_messages_200.jsonl"
    by_processor = PackedDataset.from_files(path, processor, 4096)
    parts = Encoder(tokenizer, VisionSpec.from_processor(processor))
    by_parts = PackedDataset.from_files(path, parts, 4096)
    assert len(by_processor.samples) == 200
    for one, other in zip(by_processor.samples, by_parts.samples):
        assert np.array_equal(one.input_ids, other.input_ids)
        assert one.vision == other.vision


def test_images_in_no_file_are_in_the_store(encoder, vision, tmp_path):
    picture = Image.new("RGB", (60, 90), "red")
    turns = [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "!"}]
    picture.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").unlink()
    rows = [{"conversations": turns, "images": [picture, data]}]
    dataset = PackedDataset.from_files(rows, encoder, 1000)
    write_store(tmp_path / "store", dataset.samples, vision)
    save_plan(dataset.plan, tmp_path / "store")
    again = PackedDataset.from_store(tmp_path / "store")
    ours, theirs = (assemble(one[0], share_images=False) for one in (again, dataset))
    assert same(ours, theirs)
    assert len(assemble(again[0]).pixels) == len(ours.pixels) // 2  # the store holds its bytes once

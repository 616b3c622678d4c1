"""DataLoader workers: no copies, errors with names, nothing dropped silently, steady memory."""

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from builders import encoded, tiny_model
from PIL import Image
from test_device_batches import assert_same
from torch.utils.data import DataLoader

from mmpack import PackedDataset, VisionSpec
from mmpack.hf import PackCollator, PackingCallback, patch_model
from mmpack.packing.assemble import assemble
from mmpack.types import EncodedSample, ImageRef

SPEC = VisionSpec(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
CAPACITY = 40


def rows(folder, num_rows=12):
    """Rows of 17 tokens, two a pack: text, an image of 56 x 84 pixels, text."""
    samples = []
    for number in range(num_rows):
        path = folder / f"{number}.png"
        noise = np.random.default_rng(number).integers(0, 256, (56, 84, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        sample = encoded(SPEC, 1, 2, (4, 6), *range(3, 10))
        image = ImageRef(str(path), size=(56, 84))
        samples.append(replace(sample, media=(image,), source="rows.json", row=number))
    return samples


def loader(dataset, collate=None, **options):
    return DataLoader(
        dataset, batch_size=1, num_workers=2, collate_fn=collate or PackCollator(), **options
    )


class SharedCollator(PackCollator):
    """Looks, in the worker, at where pixels lie before the batch is sent."""

    def __call__(self, features):
        batch = super().__call__(features)
        pixels = batch["pixel_values"]
        batch["is_shared"] = pixels.is_shared()
        return batch


@pytest.mark.parametrize("pixels", ["uint8", "float32"])
def test_pixels_are_written_once_to_what_is_sent(tmp_path, pixels):
    """In a worker to shared memory: uint8 where the decoder writes, float32 where they are made."""
    dataset = PackedDataset.from_samples(rows(tmp_path), CAPACITY)
    model = patch_model(tiny_model()) if pixels == "uint8" else None
    collate = SharedCollator(model=model, pixels=pixels)
    assert not collate([dataset[0]])["is_shared"]
    batches = list(loader(dataset, collate))
    assert all(batch["is_shared"] for batch in batches)
    for batch, pack in zip(batches, dataset):
        expected = PackCollator(model=model, pixels=pixels)([pack])["pixel_values"]
        assert torch.equal(batch["pixel_values"], expected)


def test_a_bad_image_in_a_worker_is_an_error_that_names_it(tmp_path):
    dataset = PackedDataset.from_samples(rows(tmp_path), CAPACITY)
    (tmp_path / "7.png").write_bytes((tmp_path / "7.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"row 7 of rows\.json: image .*7\.png cannot be decoded"):
        list(loader(dataset))


def test_a_bad_image_can_leave_its_pack(tmp_path, caplog):
    samples = rows(tmp_path)
    dataset = PackedDataset.from_samples(samples, CAPACITY)
    dataset.on_bad_image = "drop"
    for number in (3, 7):
        (tmp_path / f"{number}.png").unlink()
    with caplog.at_level(logging.WARNING, "mmpack"):
        packs = [assemble(dataset[n]) for n in range(len(dataset))]
    assert sorted(m for m in caplog.messages) == [
        f"dropped row {n} of rows.json: image {tmp_path / f'{n}.png'} does not exist; fix the path"
        for n in (3, 7)
    ]
    assert dataset.num_dropped_segments == 2
    for n, pack in enumerate(packs):
        left = [samples[i] for i in dataset.plan.samples_of(n) if i not in (3, 7)]
        assert pack.num_segments == max(1, len(left))
        if left:
            expected = assemble(left)
            assert np.array_equal(pack.pixels, expected.pixels)
            assert np.array_equal(pack.labels, expected.labels)
    batches = list(loader(dataset))  # workers count where everybody sees it
    assert dataset.num_dropped_segments == 4
    assert sum(len(batch["image_grid_thw"]) for batch in batches if "pixel_values" in batch) == 10


def test_a_batch_of_packs_is_one_of_the_samples_that_stay(tmp_path):
    """A sample goes with its first image, which decodes; a pack that loses all is a token."""
    samples = rows(tmp_path, 6)
    for number in (0, 1, 3):  # of packs (0, 1), (2, 3)
        gone = ImageRef(str(tmp_path / "gone.png"), size=(56, 84))
        two = encoded(SPEC, 1, (4, 6), (4, 6))
        media = (*samples[number].media, gone)
        samples[number] = replace(two, media=media, source="rows.json", row=number)
    dataset = PackedDataset.from_samples(samples, 40)
    dataset.on_bad_image = "drop"
    items = list(dataset)
    left = [[s for s in item if s.row not in (0, 1, 3)] for item in items]
    assert [] in left
    assert 1 in map(len, left)
    model = patch_model(tiny_model())
    for pixels in ("float32", "uint8"):
        collate = PackCollator(model=model, pixels=pixels)
        batch = collate(items)
        kept = [s for samples in left for s in samples or [EncodedSample.filler(1, SPEC)]]
        expected = collate(kept)
        counts = [max(1, len(samples)) for samples in left]
        assert batch["mmpack"].pop("items") == (0, *np.cumsum(counts))
        del expected["mmpack"]["items"]
        assert_same(batch, expected)
    assert dataset.num_dropped_segments == 6


def test_an_item_may_leave_its_worker(tmp_path):
    """What is dropped where it is assembled counts for its data set."""
    dataset = PackedDataset.from_samples(rows(tmp_path, 4), CAPACITY)
    dataset.on_bad_image = "drop"
    (tmp_path / "3.png").unlink()
    items = [item for (item,) in loader(dataset, list)]
    assert [repr(item) for item in items] == [repr(item) for item in dataset]
    batches = [PackCollator()([item]) for item in items]
    assert dataset.num_dropped_segments == 1
    for batch, item in zip(batches, dataset):
        assert torch.equal(batch["pixel_values"], PackCollator()([item])["pixel_values"])


def test_a_pack_that_lost_all_its_samples_has_no_loss(tmp_path):
    dataset = PackedDataset.from_samples(rows(tmp_path, 2), CAPACITY)
    dataset.on_bad_image = "drop"
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(b"nothing")
    batch = PackCollator()([dataset[0]])
    assert batch["mmpack"]["offsets"] == (0, 1)
    loss = patch_model(tiny_model())(**batch).loss
    loss.backward()
    assert loss.item() == 0


def test_the_log_counts_what_was_dropped(tmp_path):
    from builders import QUIET
    from transformers import Trainer, TrainingArguments

    dataset = PackedDataset.from_samples(rows(tmp_path), CAPACITY)
    dataset.on_bad_image = "drop"
    (tmp_path / "3.png").unlink()
    trainer = Trainer(
        model=patch_model(tiny_model()),
        args=TrainingArguments(**QUIET, output_dir=tmp_path, num_train_epochs=1),
        train_dataset=dataset,
        data_collator=PackCollator(),
    )
    PackingCallback(dataset).attach(trainer)
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["pack/dropped_segments"] == 1


def test_a_share_without_dropping_is_refused(tmp_path):
    """As --max-bad is without --on-bad-image drop."""
    dataset = PackedDataset.from_samples(rows(tmp_path, 2), CAPACITY)
    dataset.max_bad = 0.5
    with pytest.raises(ValueError, match="max_bad is 0.5, but the first bad image stops the run"):
        dataset[0]
    dataset.on_bad_image = "drop"
    assert len(dataset[0].samples) == 2


def test_another_word_for_it_is_refused(tmp_path):
    dataset = PackedDataset.from_samples(rows(tmp_path, 2), CAPACITY)
    dataset.on_bad_image = "skip"
    with pytest.raises(ValueError, match=r"\(on_bad_image\) must be 'raise' or 'drop', got 'skip'"):
        dataset[0]


@pytest.mark.parametrize("epochs", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_memory_is_steady(tmp_path, epochs):
    """Two persistent workers, 12 packs per epoch: no private memory, no mapping (shared memory among
    them) and no open file is held longer than its batch. In MiB and as numbers, of all processes."""
    command = [sys.executable, __file__, str(tmp_path), str(epochs)]  # a heap of its own
    held = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    before, after = (np.median(part, axis=0) for part in np.array_split(held[epochs // 3 :], 2))
    print(f"MiB, mappings, files: {before} then {after}")
    assert (after - before < (4, 8, 8)).all()


def print_what_is_held(folder, epochs):
    batches = loader(
        PackedDataset.from_samples(rows(folder, 24), CAPACITY), persistent_workers=True
    )
    me, held = psutil.Process(), []
    for _ in range(epochs):
        for batch in batches:
            del batch
        everyone = [me, *me.children(recursive=True)]
        memory = sum(p.memory_full_info().uss for p in everyone) / 2**20
        maps = sum(Path(f"/proc/{p.pid}/maps").read_text().count("\n") for p in everyone)
        held.append((memory, maps, sum(p.num_fds() for p in everyone)))
    print(json.dumps(held))


if __name__ == "__main__":
    print_what_is_held(Path(sys.argv[1]), int(sys.argv[2]))

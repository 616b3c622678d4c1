"""Packs over ranks and epochs: every sample once, equal steps, empty packs, workers that live on."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import QUIET, SMALL_SPEC, encoded, loss_and_grads, tiny_config, tiny_model, with_noise
from ranks import on_ranks
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from mmpack import PackedDataset
from mmpack.hf import PackCollator, PackingCallback, patch_model, unpatch_model
from mmpack.packing.cost import costs_of

TESTS = Path(__file__).resolve().parent


def numbered_samples(count=45):
    """Text samples of 6 to 18 tokens; the second token is the sample's number."""
    return [encoded(SMALL_SPEC, 1, n, [2] * (4 + 5 * n % 13)) for n in range(count)]


def numbers_in(item):
    """Numbers of the samples in a pack, none for an empty one."""
    return [int(sample.input_ids[1]) for sample in item if sample.is_supervised]


def numbered_dataset():
    return PackedDataset.from_samples(numbered_samples(), 40, [1.0] * 45)


def test_every_epoch_has_every_sample_once_in_other_packs():
    dataset = numbered_dataset()
    seen = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        packs = [numbers_in(dataset[n]) for n in range(len(dataset))]
        assert sorted(sum(packs, [])) == list(range(45))
        seen.append(sorted(map(sorted, packs)))
    assert seen[0] != seen[1] != seen[2] != seen[0]
    dataset.set_epoch(1)
    again = [numbers_in(dataset[n]) for n in range(len(dataset))]
    assert sorted(map(sorted, again)) == seen[1]


def test_padding_appends_empty_packs():
    dataset = numbered_dataset()
    packs = len(dataset)
    dataset.append_empty_packs(packs - 1)
    assert len(dataset) == 2 * (packs - 1)
    assert dataset.num_empty == packs - 2
    empty = dataset[-1]
    assert numbers_in(empty) == []
    assert (empty[0].labels == -100).all()
    assert len(empty) == 1
    assert len(empty[0].input_ids) == 6  # the smallest sample
    assert numbers_in(dataset[packs - 1])
    dataset.append_empty_packs(packs)
    assert len(dataset) == packs
    with pytest.raises(ValueError, match="multiple must be positive, got 0"):
        dataset.append_empty_packs(0)


def test_an_empty_pack_prefers_text():
    samples = [encoded(SMALL_SPEC, 1, (2, 2), 3), encoded(SMALL_SPEC, *range(1, 30))]
    dataset = PackedDataset.from_samples(samples, 40)
    dataset.append_empty_packs(len(dataset) + 1)
    assert len(dataset[-1][0].grid_thw) == 0


def model_and_batches():
    model = tiny_model(tiny_config(100, vision=SMALL_SPEC))
    samples = [encoded(SMALL_SPEC, 1, 2, 3, (4, 4), 4, 5), encoded(SMALL_SPEC, 6, 7, 8)]
    dataset = PackedDataset.from_samples(samples, 40)
    dataset.append_empty_packs(2)
    full, empty = (dataset.samples, [dataset[1]])

    full = with_noise(full)
    return model, PackCollator()([full]), PackCollator()(empty)


def test_an_empty_pack_has_loss_and_gradients_of_zero():
    model, full, empty = model_and_batches()
    patch_model(model)
    for options in (
        {},
        {"num_items_in_batch": torch.tensor(0)},
        {"num_items_in_batch": torch.tensor(5)},
    ):
        model.zero_grad()
        loss = model(**empty, **options).loss
        assert loss.item() == 0.0
        loss.backward()
        grads = [p.grad for p in model.parameters()]
        assert all(grad is not None and not grad.any() for grad in grads)
    alone = loss_and_grads(model, [full], 6)
    beside = loss_and_grads(model, [full, empty], 6)
    assert alone[0] == beside[0]
    assert all(torch.equal(alone[1][name], grad) for name, grad in beside[1].items())


def test_the_loss_is_guarded_by_the_patch_alone():
    model, full, empty = model_and_batches()
    stock = model.loss_function
    expected = model(**full).loss
    assert model(**empty).loss.isnan()  # what the patch is for
    patch_model(model)
    assert model(**full).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    unpatch_model(model)
    assert model.loss_function is stock


def test_workers_that_live_on_see_the_epoch():
    dataset = numbered_dataset()
    expected = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        expected.append([numbers_in(dataset[n]) for n in range(len(dataset))])
    assert expected[0] != expected[1]
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, persistent_workers=True, collate_fn=numbers_in
    )
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        assert list(loader) == expected[epoch]


@pytest.mark.slow
def test_spawned_workers_see_the_epoch_too():
    dataset = numbered_dataset()
    dataset.set_epoch(1)
    expected = [numbers_in(dataset[n]) for n in range(len(dataset))]
    dataset.set_epoch(0)
    options = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "spawn"}
    loader = DataLoader(dataset, batch_size=None, collate_fn=numbers_in, **options)
    assert list(loader) != expected
    dataset.set_epoch(1)
    assert list(loader) == expected
    assert len(pickle.loads(pickle.dumps(dataset))) == len(dataset)


class Recorder(PackCollator):
    """Leaves what it collated in a file of this rank, for it may run in a worker."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def __call__(self, packs):
        with open(self.path, "a") as file:
            file.writelines(json.dumps(numbers_in(pack)) + "\n" for pack in packs)
        return super().__call__(packs)


def train_numbered(folder, epochs=2):
    """Train on this rank, the packs it saw left in `folder`; returns steps per epoch. Runs in tests and
    as a process of a group."""
    import os

    rank = int(os.environ.get("RANK", "0"))
    torch.manual_seed(0)
    dataset = numbered_dataset()
    trainer = Trainer(
        model=patch_model(tiny_model(tiny_config(100, vision=SMALL_SPEC))),
        args=TrainingArguments(
            **QUIET,
            output_dir=str(folder),
            num_train_epochs=epochs,
            dataloader_num_workers=1,
            dataloader_persistent_workers=True,
        ),
        train_dataset=dataset,
        data_collator=Recorder(f"{folder}/rank{rank}.jsonl"),
    )
    PackingCallback(dataset).attach(trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.isfinite([float(loss) for loss in losses]).all()
    assert trainer.state.global_step * trainer.accelerator.num_processes == epochs * len(dataset)


def check_ranks(folder, num_ranks, epochs=2):
    ranks = []
    for rank in range(num_ranks):
        lines = (folder / f"rank{rank}.jsonl").read_text().splitlines()
        ranks.append([json.loads(line) for line in lines])
    steps = len(ranks[0]) // epochs
    assert [len(packs) for packs in ranks] == [epochs * steps] * num_ranks
    plans = []
    for epoch in range(epochs):
        packs = [p for packs in ranks for p in packs[epoch * steps : (epoch + 1) * steps]]
        assert sorted(sum(packs, [])) == list(range(45))
        plans.append(sorted(sorted(pack) for pack in packs))
    assert plans[0] != plans[1]
    dataset = numbered_dataset()
    assert sum(not pack for pack in plans[0]) == -len(dataset) % num_ranks


def test_trainer_on_one_process(tmp_path):
    train_numbered(tmp_path)
    check_ranks(tmp_path, 1)


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_trainer_on_several_processes(num_ranks, tmp_path):
    on_ranks(train_numbered, tmp_path, size=num_ranks)
    check_ranks(tmp_path, num_ranks)


def test_packs_balanced_by_a_config(realset, shared, tmp_path, vision):
    pytest.importorskip("datasets")
    from mmpack.packing.pack_stats import rank_imbalance
    from mmpack.store.encoded_store import write_store

    config = json.loads((shared / "configs" / "qwen2_vl_2b.json").read_text())
    costs = costs_of(realset, config)
    tight, even = (PackedDataset.from_samples(realset, 8192, cost).plan for cost in (None, config))
    imbalance = [rank_imbalance(plan.totals(costs), 8) for plan in (tight, even)]
    assert imbalance[1] < 1.01 < 1.2 < imbalance[0]
    assert even.utilization >= 0.99
    # A store knows the same without opening its samples.
    store = write_store(tmp_path / "store", iter(realset[:200]), vision)
    assert costs_of(store, config).tolist() == costs[:200].tolist()
    assert costs_of(store, config, ["vision"]).sum() < costs[:200].sum()


def test_costs_of_cut_samples_are_those_of_what_is_left(realset, shared):
    config = json.loads((shared / "configs" / "qwen2_vl_2b.json").read_text())
    dataset = PackedDataset.from_samples(realset, 2048, config, on_overflow="truncate")
    plan = dataset.plan
    cut = [dataset._sample(n) for n in plan.truncated]
    expected = costs_of(cut, config)
    shares = plan.cost[plan.truncated] / plan.cost[plan.sample_index].sum()
    every = costs_of([dataset._sample(n) for n in plan.sample_index], config).sum()
    assert len(cut) > 0
    assert shares == pytest.approx(expected / every, rel=1e-6)

"""A loop without Trainer: denominators and epochs are a Trainer's; docs/own_loop.md on ranks, and resumed."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import (
    QUIET,
    encoded,
    small_config,
    small_spec,
    tiny_config,
    tiny_model,
    with_noise,
    worst_difference,
)
from ranks import on_ranks
from test_docs import ROOT, blocks_of
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainerCallback, TrainingArguments

from mmpack import ContextGroup, Encoder, PackedDataset
from mmpack.hf import PackCollator, PackingCallback, loss_denominator, patch_model

SUPERVISED = (166, 6, 40)  # of each pack
NUM_STEPS = 4  # two per epoch, of two packs and of one


def dataset_of():
    samples = []
    for place, count in enumerate(SUPERVISED):
        sample = encoded(small_spec(), place, (2, 4), range(10, 80), range(10, 80), range(10, 80))
        sample.labels[:-count] = -100
        samples.append(sample)
    return PackedDataset.from_samples(list(with_noise(samples)), 250)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class KeepGradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(gradients(model))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(losses, gradients) of a Trainer's steps."""
    keep, dataset = KeepGradients(), dataset_of()
    args = TrainingArguments(
        **QUIET,
        output_dir=tmp_path_factory.mktemp("run"),
        gradient_accumulation_steps=2,
        max_steps=NUM_STEPS,
        max_grad_norm=0.0,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
    )
    model = patch_model(tiny_model(small_config()))
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=PackCollator(model=model),
        callbacks=[keep],
    )
    PackingCallback(dataset).attach(trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [float(loss) for loss in losses], keep.steps


def parts():
    """(model, optimizer, data set) of every run."""
    model = patch_model(tiny_model(small_config()))
    return model, torch.optim.SGD(model.parameters(), lr=0.5), dataset_of()


def loop(first=0, last=NUM_STEPS, model=None, of_step=True):
    """(losses, gradients) of steps of a plain loop. `of_step`: divide by the step's supervised tokens, else by
    each pack's, and by the number of packs."""
    start, optimizer, dataset = parts()
    if model is not None:
        start.load_state_dict(model.state_dict())
    collate = PackCollator(model=start)
    losses, steps = [], []
    for number in range(first, last):
        dataset.set_epoch(number // 2)
        packs = DataLoader(
            Subset(dataset, range(2 * (number % 2), len(dataset))),
            batch_size=2,
            collate_fn=lambda packs: [collate([pack]) for pack in packs],
        )
        batches = next(iter(packs))
        num_items = loss_denominator(batches) if of_step else None
        share = 1.0 if of_step else 1 / len(batches)
        losses.append(0.0)
        for batch in batches:
            loss = share * start(**batch.to("cpu"), num_items_in_batch=num_items).loss
            loss.backward()
            losses[-1] += loss.item()
        steps.append(gradients(start))
        optimizer.step()
        optimizer.zero_grad()
    return losses, steps, start


def test_a_loop_takes_a_trainers_steps(trained):
    """Micro-batches of 166, 6 and 40 supervised tokens in another order in each epoch."""
    losses, steps, _ = loop()
    assert losses == pytest.approx(trained[0], rel=1e-5)
    assert len({round(loss, 6) for loss in losses}) == NUM_STEPS
    for ours, theirs in zip(steps, trained[1], strict=True):
        difference, name = worst_difference(ours, theirs)
        assert difference <= 1e-5, name


def test_without_the_steps_denominator_it_does_not(trained):
    """The pack of 6 tokens counts as much as the one of 166."""
    _, (ours,), _ = loop(last=1, of_step=False)
    theirs = trained[1][0]
    off = sum((ours[name] - exact).square().sum() for name, exact in theirs.items())
    difference = (off / sum(exact.square().sum() for exact in theirs.values())).sqrt()
    print(f"with a mean per pack, the gradient is off by {difference:.2f} of its norm")
    assert difference > 0.5


def test_a_resumed_loop_goes_on(trained):
    """Within an epoch, with the packs that would have come next."""
    losses, _, _ = loop()
    _, _, model = loop(last=3)
    again, _, _ = loop(first=3, model=model)
    assert again == losses[3:]


def block_of_the_page(word, page="own_loop.md"):
    """The block of a page with this word, as code."""
    (text,) = [
        block.text
        for block in blocks_of(ROOT / "docs" / page)
        if block.language == "python" and word in block.text
    ]
    return compile(text, page, "exec")


def run_page(word):
    """The losses of the page's loop with this word."""
    return [float(loss) for loss in names_of_page(word)["losses"]]


def names_of_page(word):
    """What the page's loop with this word defines, on what the first block defines, for a tiny model."""
    model, optimizer, train = parts()
    collate = PackCollator(model=model)
    names = {
        "torch": torch,
        "DataLoader": DataLoader,
        "loss_denominator": loss_denominator,
        "device": "cpu",
        "model": model,
        "optimizer": optimizer,
        "train": train,
        "packs_per_step": 2,
        "micro_batches": lambda packs: [collate([pack]) for pack in packs],
    }
    exec(block_of_the_page(word), names)
    return names


def on_a_rank(folder):
    losses = run_page("Accelerator(")
    (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(losses))


def test_the_page_on_two_ranks(tmp_path):
    """accelerate's loop, a pack per rank and step: the last step of an epoch has an empty one."""
    expected = run_page("def step(")
    assert len(expected) == NUM_STEPS
    on_ranks(on_a_rank, tmp_path)
    for rank in range(2):
        losses = json.loads((tmp_path / f"{rank}.json").read_text())
        assert losses == pytest.approx(expected, rel=1e-5)


def on_a_shared_pack(folder):
    """The loop of docs/context_parallelism.md, whose two ranks share each pack."""
    torch.manual_seed(0)
    names = {
        "AutoModelForImageTextToText": SimpleNamespace(from_config=tiny_model),
        "config": small_config(),
        "train": dataset_of(),
        "patch_model": patch_model,
        "ContextGroup": ContextGroup,
        "PackCollator": PackCollator,
    }
    exec(block_of_the_page("EvenPacks(", "context_parallelism.md"), names)
    (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(names["losses"]))


def test_the_context_page_on_two_ranks(tmp_path):
    """Two packs per step of one group; an epoch of three has an empty one."""
    expected = run_page("def step(")
    on_ranks(on_a_shared_pack, tmp_path)
    for rank in range(2):
        losses = json.loads((tmp_path / f"{rank}.json").read_text())
        assert losses == pytest.approx(expected, rel=1e-5)


def test_the_pages_stream_takes_steps_of_all_ranks(small_set, small_encoder, tmp_path, monkeypatch):
    """Its packs go to accelerate's step, whose denominator is over ranks; the block is run as a second rank's."""
    names = names_of_page("Accelerator(")
    assert callable(names["step_of_ranks"])
    (tmp_path / "demo_data").symlink_to(small_set)
    monkeypatch.chdir(tmp_path)
    config = tiny_config(len(small_encoder.tokenizer), vision=small_encoder.vision)
    taken = []
    names |= {
        "step_of_ranks": lambda batches: taken.append(
            [batch["mmpack"]["items"] for batch in batches]
        ),
        "accelerator": SimpleNamespace(process_index=1, num_processes=2),
        "Encoder": Encoder,
        "config": config,
        "collate": PackCollator(model=patch_model(tiny_model(config))),
    }
    names["micro_batches"] = lambda packs: [names["collate"]([pack]) for pack in packs]
    exec(block_of_the_page("PackStream("), names)
    assert len(taken) == 2 and {len(batches) for batches in taken} == {names["per_rank"]}

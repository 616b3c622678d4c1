"""A run that was stopped, and continued from its checkpoint, is the run that was not."""

import pytest
import torch
from builders import FAMILIES, QUIET, SMALL_SPEC, encoded, small_config, small_spec, tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from mmpack import PackedDataset
from mmpack.hf import PackCollator, PackingCallback, patch_model

CAPACITY = 40
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-2}


def dataset_of(count=24, capacity=CAPACITY, seed=0, spec=SMALL_SPEC, shift=0):
    """Text samples of 6 to 18 tokens; the second token is the sample's number."""
    samples = [encoded(spec, 1 + shift, n, [2] * (4 + 5 * n % 13)) for n in range(count)]
    return PackedDataset.from_samples(samples, capacity, [1.0] * count, seed=seed)


class Keeper(TrainerCallback):
    """Weights as training begins and after every step."""

    def __init__(self):
        self.weights = {}

    def _keep(self, state, model):
        self.weights[state.global_step] = {
            n: p.detach().clone() for n, p in model.named_parameters()
        }

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._keep(state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._keep(state, model)


def run(folder, model=None, dataset=None, resume=None, callbacks=(), **options):
    """(trainer, ids of every batch trained on, weights by step) of a run with PackingCallback."""
    dataset = dataset or dataset_of()
    model = model or patch_model(tiny_model(small_config()))
    seen, keeper = [], Keeper()
    hook = model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **{**QUIET, **SAVING, **options}),
        train_dataset=dataset,
        data_collator=PackCollator(model=model),
        callbacks=[PackingCallback(dataset), keeper, *callbacks],
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    hook.remove()
    return trainer, seen, keeper.weights


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_equal_weights(ours, expected):
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], weight) for name, weight in expected.items())


@pytest.mark.smoke
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_weights_are_restored(tmp_path, family, tied):
    """From other random weights, whose parameters the optimizer holds."""
    config = small_config(family, tied=tied)
    dataset = dataset_of(spec=small_spec(family))
    whole, _, weights = run(tmp_path, patch_model(tiny_model(config)), dataset)
    other = patch_model(tiny_model(config))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    resumed, _, again = run(tmp_path, other, dataset, tmp_path / "checkpoint-2")
    assert_equal_weights(again[2], weights[2])
    assert_equal_weights(again[4], weights[4])
    assert losses(resumed) == losses(whole)

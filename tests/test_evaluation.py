"""eval_loss is the mean over the supervised tokens of the whole set, whatever packs, batches and ranks."""

import copy

import numpy as np
import pytest
import torch
from builders import QUIET, SMALL_SPEC, encoded, small_config, tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from mmpack import PackedDataset
from mmpack.hf import PackCollator, PackingCallback, patch_model, unpatch_model
from mmpack.hf.evaluation import EvalHook

# A capacity and a batch size: packs of a few samples, one pack of all, batches that do not divide them.
CASES = [(40, 1), (40, 3), (400, 1)]


def samples_of(count=21, supervised=True):
    """Text of 6 to 18 tokens, of which very different shares are supervised."""
    samples = []
    for n in range(count):
        sample = encoded(SMALL_SPEC, 1, n + 3, range(20, 24 + 5 * n % 13), supervised=supervised)
        sample.labels[: 1 + n % 5] = -100
        samples.append(sample)
    return samples


def dataset_of(capacity, **options):
    return PackedDataset.from_samples(samples_of(**options), capacity)


def mean_loss(model, samples):
    """Every row alone, weighted by its tokens."""
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for sample in samples:
            batch = PackCollator()([sample])
            count = batch["shift_labels"].numel()
            total += float(model(**batch).loss) * count
            tokens += count
    model.train(was_training)
    return total / tokens


def trainer_of(folder, train, evaluated, model=None, collate=None, callbacks=None, **options):
    arguments = {**QUIET, "max_steps": 2, "learning_rate": 0.0, **options}
    trainer = Trainer(
        patch_model(tiny_model(small_config())) if model is None else model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=train,
        eval_dataset=evaluated,
        data_collator=collate or PackCollator(),
        callbacks=callbacks,
    )
    PackingCallback(train).attach(trainer)
    return trainer


@pytest.fixture(scope="module")
def expected():
    return mean_loss(patch_model(tiny_model(small_config())), samples_of())


@pytest.mark.parametrize(("capacity", "size"), CASES)
def test_the_mean_is_over_tokens(tmp_path, expected, capacity, size):
    """Alone, while training, and after it; where it is logged, kept and returned."""
    evaluated = dataset_of(capacity)
    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": size}
    trainer = trainer_of(tmp_path, dataset_of(64), evaluated, **options)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logged == [pytest.approx(expected, rel=1e-5)] * 3
    assert trainer.predict(evaluated).metrics["test_loss"] == pytest.approx(expected, rel=1e-5)


def test_reporters_see_it_before_any_training(tmp_path, expected):
    class Reporter(TrainerCallback):
        seen = ()

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen = (*self.seen, logs["eval_loss"])

    reporter = Reporter()
    trainer = trainer_of(tmp_path, dataset_of(64), dataset_of(40), callbacks=[reporter])
    trainer.evaluate()
    assert reporter.seen == (pytest.approx(expected, rel=1e-5),)


def test_the_training_set_is_evaluated_without_empty_packs(tmp_path, expected):
    """Trainer's has three of them behind it; the set itself stays as it is, and so does another Trainer's."""
    dataset = dataset_of(40)
    number = len(dataset)
    before = copy.copy(dataset.__dict__)
    trainer = trainer_of(tmp_path, dataset, dataset, per_device_train_batch_size=number + 3)
    assert len(trainer.train_dataset) == number + 3
    assert dataset.__dict__ == before
    assert len(dataset) == trainer.num_examples(trainer.get_eval_dataloader()) == number
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    other = trainer_of(tmp_path, dataset, None)
    assert [len(t.train_dataset) for t in (trainer, other)] == [number + 3, number]


def test_what_is_set_on_the_training_set_holds(tmp_path):
    """After Trainer was made, too."""
    dataset = dataset_of(40)
    trainer = trainer_of(tmp_path, dataset, None)
    dataset.on_bad_image = "skip"
    with pytest.raises(ValueError, match=r"\(on_bad_image\) must be 'raise' or 'drop', got 'skip'"):
        trainer.train()


def test_empty_packs_have_no_weight(tmp_path, expected):
    dataset = dataset_of(40)
    dataset.append_empty_packs(2 * len(dataset))
    trainer = trainer_of(tmp_path, dataset_of(64), dataset)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_several_sets_have_their_own(tmp_path, expected):
    sets = {
        "all": dataset_of(40),
        "some": dataset_of(40, count=5),
        "none": dataset_of(40, supervised=False),
    }
    trainer = trainer_of(tmp_path, dataset_of(64), sets)
    found = trainer.evaluate()
    some = mean_loss(trainer.model, samples_of(5))
    assert abs(some - expected) > 1e-3
    assert found["eval_all_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["eval_some_loss"] == pytest.approx(some, rel=1e-5)
    assert found["eval_none_loss"] == 0


def test_a_model_that_is_not_patched(tmp_path, expected):
    trainer = trainer_of(
        tmp_path, dataset_of(64), dataset_of(40), unpatch_model(tiny_model(small_config()))
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_logits_of_every_token(tmp_path, expected):
    """Which `compute_metrics` asks for."""
    trainer = trainer_of(
        tmp_path, dataset_of(64), dataset_of(40), None, PackCollator(full_logits=True)
    )
    trainer.compute_metrics = lambda prediction: {"rows": np.shape(prediction.predictions)[0]}
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["eval_rows"] == len(dataset_of(40))


def test_the_best_model_is_the_one_of_that_loss(tmp_path, expected):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best"}
    options |= {"metric_for_best_model": "eval_loss", "max_steps": 1}
    trainer = trainer_of(tmp_path, dataset_of(64), dataset_of(40), **options)
    trainer.train()
    assert trainer.state.best_metric == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_that_was_broken_off_does_not_count(tmp_path, expected):
    trainer = trainer_of(tmp_path, dataset_of(64), dataset_of(40))
    broken = [dataset_of(40)[0], None]
    with pytest.raises(ValueError, match="PackCollator takes"):
        trainer.evaluate(broken)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_hook_is_one_and_a_copy_of_the_model_has_its_own(tmp_path):
    model = patch_model(tiny_model(small_config()))
    for _ in range(2):
        trainer_of(tmp_path, dataset_of(64), None, model)
    hooks, copied = (
        [hook for hook in some._forward_hooks.values() if isinstance(hook, EvalHook)]
        for some in (model, copy.deepcopy(model))
    )
    assert len(hooks) == len(copied) == 1 and copied[0] is not hooks[0]

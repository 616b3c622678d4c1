"""Evaluation under a stock Trainer with our collator: streams, dicts of sets, the best model kept, early
stopping."""

import pytest
from builders import small_config, tiny_model
from test_evaluation import dataset_of, mean_loss, samples_of, trainer_of
from transformers import EarlyStoppingCallback, TrainingArguments

from mmpack import PackStream
from mmpack.hf import patch_model

EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
OWN_BATCHES = {"accelerator_config": {"dispatch_batches": False}}


def stream_of(count=21, capacity=40):
    return PackStream(samples_of(count), None, capacity, buffer=6)


def losses_of(trainer, name="eval_loss"):
    """{step: loss} of all evaluations."""
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


@pytest.fixture(scope="module")
def expected():
    model = patch_model(tiny_model(small_config()))
    return mean_loss(model, samples_of()), mean_loss(model, samples_of(5))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_evaluated_whole_every_time(tmp_path, expected, workers):
    """Alone, and while the model trains on another stream."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "dataloader_num_workers": workers}
    trainer = trainer_of(tmp_path, stream_of(capacity=64), stream_of(), **options, **OWN_BATCHES)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected[0], rel=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected[0], rel=1e-5)
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logged == [pytest.approx(expected[0], rel=1e-5)] * 3


def test_sets_and_streams_in_one_dict(tmp_path, expected):
    sets = {"set": dataset_of(40), "stream": stream_of(), "few": stream_of(5)}
    options = {"eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ValueError, match="split the batches of the stream in eval_dataset"):
        trainer_of(tmp_path, dataset_of(64), sets, **options)
    trainer = trainer_of(tmp_path, dataset_of(64), sets, **options, **OWN_BATCHES)
    trainer.train()
    for name, loss in (("set", expected[0]), ("stream", expected[0]), ("few", expected[1])):
        found = losses_of(trainer, f"eval_{name}_loss")
        assert found == {1: pytest.approx(loss, rel=1e-5), 2: pytest.approx(loss, rel=1e-5)}


@pytest.mark.parametrize("kind", ["set", "stream", "dict"])
def test_the_best_model_is_kept(tmp_path, kind):
    """A learning rate that is too high spoils the model after its first steps."""
    sets = {
        "set": dataset_of(40),
        "stream": stream_of(),
        "dict": {"a": stream_of(), "b": dataset_of(40, count=5)},
    }
    name = "eval_b_loss" if kind == "dict" else "eval_loss"
    options = {**EVERY_STEP, "load_best_model_at_end": True, "metric_for_best_model": name}
    options |= {
        "max_steps": 3,
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
        "save_total_limit": 2,
    }
    trainer = trainer_of(tmp_path, dataset_of(64), sets[kind], **options, **OWN_BATCHES)
    trainer.train()
    losses = losses_of(trainer, name)
    best = min(losses, key=losses.get)
    assert best != max(losses)
    assert trainer.state.best_metric == losses[best]
    checkpoint = tmp_path / f"checkpoint-{best}"
    assert trainer.state.best_model_checkpoint == str(checkpoint)
    assert trainer.evaluate()[name] == pytest.approx(losses[best], rel=1e-6)


def test_batches_that_accelerate_split_are_refused(tmp_path):
    """Of a stream that Trainer was not made with."""
    trainer = trainer_of(tmp_path, dataset_of(64), None)
    with pytest.raises(ValueError, match="'dispatch_batches': False"):
        trainer.evaluate(stream_of())


@pytest.mark.parametrize("is_given", [True, False])
def test_ranks_that_would_repeat_packs_are_refused(tmp_path, is_given, monkeypatch):
    """On two ranks, 7 packs are 8 to accelerate, which does not tell which of a stream's are repeats."""
    evaluated = {"a": dataset_of(40), "b": stream_of()}
    trainer = trainer_of(tmp_path, dataset_of(64), None, **OWN_BATCHES)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="to give all 2 ranks equally many, and eval_loss would"):
        if is_given:
            trainer_of(tmp_path, dataset_of(64), evaluated, **OWN_BATCHES)
        else:
            trainer.evaluate(evaluated["b"])


def test_a_run_stops_early(tmp_path):
    """After the second evaluation in a row that is no better than the best."""
    options = {**EVERY_STEP, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    options |= {
        "max_steps": 50,
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
        "save_total_limit": 1,
    }
    trainer = trainer_of(
        tmp_path, dataset_of(64), dataset_of(40), callbacks=[EarlyStoppingCallback(2)], **options
    )
    trainer.train()
    losses = losses_of(trainer)
    best = min(losses, key=losses.get)
    assert trainer.state.global_step == max(losses) == best + 2 < 50
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)

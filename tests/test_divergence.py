"""A run whose loss is no number any more ends, with the step and its rows, and leaves no checkpoint of it."""

from dataclasses import replace

import pytest
import torch
from builders import QUIET, SMALL_SPEC, encoded, small_config, tiny_config, tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from mmpack import PackedDataset, PackStream
from mmpack.cli.main import main
from mmpack.hf import PackCollator, PackingCallback, last_checkpoint, patch_model
from mmpack.hf.divergence import Divergence
from mmpack.store.encoded_store import write_store
from mmpack.store.plan_file import save_plan

POISON = 77  # the embedding of this token is infinite, so the loss of its pack is no number
BAD = 14  # the row that has it; its pack is the sixth


def samples_of(count=24, poisoned=()):
    """Text of 6 to 18 tokens, row by row of train.json."""
    samples = []
    for n in range(count):
        sample = encoded(SMALL_SPEC, 1, n + 3, [POISON if n in poisoned else 2] * (4 + 5 * n % 13))
        samples.append(replace(sample, source="train.json", row=n))
    return samples


def dataset_of(poisoned=(), count=24):
    return PackedDataset.from_samples(samples_of(count, poisoned), 40)


def poisoned_model():
    model = patch_model(tiny_model(small_config()))

    def poison(embedding, args, embeds):
        return embeds.masked_fill((args[0] == POISON)[..., None], torch.inf)

    model.get_input_embeddings().register_forward_hook(poison)
    return model


def trainer_of(folder, dataset, model=None, callbacks=None, is_attached=True, **options):
    trainer = Trainer(
        model or poisoned_model(),
        TrainingArguments(str(folder), **{**QUIET, "max_steps": 12, "save_steps": 2, **options}),
        train_dataset=dataset,
        data_collator=PackCollator(),
        callbacks=callbacks,
    )
    if is_attached:
        PackingCallback(dataset).attach(trainer)
    return trainer


def place_of(dataset, row):
    """(step of epoch 0, from 1, rows of its pack) of a row, a pack a step."""
    for number in range(dataset.plan.num_packs):
        rows = [sample.row for sample in dataset[number]]
        if row in rows:
            return number + 1, rows


@pytest.mark.parametrize("logging", [1, 100])
def test_the_step_and_its_rows_are_named(tmp_path, logging):
    """However rarely it is looked at; checkpoints from before stay."""
    dataset = dataset_of(poisoned=[BAD])
    step, rows = place_of(dataset, BAD)
    assert 1 < step < 7 and len(rows) > 1
    trainer = trainer_of(tmp_path, dataset, save_strategy="steps", logging_steps=logging)
    named = ", ".join(map(str, rows))
    with pytest.raises(
        ValueError,
        match=rf"in step {step} \(pack {step - 1} of epoch 0: rows {named} of train\.json\)",
    ):
        trainer.train()
    saved = sorted(int(path.name[11:]) for path in tmp_path.glob("checkpoint-*"))
    assert saved == [n for n in range(2, step, 2)]
    assert trainer.args.logging_nan_inf_filter is False


def test_the_batch_of_an_accumulated_step_is_named(tmp_path):
    """Packs 4 to 7 are a step, in two batches."""
    dataset = dataset_of(poisoned=[BAD])
    first, _ = place_of(dataset, BAD)
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    pair = (first - 1) // 2 * 2
    with pytest.raises(
        ValueError,
        match=rf"in step {(first - 1) // 4 + 1} \(packs {pair}, {pair + 1} of epoch 0: rows ",
    ):
        trainer_of(tmp_path, dataset, **options).train()


def test_a_callback_that_is_not_attached_ends_it_too(tmp_path):
    dataset = dataset_of(poisoned=[BAD])
    step, _ = place_of(dataset, BAD)
    trainer = trainer_of(tmp_path, dataset, callbacks=[PackingCallback(dataset)], is_attached=False)
    with pytest.raises(ValueError, match=f"in step {step} "):
        trainer.train()
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == step - 1


@pytest.mark.parametrize("what", ["gradient", "weights"])
def test_gradients_and_weights_count(tmp_path, what):
    """A finite loss, and no step after it that would show: the last step is saved."""

    class Break(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if what == "gradient" and state.global_step == 3:
                model.model.language_model.norm.weight.grad[0] = torch.nan

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if what == "weights" and state.global_step == 3:
                model.model.visual.merger.ln_q.weight.data[0] = torch.inf  # no pack has an image

    dataset = dataset_of()
    model = patch_model(tiny_model(small_config()))
    options = {"save_strategy": "steps", "max_steps": 4, "max_grad_norm": 0.0, "logging_steps": 100}
    with pytest.raises(
        ValueError, match=r"in step 4 \(pack 3 of epoch 0: rows [\d, ]+ of train.json"
    ):
        trainer_of(tmp_path, dataset, model, [Break()], **options).train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_checkpoint_somebody_asks_for_is_not_written(tmp_path):
    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = True

    dataset = dataset_of(poisoned=[BAD])
    step, _ = place_of(dataset, BAD)
    trainer = trainer_of(tmp_path, dataset, logging_steps=100)
    trainer.add_callback(Ask())
    with pytest.raises(ValueError, match=f"in step {step} "):
        trainer.train()
    assert last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{step - 1}")


def test_a_stream_names_the_step(tmp_path):
    stream = PackStream(samples_of(24, [BAD]), None, 40, buffer=4)
    options = {"accelerator_config": {"dispatch_batches": False}}
    with pytest.raises(
        ValueError, match=r"in step \d \(pack \d of pass 0, from rows before \d+; rank 0"
    ):
        trainer_of(tmp_path, stream, **options).train()


def test_noting_asks_the_device_nothing():
    """On the meta device a question would be an error; a finite value leaves nothing."""
    noted = Divergence(torch.device("meta"), rank=0)
    for step in range(3):
        noted.note_loss(torch.zeros((), device="meta"), step, 0)
        noted.note([torch.zeros(3, device="meta")], step)
    noted = Divergence(torch.device("cpu"), rank=2)
    assert noted.first() is None
    noted.note_loss(torch.tensor(1.0), 4, 1)
    noted.note([torch.ones(2)], 4)
    assert noted.first() is None
    noted.note_loss(torch.tensor(torch.nan), 5, 1)
    noted.note_loss(torch.tensor(torch.inf), 6, 0)
    noted.note([torch.tensor([1.0, torch.nan])], 5)
    assert noted.first() == (5, 1, 2)
    noted = Divergence(torch.device("cpu"), rank=2)
    noted.note([torch.tensor([1.0, torch.nan])], 5)
    noted.note_loss(torch.tensor(torch.nan), 6, 1)
    assert noted.first() == (5, None, None)


def test_the_command_line_fails(tmp_path, capsys):
    """A learning rate that no model survives; without a line of log before the end."""
    store = write_store(tmp_path / "packed", iter(samples_of()), SMALL_SPEC)
    save_plan(PackedDataset.from_samples(store, 40).plan, tmp_path / "packed")
    tiny_config(100, vision=SMALL_SPEC).to_json_file(tmp_path / "config.json")
    arguments = ["train", "--data", tmp_path / "packed", "--config", tmp_path / "config.json"]
    arguments += [
        "--use_cpu",
        "--output_dir",
        tmp_path / "run",
        "--learning_rate",
        "1e30",
        "--quiet",
    ]
    arguments += ["--max_grad_norm", 0, "--steps", 6, "--save_steps", 6, "--logging_steps", 100]
    assert main(list(map(str, arguments))) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("mmpack: training has diverged: ")
    assert "of train.json)" in message and "learning_rate" in message
    assert not list((tmp_path / "run").glob("**/*.safetensors"))

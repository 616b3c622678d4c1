"""A run that was stopped, and continued from its checkpoint, is the run that was not."""

import dataclasses
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import FAMILIES, QUIET, SMALL_SPEC, encoded, small_config, small_spec, tiny_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

import mmpack.hf.collator
from mmpack import PackedDataset
from mmpack.hf import PackCollator, PackingCallback, last_checkpoint, patch_model
from mmpack.hf.checkpoints import check_checkpoint
from mmpack.packing.assemble import assemble

CAPACITY = 40
OTHER_MEAN = replace(SMALL_SPEC, image_mean=(0.5, 0.5, 0.5))
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-2}


def dataset_of(
    count=24, capacity=CAPACITY, seed=0, spec=SMALL_SPEC, shift=0, mask=False, source_weights=()
):
    """Text samples of 6 to 18 tokens; the second token is 3 more than its number. With `mask` a label of one
    of them is not supervised."""
    samples = [encoded(spec, 1 + shift, n + 3, [2] * (4 + 5 * n % 13)) for n in range(count)]
    samples = [
        dataclasses.replace(one, source=["even", "odd"][n % 2]) for n, one in enumerate(samples)
    ]
    if mask:
        samples[13].labels[-1] = -100
    dataset = PackedDataset.from_samples(samples, capacity, [1.0] * count, seed=seed)
    dataset.source_weights = dict(source_weights)
    return dataset


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


def run(folder, model=None, dataset=None, resume=None, callbacks=(), reduction="token", **options):
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
        data_collator=PackCollator(model=model, loss_reduction=reduction),
        callbacks=[keeper, *callbacks],
    )
    PackingCallback(dataset).attach(trainer)
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


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    """Which Trainer does by name too; best is what the test says, the largest loss."""
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "greater_is_better": True,
    }
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    dataset, model = dataset_of(), patch_model(tiny_model(small_config()))
    keeper = Keeper()
    args = TrainingArguments(str(tmp_path), **{**QUIET, **SAVING, **options})
    trainer = Trainer(
        model,
        args,
        train_dataset=dataset,
        eval_dataset=dataset_of(8),
        data_collator=PackCollator(model=model),
        callbacks=[keeper],
    )
    PackingCallback(dataset).attach(trainer)
    trainer.train()
    best = trainer.state.best_global_step
    assert best < 4
    assert_equal_weights(dict(model.named_parameters()), keeper.weights[best])


def test_adapters_are_restored(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted():
        lora = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.(q|v)_proj")
        return peft.get_peft_model(patch_model(tiny_model(small_config())), lora)

    whole, order, weights = run(tmp_path, adapted())
    resumed, rest, again = run(tmp_path, adapted(), resume=tmp_path / "checkpoint-2")
    assert rest == order[2:]
    assert_equal_weights(again[2], weights[2])
    assert_equal_weights(again[4], weights[4])
    assert losses(resumed) == losses(whole)


def test_a_weight_that_does_not_come_is_an_error(finished, tmp_path):
    checkpoint = copy_of(finished, tmp_path) / "checkpoint-2"
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.other.weight"] = weights.pop("model.norm.weight")
    save_file(weights, checkpoint / "model.safetensors")
    (checkpoint / "mmpack_files.json").unlink()  # else its size tells
    with pytest.raises(
        ValueError,
        match=r"1 of 58 weights missing \(model.language_model.norm.weight\), 1 unknown "
        r"\(model.language_model.other.weight\); resume with the model",
    ):
        run(tmp_path, resume=checkpoint)


@pytest.mark.parametrize(
    "step", [4, 7, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 6, 11))]
)
def test_the_next_packs_come_next(tmp_path, step):
    """7 batches per epoch make 4 steps of up to 2; over three epochs, within one and where one ends."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options |= {"max_steps": 12, "save_steps": 1, "dataloader_num_workers": step % 2}
    whole, order, _ = run(tmp_path, dataset=dataset_of(43), **options)
    checkpoint = tmp_path / f"checkpoint-{step}"
    resumed, rest, _ = run(tmp_path, None, dataset_of(43), checkpoint, **options)
    assert len(order) == 21
    assert rest == order[7 * (step // 4) + 2 * (step % 4) :]
    assert losses(resumed) == losses(whole)


def numbers_of(order):
    """Numbers of the samples in batches: the token after a 1."""
    return sorted(b - 3 for ids in order for a, b in itertools.pairwise(ids) if a == 1)


def test_ranks_batches_and_accumulated_batches_may_change(tmp_path):
    """While their product stays: the same packs in the same steps. 33 samples fill 11 packs, so an epoch is
    filled up to 12, or not at all; three steps of 4 packs."""
    one = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6}
    other = {**one, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    data, again = dataset_of(33), dataset_of(33)
    assert data.plan.num_packs % 2
    whole, order, weights = run(tmp_path, dataset=data, **one)
    resumed, rest, resumed_weights = run(tmp_path, None, again, tmp_path / "checkpoint-2", **other)
    assert len(data) == len(again) == 11  # the empty pack is Trainer's
    assert [len(trainer.train_dataset) for trainer in (whole, resumed)] == [12, 11]
    first = order[:4]  # batches of the two steps before
    assert numbers_of(first + rest[: len(again) - 8]) == list(range(33))
    assert numbers_of(rest[len(again) - 8 :]) == list(range(33))
    assert [float(x) for x in losses(resumed)] == pytest.approx(
        [float(x) for x in losses(whole)], rel=1e-5
    )
    for name, weight in weights[6].items():
        torch.testing.assert_close(resumed_weights[6][name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dataset", "options", "reason"),
    [
        ({"capacity": 48}, {}, r"another loss: capacity was 40 and is 48, packs was"),
        ({"count": 23}, {}, "another loss: samples was 24 and is 23"),
        ({"seed": 1}, {}, r"seed of the plan was 0 and is 1.*from_pretrained"),
        ({"shift": 1}, {}, r"another loss: checksum of the samples was \d+ and is \d+; to train"),
        ({"mask": True}, {}, r"another loss: checksum of the samples was \d+ and is \d+; to train"),
        ({"spec": OTHER_MEAN}, {}, r"another loss: the spec's image_mean was \[0\.48.* is \[0\.5, "),
        ({}, {"gradient_accumulation_steps": 2}, r"had 1 pack in the checkpoint \(1 rank x 1 per batch x 1 acc.*has 2 now \(1"),
        ({}, {"reduction": "sample"}, "another loss: loss reduction was token and is sample; to train"),
        ({"source_weights": {"odd": 2}}, {}, r"another loss: source weights was \{\} and is \{'odd': 2.0\}"),
        ({}, {"ignore_data_skip": True}, "ignore_data_skip would repeat this epoch's packs"),
    ],
    ids=str,
)  # fmt: skip
def test_other_packs_are_refused(finished, dataset, options, reason):
    with pytest.raises(ValueError, match=reason):
        run(finished, None, dataset_of(**dataset), finished / "checkpoint-2", **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of 4 steps, with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder)
    return folder


def test_a_checkpoint_without_the_callback_is_refused(finished, tmp_path):
    checkpoint = copy_of(finished, tmp_path) / "checkpoint-2"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["stateful_callbacks"].pop("mmpack")["made of"]["samples"] == 24
    assert state["stateful_callbacks"]["mmpack_ops"] == {"impl": "auto"}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"saved without PackingCallback"):
        run(tmp_path, resume=checkpoint)


def test_a_finished_run_makes_no_step_more(finished):
    with pytest.raises(
        ValueError, match="has finished its 4 steps; raise max_steps or num_train_epochs"
    ):
        run(finished, resume=finished / "checkpoint-4")


def test_a_late_callback_is_refused(tmp_path):
    trainer = Trainer(
        patch_model(tiny_model(small_config())),
        TrainingArguments(str(tmp_path), **QUIET, max_steps=1),
        train_dataset=dataset_of(),
        data_collator=PackCollator(),
    )
    trainer.add_callback(PackingCallback(dataset_of()))
    with pytest.raises(
        ValueError, match=r"was not attached; use PackingCallback\(dataset\)\.attach"
    ):
        trainer.train()


def test_an_order_that_undoes_the_plan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'group_by_length' would reorder planned packs"):
        run(tmp_path, train_sampling_strategy="group_by_length")


def test_nothing_is_decoded_to_be_skipped(tmp_path, monkeypatch):
    assembled = []

    def counted(samples, **options):
        assembled.append(len(samples))
        return assemble(samples, **options)

    monkeypatch.setattr(mmpack.hf.collator, "assemble", counted)
    run(tmp_path, max_steps=6, save_steps=5)
    before = len(assembled)
    run(tmp_path, resume=tmp_path / "checkpoint-5", max_steps=6)
    assert before >= 6
    assert len(assembled) - before <= 2  # the sixth pack, and one accelerate asks for ahead


def copy_of(folder, to):
    return Path(shutil.copytree(folder, to, dirs_exist_ok=True))


def test_a_torn_checkpoint_is_passed_over(finished, tmp_path, caplog):
    """Whatever of it is missing or cut off, as if the run had been killed at any moment of saving."""
    files = sorted(path.name for path in (finished / "checkpoint-4").iterdir())
    written = [
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    ]
    assert set(written) < set(files)
    assert last_checkpoint(finished) == str(finished / "checkpoint-4")
    for number, name in enumerate(written):
        for is_cut in (True, False):
            folder = copy_of(finished, tmp_path / f"{name} {is_cut}")
            for later in written[number + is_cut :]:
                (folder / "checkpoint-4" / later).unlink()
            if is_cut:
                content = (folder / "checkpoint-4" / name).read_bytes()
                (folder / "checkpoint-4" / name).write_bytes(content[: len(content) // 2])
            assert last_checkpoint(folder) == str(folder / "checkpoint-2")
            message = caplog.messages[-1]
            assert message.startswith(f"skipped incomplete checkpoint {folder / 'checkpoint-4'}: ")
            with pytest.raises(
                ValueError, match="is not a complete checkpoint: .*pass another one"
            ):
                check_checkpoint(folder / "checkpoint-4")
    assert last_checkpoint(tmp_path / "nothing") is None

"""Context parallelism under a stock Trainer: ranks that share each pack train, evaluate, log and resume as one
rank does on the same packs."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import QUIET, SMALL_SPEC, encoded, small_config, tiny_model, with_noise
from ranks import on_ranks
from test_divergence import BAD, POISON, place_of
from test_divergence import dataset_of as poisoned_of
from transformers import Trainer, TrainerCallback, TrainingArguments

from mmpack import ContextGroup, PackedDataset, PackStream, Skip
from mmpack.cli import main as cli
from mmpack.hf import PackCollator, PackingCallback, last_checkpoint, patch_model

CAPACITY = 64
FSDP = {"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2}}
# An epoch is 7 packs, 4 steps; the last of them has one pack.
OPTIONS = {
    **QUIET,
    "max_steps": 7,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.5,
    "learning_rate": 1e-2,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "save_strategy": "steps",
    "save_steps": 3,
    "include_num_input_tokens_seen": "all",
}
DISPATCH = {"accelerator_config": {"dispatch_batches": False}}


def samples_of(count=22):
    """Text of two sources, and in some samples images, before or after the text; the last image is a third of a
    pack, so that it may be across a cut. Supervised are the last tokens of each."""
    rng = np.random.default_rng(0)
    samples = []
    for n in range(count):
        text = rng.integers(10, 80, 6 + 5 * n % 13).tolist()
        images = [(4, 4)] * (n % 3 == 1) + [(8, 12)] * (n % 7 == 2)
        pieces = [*images, *text] if n % 2 else [*text[:2], *images, *text[2:]]
        sample = encoded(SMALL_SPEC, n, *pieces)
        sample.labels[:-4] = -100
        samples.append(replace(sample, source=["a.json", "b.json"][n % 2], row=n))
    return list(with_noise(samples))


def dataset_of(count=22):
    dataset = PackedDataset.from_samples(samples_of(count), CAPACITY, small_config())
    if count > 1:
        dataset.source_weights = {"a.json": 3.0}
    return dataset


class Seen(TrainerCallback):
    """The tokens of every batch trained on."""

    def __init__(self, model):
        self.batches = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model, args, kwargs):
        if model.training:
            self.batches.append(kwargs["input_ids"][0].tolist())


def trainer_of(folder, size=1, data=None, callbacks=(), **options):
    """A Trainer of this process, of which `size` share packs."""
    group = None
    if size > 1:
        group = ContextGroup.of(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), size)
        options["ddp_backend"] = "gloo"
    model = patch_model(tiny_model(small_config()), context=group)
    data = dataset_of() if data is None else data
    seen = Seen(model)
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **{**OPTIONS, **options}),
        train_dataset=data,
        eval_dataset=dataset_of(9),
        data_collator=PackCollator(model=model),
        callbacks=[seen, *callbacks],
    )
    PackingCallback(data).attach(trainer)
    return trainer, seen


def run(folder, size=1, resume=None, data=None, callbacks=(), **options):
    """What a run trained on, and its log."""
    trainer, seen = trainer_of(folder, size, data, callbacks, **options)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    log = trainer.state.log_history
    return {
        "batches": seen.batches,
        "steps": [entry for entry in log if "loss" in entry],
        "evaluations": [entry for entry in log if "eval_loss" in entry],
        "tokens": trainer.state.num_input_tokens_seen,
        "summary": log[-1],
    }


def losses(found):
    return [(entry["loss"], entry["grad_norm"]) for entry in found["steps"]]


def write(folder, name, found):
    (Path(folder) / f"{name}.{os.environ['RANK']}.json").write_text(json.dumps(found))


def read(folder, name, ranks=2):
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(ranks)]


def work(folder):
    """Two ranks of one group: DDP, FSDP2, both resumed; other sets to evaluate."""
    from accelerate.state import AcceleratorState

    for way, options in {"ddp": {}, "fsdp": FSDP}.items():
        place = Path(folder) / way
        write(folder, way, run(place, 2, **options))
        write(folder, f"{way} resumed", run(place, 2, place / "checkpoint-3", **options))
        AcceleratorState._reset_state()
    one = Path(folder) / "one" / "checkpoint-3"
    write(folder, "resumed from one", run(Path(folder) / "ddp2", 2, one))
    write(folder, "diverged", diverge(Path(folder) / "diverged"))
    write(folder, "command", command(Path(folder) / "command", folder, "--context-size", "2"))
    trainer, _ = trainer_of(Path(folder) / "evaluated", 2)
    found = [trainer.evaluate()["eval_loss"], trainer.evaluate(dataset_of(5))["eval_loss"]]
    with pytest.raises(ValueError, match=r"Trainer.predict with predictions does not apply with"):
        trainer.predict(dataset_of(5))
    trainer.args.prediction_loss_only = True
    found.append(trainer.predict(dataset_of(5)).metrics["test_loss"])
    found.append(trainer.evaluate({"few": dataset_of(5)})["eval_few_loss"])
    with pytest.raises(ValueError, match="eval_dataset is a list, of which the ranks of a context"):
        trainer.evaluate(samples_of(3))
    write(folder, "evaluated", found)


def diverge(folder):
    """The error of a run, a row of which makes a loss that is no number."""
    trainer, _ = trainer_of(folder, 2, poisoned_of([BAD]), eval_strategy="no")
    embedding = trainer.model.get_input_embeddings()
    embedding.register_forward_hook(
        lambda module, args, out: out.masked_fill((args[0] == POISON)[..., None], np.inf)
    )
    with pytest.raises(ValueError, match="diverged") as error:
        trainer.train()
    return str(error.value)


def command(output, data, *words):
    """What `mmpack train` prints last."""
    options = {
        "data": f"{data}/packed",
        "config": f"{data}/config.json",
        "output_dir": output,
        **QUIET,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "eval_data": f"{data}/packed",
    }
    words = [w for name, value in options.items() for w in (f"--{name}", str(value))] + [*words]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(["train", *words]) == 0
    return printed.getvalue().splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of one rank, then of two."""
    folder = tmp_path_factory.mktemp("context")
    dataset_of().save(folder / "packed")
    small_config().save_pretrained(folder)
    (folder / "one.json").write_text(json.dumps(run(folder / "one")))
    on_ranks(work, folder)
    return folder


@pytest.fixture
def alone(folder):
    return json.loads((folder / "one.json").read_text())


def joined(ranks):
    """The batches of a group, from the parts of its ranks."""
    return [sum(parts, []) for parts in zip(*(rank["batches"] for rank in ranks), strict=True)]


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_ranks_train_as_one(folder, alone, way):
    """Losses with weights, norms before clipping, over the end of an epoch; each rank has half of every pack."""
    ranks = read(folder, way)
    assert joined(ranks) == alone["batches"]
    assert len(alone["batches"]) == 13
    for found in ranks:
        assert np.array(losses(found)) == pytest.approx(np.array(losses(alone)), rel=1e-5)
        assert found["tokens"] == alone["tokens"]
    assert min(norm for _, norm in losses(alone)) > OPTIONS["max_grad_norm"]


def test_the_log_counts_a_pack_once(folder, alone):
    """Rates are per second, so they are compared with one another."""
    for found in read(folder, "ddp"):
        for ours, theirs in zip(found["steps"], alone["steps"], strict=True):
            for name, value in theirs.items():
                if name.startswith(("pack/loss", "pack/utilization", "pack/flops")):
                    assert ours[name] == pytest.approx(value, rel=1e-5), name
            for name in ("supervised_tokens_per_second", "patches_per_second", "tflops"):
                shares = [
                    entry[f"pack/{name}"] / entry["pack/tokens_per_second"]
                    for entry in (ours, theirs)
                ]
                ranks = 2 if name == "tflops" else 1
                assert shares[0] == pytest.approx(shares[1] / ranks, rel=1e-6), name
        packs = [
            one["summary"]["train_samples_per_second"] * one["summary"]["train_runtime"]
            for one in (found, alone)
        ]
        assert packs == pytest.approx([14, 14], rel=0.02)  # 7 steps of 2, as Trainer counts them
    assert {"pack/loss/a.json", "pack/loss/b.json"} < set(alone["steps"][0])


def test_evaluation_is_that_of_one_rank(folder, alone, tmp_path):
    """While training, alone, and of sets that the Trainer was not made with."""
    trainer, _ = trainer_of(tmp_path)
    few = trainer.evaluate(dataset_of(5))["eval_loss"]
    expected = [trainer.evaluate()["eval_loss"], few, few, few]
    for evaluated in read(folder, "evaluated"):
        assert evaluated == pytest.approx(expected, rel=1e-5)
    for found in read(folder, "ddp"):
        for ours, theirs in zip(found["evaluations"], alone["evaluations"], strict=True):
            for name in ("eval_loss", "eval_loss/a.json", "eval_loss/b.json"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
            packs = ours["eval_samples_per_second"] * ours["eval_runtime"]
            assert packs == pytest.approx(len(dataset_of(9)), rel=0.05)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_resumed_run_is_the_same_to_the_bit(folder, way):
    for whole, rest in zip(read(folder, way), read(folder, f"{way} resumed")):
        assert losses(rest) == losses(whole)
        assert rest["batches"] == whole["batches"][6:]


def test_a_run_goes_on_with_another_context_size(folder, alone, tmp_path):
    """The packs of a step are the same: one rank, or one group of two."""
    for found in read(folder, "resumed from one"):
        assert np.array(losses(found)) == pytest.approx(np.array(losses(alone)), rel=1e-5)
    assert joined(read(folder, "resumed from one")) == alone["batches"][6:]
    again = run(tmp_path, 1, folder / "ddp" / "checkpoint-3")
    assert np.array(losses(again)) == pytest.approx(np.array(losses(alone)), rel=1e-5)
    assert again["batches"] == alone["batches"][6:]


def test_a_diverged_run_names_the_pack(folder):
    """The one of the group, though its rows may be on either rank; two packs are a step."""
    one, other = read(folder, "diverged")
    place, rows = place_of(poisoned_of([BAD]), BAD)
    named = f"pack {place - 1} of epoch 0: rows {', '.join(map(str, rows))} of train.json"
    assert one == other
    assert f"in step {(place + 1) // 2} ({named})" in one


def test_the_command(folder, tmp_path):
    alone = json.loads(command(tmp_path, folder)[-1])
    for printed in read(folder, "command"):
        assert any(line.startswith("7 packs, ") and "each over 2 ranks" in line for line in printed)
        ours = json.loads(printed[-1])
        for name in ("first_loss", "last_loss", "eval_loss", "steps"):
            assert ours[name] == pytest.approx(alone[name], rel=1e-5), name


# Killed


class Killer(TrainerCallback):
    """Kills its process some milliseconds after a step began."""

    def __init__(self, step, seconds):
        self.step, self.seconds = step, seconds

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            kill = os.kill, (os.getpid(), signal.SIGKILL)
            threading.Timer(self.seconds, kill[0], kill[1]).start()


def train_and_die(folder, seed):
    rng = random.Random(seed)
    rank, step, seconds = rng.randrange(2), rng.randrange(2, 6), rng.uniform(0, 0.15)
    callbacks = [Killer(step, seconds)] if int(os.environ["RANK"]) == rank else []
    run(Path(folder) / "run", 2, callbacks=callbacks)


def train_on(folder):
    write(folder, "resumed", run(Path(folder) / "run", 2, last_checkpoint(Path(folder) / "run")))


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 8))]
)
def test_killed_at_a_random_moment(folder, tmp_path, seed):
    """One rank is killed, in a step or while it saves; the other one ends with it."""
    with pytest.raises(AssertionError, match="status 9"):
        on_ranks(train_and_die, tmp_path, seed)
    on_ranks(train_on, tmp_path)
    for whole, rest in zip(read(folder, "ddp"), read(tmp_path, "resumed")):
        assert losses(rest) == losses(whole)


# Four ranks


def train_four(folder, size, accumulated, name, resume=""):
    options = {"gradient_accumulation_steps": accumulated, "max_steps": 5}
    options |= {"dataloader_num_workers": 1}
    write(folder, name, run(Path(folder) / name, size, resume or None, **options))


@pytest.mark.slow
def test_two_groups_of_two_ranks(tmp_path):
    """Two packs per batch of ranks; continued by one group of two, and by one of four."""
    alone = run(tmp_path / "alone", gradient_accumulation_steps=4, max_steps=5)
    on_ranks(train_four, tmp_path, 2, 2, "both", size=4)
    ranks = read(tmp_path, "both", 4)
    packs = [joined(ranks[:2]), joined(ranks[2:])]
    first = [pack for step in zip(*packs) for pack in step]  # an epoch is 7 packs and an empty one
    assert first[:7] == alone["batches"][:7]
    checkpoint = tmp_path / "both" / "checkpoint-3"
    on_ranks(train_four, tmp_path, 2, 4, "one group", checkpoint, size=2)
    on_ranks(train_four, tmp_path, 4, 4, "of four", checkpoint, size=4)
    for found in (*ranks, *read(tmp_path, "one group"), *read(tmp_path, "of four", 4)):
        assert np.array(losses(found)) == pytest.approx(np.array(losses(alone)), rel=1e-5)
        for ours, theirs in zip(found["evaluations"], alone["evaluations"], strict=True):
            assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)


# Streams


def stream_of(unread=None):
    """With rows that cannot be split, which are left out; one more in place of row `unread`."""
    samples = samples_of(30)
    long = encoded(SMALL_SPEC, 1, *[2] * 90)
    long.labels[:30] = -100
    for place in (3, 9, 17):
        samples.insert(place, replace(long, source="a.json", row=100 + place))
    if unread is not None:
        samples[unread] = replace(long, source=samples[unread].source, row=samples[unread].row)
    return PackStream(samples, None, CAPACITY, buffer=8, on_overflow="split", on_error=Skip(0.5))


def stream_run(folder, size=1, resume=None, **options):
    return run(folder, size, resume, stream_of(**options), **DISPATCH, eval_strategy="no")


def work_on_a_stream(folder):
    place = Path(folder) / "two"
    write(folder, "stream", stream_run(place, 2))
    write(folder, "stream resumed", stream_run(place, 2, place / "checkpoint-3"))
    with pytest.raises(ValueError, match=r"parts of different packs .* \(on_error\)") as error:
        stream_run(Path(folder) / "unlike", 2, unread=14 if int(os.environ["RANK"]) else None)
    write(folder, "unlike", str(error.value))
    copy = Path(folder) / "copy"  # of one rank's run, by which it goes on
    write(folder, "stream of one", stream_run(copy, 2, copy / "checkpoint-3"))


def test_a_stream(tmp_path):
    """Its group reads one shard, lists a bad row once, and resumes on other ranks too."""
    alone = stream_run(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    on_ranks(work_on_a_stream, tmp_path)
    whole = read(tmp_path, "stream")
    assert joined(whole) == alone["batches"]
    for name in ("stream resumed", "stream of one"):
        rest = read(tmp_path, name)
        assert joined(rest) == alone["batches"][6:]
        for ours, theirs in zip(rest, whole):
            close = 1e-5 if name == "stream of one" else 0
            expected = pytest.approx(np.array(losses(theirs)), rel=close, abs=0)
            assert np.array(losses(ours)) == expected
    assert np.array(losses(whole[0])) == pytest.approx(np.array(losses(alone)), rel=1e-5)
    unlike = read(tmp_path, "unlike")
    assert unlike[0] == unlike[1]
    lists = [tmp_path / name / "bad_rows.jsonl" for name in ("one", "two")]
    assert lists[0].read_text() == lists[1].read_text() != ""
    assert [entry["pack/bad_rows"] for entry in whole[1]["steps"] if "pack/bad_rows" in entry] == [
        entry["pack/bad_rows"] for entry in alone["steps"] if "pack/bad_rows" in entry
    ]
    again = stream_run(tmp_path / "two", 1, tmp_path / "two" / "checkpoint-3")
    assert again["batches"] == alone["batches"][6:]

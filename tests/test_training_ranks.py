"""What PackingCallback sees to on two ranks: every rank ends, every rank's files are listed, and eval_loss is one
process's."""

import json
import os
from pathlib import Path

import pytest
from ranks import on_ranks
from test_checkpoints import files_of
from test_divergence import BAD, place_of, trainer_of
from test_divergence import dataset_of as poisoned_of
from test_evaluation import CASES, dataset_of, expected  # noqa: F401
from test_evaluation import trainer_of as evaluating
from test_resume import copy_of, run

from mmpack.hf.checkpoints import check_checkpoint


def diverge(folder):
    """The error of a run of which one rank has the pack that breaks it."""
    trainer = trainer_of(folder / "diverged", poisoned_of(poisoned=[BAD]), ddp_backend="gloo")
    with pytest.raises(ValueError, match="diverged") as error:
        trainer.train()
    return str(error.value)


def save(folder):
    run(folder / "saved", ddp_backend="gloo", max_steps=2)


def evaluate(folder):
    """eval_loss of every case, the first one before and while it trains too."""
    found = []
    for capacity, size in CASES:
        options = {"per_device_eval_batch_size": size, "ddp_backend": "gloo"}
        options |= {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
        trainer = evaluating(folder / "run", dataset_of(64), dataset_of(capacity), **options)
        found.append(trainer.evaluate()["eval_loss"])
    trainer.train()
    found += [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return found


def work(folder):
    folder, rank = Path(folder), int(os.environ["RANK"])
    for case in (diverge, save, evaluate):
        (folder / f"{case.__name__}.{rank}.json").write_text(json.dumps(case(folder)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(work, folder)
    return folder


@pytest.fixture
def results(folder):
    """A case -> what both ranks have to say."""

    def read(case):
        paths = [folder / f"{case.__name__}.{rank}.json" for rank in range(2)]
        return [json.loads(path.read_text()) for path in paths]

    return read


def test_every_rank_ends(results):
    """The one whose pack it was, and the other, with the same words."""
    one, other = results(diverge)
    first, rows = place_of(poisoned_of(poisoned=[BAD]), BAD)
    named = f"pack {first - 1} of epoch 0: rows {', '.join(map(str, rows))} of train.json"
    assert one == other
    assert f"in step {(first - 1) // 2 + 1} ({named})" in one


def test_every_ranks_files_are_listed(results, folder, tmp_path):
    results(save)
    whole = folder / "saved" / "checkpoint-2"
    assert {"rng_state_0.pth", "rng_state_1.pth", "scheduler.pt"} < set(files_of(whole))
    check_checkpoint(whole)
    for name in ("rng_state_0.pth", "rng_state_1.pth"):
        torn = copy_of(whole, tmp_path / name)
        (torn / name).unlink()
        with pytest.raises(ValueError, match=f"not a complete checkpoint: {name}"):
            check_checkpoint(torn)


def test_eval_loss_is_that_of_one_process(results, expected):  # noqa: F811
    """Packs that accelerate repeats, so that ranks have equally many, are not counted twice."""
    one, other = results(evaluate)
    assert one == other
    assert len(one) == len(CASES) + 1
    assert one == pytest.approx([expected] * len(one), rel=1e-5)

"""What PackingCallback sees to on two ranks: every rank ends, every rank's files are listed, and eval_loss is one
process's. The ranks are forked by a server that has imported all, once for all cases."""

import json
import multiprocessing
import os
import socket
import traceback

import pytest
import torch.distributed as dist
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


def work(rank, port, folder):
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    for case in (diverge, save, evaluate):
        try:
            result = case(folder)
        except BaseException:
            result = {"error": traceback.format_exc()}
        (folder / f"{case.__name__}.{rank}.json").write_text(json.dumps(result))
        if isinstance(result, dict):
            os._exit(1)
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes keep a process that is through from ending


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_training_ranks"])
    processes = [context.Process(target=work, args=(rank, port, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=150)
        if process.is_alive():
            process.kill()
            process.join()
    return folder


@pytest.fixture
def results(folder):
    """A case -> what both ranks have to say."""

    def read(case):
        paths = [folder / f"{case.__name__}.{rank}.json" for rank in range(2)]
        found = [
            json.loads(p.read_text()) if p.exists() else {"error": "not reached"} for p in paths
        ]
        errors = [one["error"] for one in found if isinstance(one, dict)]
        assert not errors, "\n".join(errors)
        return found

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

"""A run of two ranks, DDP and FSDP2, is the run of one process on the same packs per step; stopped, it
continues on one process, two, or four, with every sample once an epoch."""

import json
import os
from pathlib import Path

import pytest
from ranks import on_ranks
from test_resume import dataset_of, losses, numbers_of, run

SAMPLES = 33  # 11 packs: an epoch is 3 steps of 4 packs, the last one of 3
SAVED = 2
FSDP = {"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2}}


def train_a_rank(folder, rank, ranks, resume=None, **options):
    """Leave in the folder what the rank was trained on and the losses."""
    options |= {"gradient_accumulation_steps": 4 // ranks, "max_steps": 6, "save_steps": SAVED}
    options |= {"ddp_backend": "gloo"} if ranks > 1 else {}
    trainer, seen, _ = run(folder, None, dataset_of(SAMPLES), resume, **options)
    found = {"seen": seen, "losses": [float(loss) for loss in losses(trainer)]}
    (folder / f"rank{rank}{'' if resume is None else ' resumed'}.json").write_text(
        json.dumps(found)
    )


def train_two(folder):
    folder = Path(folder)
    rank = int(os.environ["RANK"])
    for way, options in {"ddp": {}, "fsdp": FSDP}.items():
        (folder / way).mkdir(exist_ok=True)
        train_a_rank(folder / way, rank, 2, **options)
        train_a_rank(folder / way, rank, 2, folder / way / f"checkpoint-{SAVED}", **options)
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()


def train_four(folder, checkpoint):
    train_a_rank(Path(folder), int(os.environ["RANK"]), 4, checkpoint)


def read(folder, ranks, suffix=""):
    """(batches of all ranks by step of the loader, losses)"""
    files = [folder / f"rank{rank}{suffix}.json" for rank in range(ranks)]
    found = [json.loads(file.read_text()) for file in files]
    assert all(other["losses"] == found[0]["losses"] for other in found)
    return list(zip(*(rank["seen"] for rank in found))), found[0]["losses"]


def flat(batches):
    return [ids for batch in batches for ids in batch]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of two ranks, DDP and FSDP2, and of one process."""
    both = tmp_path_factory.mktemp("ranks")
    on_ranks(train_two, both)
    (both / "one").mkdir()
    train_a_rank(both / "one", 0, 1)
    return both


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_ranks_are_one_process(folders, way):
    seen, found = read(folders / way, 2)
    alone, expected = read(folders / "one", 1)
    assert found == pytest.approx(expected, rel=1e-5)
    assert numbers_of(flat(alone[:11])) == numbers_of(flat(alone[11:])) == list(range(SAMPLES))
    # 12 packs per epoch, of which the last one, rank 1's, is empty
    assert (
        numbers_of(flat(seen[:6])[:-1]) == numbers_of(flat(seen[6:])[:-1]) == list(range(SAMPLES))
    )
    assert seen[5][1] == seen[11][1] and len(seen[5][1]) == 6  # the smallest sample


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_ranks_resume_on_two(folders, way):
    whole, expected = read(folders / way, 2)
    rest, found = read(folders / way, 2, " resumed")
    assert rest == whole[2 * SAVED :]
    assert found == expected


def check_rest(folders, rest, found):
    """What came after the checkpoint: 3 packs of the first epoch, then the second."""
    whole, expected = read(folders / "ddp", 2)
    before = flat(whole[: 2 * SAVED])
    assert numbers_of(before + rest[:3]) == list(range(SAMPLES))
    assert found == pytest.approx(expected, rel=1e-5)


def test_two_ranks_resume_on_one(folders):
    train_a_rank(folders / "ddp", 9, 1, folders / "ddp" / f"checkpoint-{SAVED}")
    found = json.loads((folders / "ddp" / "rank9 resumed.json").read_text())
    check_rest(folders, found["seen"], found["losses"])
    assert numbers_of(found["seen"][3:]) == list(range(SAMPLES))


@pytest.mark.slow
def test_two_ranks_resume_on_four(folders, tmp_path):
    on_ranks(train_four, tmp_path, folders / "ddp" / f"checkpoint-{SAVED}", size=4)
    rest, found = read(tmp_path, 4, " resumed")
    check_rest(folders, flat(rest), found)
    assert numbers_of(flat(rest[1:])[:-1]) == list(range(SAMPLES))

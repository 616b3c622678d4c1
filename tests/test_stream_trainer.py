"""A stream in a stock Trainer: stopped and resumed it trains on the packs it would have, on two ranks."""

import collections
import json
from pathlib import Path

import pytest
import torch
from builders import QUIET, SMALL_SPEC, encoded, tiny_config, tiny_model
from ranks import on_ranks
from torch.utils.data import IterableDataset, get_worker_info
from transformers import Trainer, TrainingArguments

from mmpack import PackStream
from mmpack.hf import PackCollator, PackingCallback, patch_model

TESTS = Path(__file__).resolve().parent


def stream(count=60):
    samples = [encoded(SMALL_SPEC, n, 3, *[2] * (4 + 5 * n % 13)) for n in range(count)]
    return PackStream(samples, None, 40, tiny_config(100, vision=SMALL_SPEC), buffer=8)


class Splitting(IterableDataset):
    """Asks before each row which worker it is in and, where it `splits_ranks`, in which rank."""

    def __init__(self, splits_ranks=False):
        self.splits_ranks = splits_ranks

    def __iter__(self):
        samples = stream().source
        for number, sample in enumerate(samples):
            info = get_worker_info()
            place, of = (0, 1) if info is None else (info.id, info.num_workers)
            if self.splits_ranks:
                place += torch.distributed.get_rank() * of
                of *= torch.distributed.get_world_size()
            if number % of == place:
                yield sample


def splitting(**options):
    return PackStream(Splitting(**options), None, 40, buffer=8)


def trainer_of(folder, data, seen, **options):
    config = tiny_config(100, vision=SMALL_SPEC)
    model = patch_model(tiny_model(config))
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    settings = {**QUIET, "accelerator_config": {"dispatch_batches": False}, **options}
    args = TrainingArguments(str(folder), **settings)
    trainer = Trainer(model, args, PackCollator(), data)
    PackingCallback(data).attach(trainer)
    return trainer


def rows_trained_on(folder, data, **options):
    """Numbers of the rows of the first pass and of the second, as the model got them."""
    trainer = trainer_of(folder, data, [], **options)
    passes = collections.defaultdict(list)

    def note(model, args, kwargs):
        ids, pack = kwargs["input_ids"][0].tolist(), kwargs["mmpack"]
        rows = [ids[begin] for begin in pack["offsets"][:-1]]
        passes[json.loads(pack["resume"])["pass"]] += rows

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    return passes[0], passes[1]


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_source_that_splits_itself_by_worker_is_trained_on_whole(tmp_path, workers):
    options = {"max_steps": 24, "dataloader_num_workers": workers}
    first, second = rows_trained_on(tmp_path, splitting(), **options)
    assert sorted(first) == list(range(60))
    assert len(set(second)) == len(second) > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_continues_with_the_next_packs(tmp_path, workers):
    """Over the end of a pass, with micro-batches, and packs that workers and accelerate made ahead."""
    options = {
        "gradient_accumulation_steps": 2, "dataloader_num_workers": workers,
        "save_strategy": "steps", "save_steps": 5, "save_only_model": False,
    }  # fmt: skip
    whole, rest = [], []
    trainer_of(tmp_path, stream(), whole, max_steps=12, **options).train()
    checkpoint = tmp_path / "checkpoint-5"
    state = json.loads((checkpoint / "mmpack_stream_0.json").read_text())
    assert state["workers"] == max(1, workers)
    resumed = trainer_of(tmp_path, stream(), rest, max_steps=12, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert len(whole) == 24
    assert rest == whole[10:]
    log = [entry for entry in resumed.state.log_history if "pack/utilization" in entry]
    assert len(log) > 0
    (checkpoint / "mmpack_stream_0.json").unlink()
    with pytest.raises(ValueError, match=r"mmpack_stream_0.json is missing.*load_state_dict"):
        other = trainer_of(tmp_path, stream(), [], max_steps=12, **options)
        other.train(resume_from_checkpoint=str(checkpoint))


def test_a_dispatcher_is_refused_before_it_cuts_batches(tmp_path):
    with pytest.raises(ValueError, match='accelerator_config={"dispatch_batches": False}'):
        trainer_of(tmp_path, stream(), [], max_steps=1, accelerator_config={})


def train_on_a_rank(folder, workers):
    options = {
        "max_steps": 8, "save_strategy": "steps", "save_steps": 3, "dataloader_num_workers": workers,
        "ddp_backend": "gloo",
    }  # fmt: skip
    whole, rest = [], []
    folder = Path(folder)
    trainer_of(folder / "run", stream(), whole, **options).train()
    trainer = trainer_of(folder / "run", stream(), rest, **options)
    trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-3"))
    options |= {"max_steps": 14, "save_strategy": "no"}
    rows = rows_trained_on(folder / "splitting", splitting(), **options)
    with pytest.raises(ValueError) as refusal:
        rows_trained_on(folder / "ranks", splitting(splits_ranks=True), **options)
    result = [whole, rest, rows, str(refusal.value)]
    (folder / f"{trainer.args.process_index}.json").write_text(json.dumps(result))


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_have_parts_of_their_own_and_resume(tmp_path, workers):
    on_ranks(train_on_a_rank, tmp_path, workers)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for whole, rest, *_ in ranks:
        assert rest == whole[3:]
    numbers = [{ids[0] for ids in whole} for whole, *_ in ranks]
    assert not numbers[0] & numbers[1]  # of the first sample of each pack
    first, second = (ranks[0][2][n] + ranks[1][2][n] for n in range(2))  # of a splitting source
    assert sorted(first) == list(range(60))
    assert len(set(second)) == len(second) > 0
    for *_, refusal in ranks:
        assert "rank 1 reads other rows of the source than rank 0: rows are dealt" in refusal
    alone = trainer_of(tmp_path / "run", stream(), [], max_steps=8)
    with pytest.raises(ValueError, match="state was saved on 2 ranks, this run has 1.*resume on 2"):
        alone.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))

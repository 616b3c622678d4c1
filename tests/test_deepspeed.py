"""A run of two ranks with DeepSpeed ZeRO-2 and ZeRO-3 is the run of one process on the same packs per step:
resumed too, and with images on one rank only."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="needs deepspeed")
from builders import QUIET, tiny_model
from ranks import on_ranks
from test_distributed import CONFIG, PACKS
from test_resume import losses
from test_resume_ranks import SAVED, read, train_a_rank
from transformers import Trainer, TrainingArguments

from mmpack.hf import PackCollator, patch_model

STAGES = (2, 3)


def options_of(stage):
    os.environ["DS_ACCELERATOR"] = "cpu"
    return {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
        }
    }


def train_two(folder, stage):
    train_a_rank(Path(folder), int(os.environ["RANK"]), 2, **options_of(stage))


def resume_two(folder, stage):
    folder = Path(folder)
    checkpoint = folder / f"checkpoint-{SAVED}"
    train_a_rank(folder, int(os.environ["RANK"]), 2, checkpoint, **options_of(stage))


def train_on_images(folder, stage):
    """One rank's pack has images, the other's has none; without a stage, one process has both."""
    folder, rank = Path(folder), os.environ.get("RANK", "alone")
    options = options_of(stage) if stage else {"gradient_accumulation_steps": 2}
    model = patch_model(tiny_model(CONFIG))
    args = TrainingArguments(
        str(folder), **QUIET, max_steps=3, optim="sgd", learning_rate=0.1, **options
    )
    trainer = Trainer(
        model=model, args=args, train_dataset=PACKS, data_collator=PackCollator(model=model)
    )
    trainer.train()
    found = [float(loss) for loss in losses(trainer)]
    (folder / f"images.{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of each stage on two ranks, and of one process."""
    both = tmp_path_factory.mktemp("ranks")
    for stage in STAGES:
        (both / str(stage)).mkdir()
        for case in (train_two, resume_two, train_on_images):
            on_ranks(case, both / str(stage), stage, timeout=600)
    (both / "one").mkdir()
    train_a_rank(both / "one", 0, 1)
    train_on_images(both / "one", 0)
    return both


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_are_one_process(folders, stage):
    _, found = read(folders / str(stage), 2)
    _, expected = read(folders / "one", 1)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_resume(folders, stage):
    whole, expected = read(folders / str(stage), 2)
    rest, found = read(folders / str(stage), 2, " resumed")
    assert rest == whole[2 * SAVED :]
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_without_images(folders, stage):
    expected = json.loads((folders / "one" / "images.alone.json").read_text())
    assert len(set(expected)) == 3
    for rank in range(2):
        found = json.loads((folders / str(stage) / f"images.{rank}.json").read_text())
        assert found == pytest.approx(expected, rel=1e-5)

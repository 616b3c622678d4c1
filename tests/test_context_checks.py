"""Context parallelism without other ranks: how packs are dealt, and what a Trainer refuses."""

import pytest
from accelerate.data_loader import BatchSamplerShard
from builders import QUIET, SMALL_SPEC, encoded, small_config, tiny_model
from torch.utils.data import BatchSampler, SequentialSampler, Subset
from transformers import Trainer, TrainingArguments

from mmpack import ContextGroup, PackedDataset
from mmpack.cli.main import main
from mmpack.hf import PackCollator, PackingCallback, patch_model
from mmpack.hf.checkpoints import PackKeeper
from mmpack.hf.context_ranks import check_known
from mmpack.packing.even_packs import EvenPacks

SECOND = ContextGroup(1, 2)


def dataset_of(count=24):
    samples = [encoded(SMALL_SPEC, 1, n + 3, [2] * (4 + 5 * n % 13)) for n in range(count)]
    return PackedDataset.from_samples(samples, 40)


@pytest.mark.parametrize(("ranks", "size", "batch"), [(2, 2, 1), (4, 2, 1), (4, 2, 3), (6, 3, 2)])
def test_the_ranks_of_a_group_get_the_same_packs(ranks, size, batch):
    """As accelerate deals batches; every pack occurs once in a group, and all groups get as many."""
    dataset = dataset_of()
    groups = ranks // size
    even = EvenPacks(dataset, groups * batch, context_size=size, batch_size=batch)
    sampler = BatchSampler(SequentialSampler(even), batch, drop_last=False)
    dealt = [
        [[repr(list(even[i])) for i in found] for found in BatchSamplerShard(sampler, ranks, rank)]
        for rank in range(ranks)
    ]
    for first in range(0, ranks, size):
        assert all(rank == dealt[first] for rank in dealt[first : first + size])
    assert len({len(rank) for rank in dealt}) == 1
    packs = [pack for step in zip(*dealt[::size]) for found in step for pack in found]
    assert packs[: len(dataset)] == [repr(list(pack)) for pack in dataset]
    assert len(packs) == even.num_packs == len(even) // size
    assert all(pack == repr(list(dataset.empty_pack())) for pack in packs[len(dataset) :])
    assert f"for {size} ranks each" in repr(even)


def test_batches_are_full():
    with pytest.raises(ValueError, match="multiple must be one of batch_size"):
        EvenPacks(dataset_of(), 4, batch_size=3)


@pytest.fixture
def second_of_four(monkeypatch):
    """A process that is the second of four."""
    monkeypatch.setattr(TrainingArguments, "world_size", 4)
    monkeypatch.setattr(TrainingArguments, "process_index", 1)


def test_the_packs_of_a_step_are_named(second_of_four, tmp_path):
    """A batch of rank 3 is one of the second group of two."""
    dataset = dataset_of()
    keeper = PackKeeper(dataset)
    args = TrainingArguments(str(tmp_path), **QUIET, gradient_accumulation_steps=2)
    packs = keeper.prepare(args, ContextGroup(1, 2))
    assert (packs.num_packs, len(packs)) == (8, 16)
    rows = [one.row for one in dataset[7]]
    assert keeper.place_of(2, 1, 3) == f"pack 7 of epoch 0: rows {', '.join(map(str, rows))} of "
    assert keeper.place_of(2, None, None).startswith("packs 4, 5, 6, 7 of epoch 0: ")


def trainer_of(folder, group=SECOND, train=None, wrap=None, **options):
    model = patch_model(tiny_model(small_config()), context=group)
    model.config.text_config.output_router_logits = options.pop("router", False)
    parts = ("compute_metrics", "compute_loss_func")
    given = {name: options.pop(name) for name in parts if name in options}
    data = dataset_of() if train is None else train
    every, evaluated = options.pop("attention_every", None), options.pop("evaluated", None)
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **{**QUIET, "max_steps": 1, **options}),
        train_dataset=data if wrap is None else wrap(data),
        eval_dataset=evaluated,
        data_collator=PackCollator(model=model),
        **given,
    )
    PackingCallback(data, attention_every=every).attach(trainer)
    return trainer


def bad_images():
    dataset = dataset_of()
    dataset.on_bad_image = "drop"
    return dataset


def nothing(*args, **kwargs):
    pass


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"group": ContextGroup(0, 2)}, "rank 0 of 2, but process 1 of 4 is rank 1 of its group"),
        ({"wrap": lambda data: Subset(data, range(4))}, "train_dataset is not the data set passed"),
        ({"attention_every": 1}, "attention_every does not apply with context parallelism"),
        ({"train": bad_images()}, "on_bad_image='drop' does not apply with context parallelism"),
        (
            {"evaluated": {"one": bad_images()}},
            "on_bad_image='drop' does not apply with context parallelism",
        ),
        ({"router": True}, "output_router_logits asks for the router's auxiliary loss"),
        (
            {"compute_metrics": nothing, "prediction_loss_only": True},
            "compute_metrics does not apply with context parallelism: a rank has the labels of",
        ),
        ({"compute_loss_func": nothing}, "compute_loss_func does not apply with context"),
        (
            {"average_tokens_across_devices": False},
            "average_tokens_across_devices=False does not apply with context parallelism",
        ),
        (
            {"accelerator_config": {"split_batches": True}},
            "accelerator_config split_batches=True does not apply with context parallelism",
        ),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            "accelerator_config dispatch_batches=True does not apply with context parallelism",
        ),
    ],
    ids=lambda changes: "" if isinstance(changes, str) else next(iter(changes)),
)
def test_what_does_not_apply_is_refused(second_of_four, tmp_path, changes, text):
    with pytest.raises(ValueError, match=text):
        trainer_of(tmp_path, **changes)


def test_a_number_of_ranks_that_is_no_multiple_is_refused(second_of_four, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", 3)
    with pytest.raises(ValueError, match="3 ranks do not divide into context groups of 2"):
        trainer_of(tmp_path)


def test_other_parallelism_is_refused(second_of_four, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "get_tp_size", lambda self: 2)
    with pytest.raises(ValueError, match="accelerate's parallelism_config does not apply with"):
        trainer_of(tmp_path)


def test_sets_of_other_groups_are_dealt_anew(second_of_four, tmp_path):
    """An `EvenPacks` of the user's."""
    trainer = trainer_of(tmp_path, evaluated=EvenPacks(dataset_of(), 3))
    found = trainer.eval_dataset
    assert (found.context_size, found.multiple, found.batch_size) == (2, 2, 1)
    assert found.num_packs == 2 * -(-len(dataset_of()) // 2)
    with pytest.raises(ValueError, match="on_bad_image='drop' does not apply with context"):
        trainer.get_eval_dataloader(EvenPacks(bad_images(), 4))


def test_the_model_is_patched_first(tmp_path):
    """The callback has prepared data for single ranks."""
    trainer = trainer_of(tmp_path, group=None)
    patch_model(trainer.model, context=ContextGroup(0, 2))
    with pytest.raises(ValueError, match="shares packs over 2 ranks .*patch the model first, then"):
        trainer.train()
    model, data = trainer.model, dataset_of()
    passed = Trainer(
        model,
        TrainingArguments(str(tmp_path), **QUIET),
        train_dataset=data,
        data_collator=PackCollator(model=model),
        callbacks=[PackingCallback(data)],
    )
    with pytest.raises(ValueError, match=r"of which PackingCallback did not know.*attach\(trainer"):
        passed.train()


def test_a_model_that_left_its_group_is_told(second_of_four, tmp_path):
    model = tiny_model(small_config())
    for now, words in (
        (None, "a rank with packs of its own"),
        (ContextGroup(0, 4), "rank=0, size=4"),
    ):
        with pytest.raises(
            ValueError, match=f"attached for .*rank=1, size=2.*now patched for .*{words}"
        ):
            check_known(patch_model(model, context=now), SECOND)


def test_the_command_checks_heads_before_it_reads_rows(second_of_four, tmp_path, capsys):
    config = small_config()
    config.text_config.num_attention_heads = config.text_config.num_key_value_heads = 2
    config.save_pretrained(tmp_path)
    words = ["--data", tmp_path / "no.json", "--tokenizer", tmp_path, "--capacity", 64]
    words += ["--config", tmp_path / "config.json", "--output_dir", tmp_path, "--context-size", 4]
    assert main(["train", *map(str, words)]) == 1
    assert "2 heads (num_attention_heads) do not divide among the 4" in capsys.readouterr().err

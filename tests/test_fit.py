"""Data encoded for another model is refused, on the host, whoever calls the model."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import QUIET, SMALL_SPEC, encoded, small_config, tiny_config, tiny_model, with_noise
from transformers import Trainer, TrainingArguments

from mmpack import PackedDataset
from mmpack.cli.main import main
from mmpack.hf import PackCollator, PackingCallback, patch_model
from mmpack.store.encoded_store import open_store, write_store
from mmpack.store.plan_file import save_plan

ROWS = 100  # of the table of `small_config`


def sample(*ids, spec=SMALL_SPEC, **options):
    return replace(encoded(spec, *ids), source="train.json", row=ids[0], **options)


def with_image(spec):
    return with_noise([sample(1, 2, (2, 4), spec=spec)])


@pytest.fixture(scope="module")
def model():
    return patch_model(tiny_model(small_config()), impl="reference")


@pytest.mark.parametrize("assemble_on", ["host", "device"])
def test_an_id_outside_the_table_is_refused(model, assemble_on):
    """By the hook, and by a collator that knows the model, where a compiled model asks nothing. Negative
    ones assembly refuses."""
    bad, reason = sample(1, 100, 3), "token id 100, but the model's embedding has 100 rows"
    with pytest.raises(ValueError, match=rf"row 1 of train\.json.*{reason}"):
        PackCollator(model=model, assemble=assemble_on)([bad])
    if assemble_on == "host":
        with pytest.raises(ValueError, match=reason):
            model(**PackCollator()([bad]))


@pytest.mark.parametrize("wrong", [100, -7])
def test_a_label_outside_the_table_is_refused(model, wrong):
    labels = replace(sample(1, 2, 3), labels=np.array([-100, wrong, 3], dtype=np.int32))
    with pytest.raises(
        ValueError, match=f"token id {wrong}, but the model's embedding has 100 rows"
    ):
        model(**PackCollator()([labels]))


def test_the_table_may_have_grown():
    model = patch_model(tiny_model(small_config()))
    batch = PackCollator()([sample(1, 100)])
    with pytest.raises(ValueError, match=r"model\.resize_token_embeddings\(101\)"):
        model(**batch)
    model.resize_token_embeddings(104)
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize(
    "other",
    [
        {"image_token_id": 89},
        {"video_token_id": 89},
        {"vision_start_token_id": 89},
        {"vision_end_token_id": 89},
        {"patch_size": 16},
        {"merge_size": 1},
        {"temporal_patch_size": 1},
    ],
    ids=str,
)
def test_data_of_another_model_is_refused(model, other):
    [(name, value)] = other.items()
    batch = PackCollator()([with_image(replace(SMALL_SPEC, **other))])
    with pytest.raises(
        ValueError, match=rf"the model has {name} \d+, but the data .* with {value};"
    ):
        model(**batch)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_another_normalisation_is_refused(tmp_path, file):
    """Which the model's folder knows, not its config."""
    means = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    nested = {"image_processor": means} if file == "processor_config.json" else means
    (tmp_path / file).write_text(json.dumps(nested))
    config = small_config()
    config._name_or_path = str(tmp_path)
    model = patch_model(tiny_model(config))
    with pytest.raises(ValueError, match=r"has image_mean \(0\.5, 0\.5, 0\.5\), but the data"):
        model(**PackCollator()([with_image(SMALL_SPEC)]))
    spec = replace(SMALL_SPEC, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
    assert model(**PackCollator()([with_image(spec)])).loss.isfinite()
    assert model(**PackCollator()([sample(1, 2)])).loss.isfinite()  # text has no pixels


def test_a_store_knows_its_ids(tmp_path):
    """As a list does, and as one that is split; labels count."""
    samples = [sample(5, 7), sample(6, 98), sample(7, 3, 2)]
    store = write_store(tmp_path / "packed", iter(samples), SMALL_SPEC)
    assert store.id_range == (2, 98)
    assert open_store(store.folder).id_range == (2, 98)
    for data in (samples, store):
        assert PackedDataset.from_samples(data, 40).id_range() == (2, 98)
    pieces = PackedDataset.from_samples([sample(1, range(60))], 40, on_overflow="split")
    assert pieces.id_range() == (0, 59)


def trained(folder, *options):
    arguments = ["--data", folder / "packed", "--config", folder / "config.json", "--use_cpu"]
    arguments += ["--output_dir", folder / "run", "--save_strategy", "no", "--steps", 1, *options]
    return main(["train", *map(str, arguments)])


def packed_folder(folder, samples, spec=SMALL_SPEC):
    store = write_store(folder / "packed", iter(samples), spec)
    save_plan(PackedDataset.from_samples(store, 40).plan, folder / "packed")
    tiny_config(ROWS, vision=SMALL_SPEC).to_json_file(folder / "config.json")


def test_training_is_refused_before_it_begins(tmp_path, capsys):
    packed_folder(tmp_path, [sample(5, 7), sample(6, 120), sample(7, 3)])
    assert trained(tmp_path) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "row 6 of train.json has token id 120, but the model's embedding has 100 rows" in message


def test_a_trainer_is_refused_before_it_begins(tmp_path):
    dataset = PackedDataset.from_samples([sample(5, 7), sample(6, 120)], 40)
    model = patch_model(tiny_model(small_config()))
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), **QUIET, max_steps=1),
        train_dataset=dataset,
        data_collator=PackCollator(),
    )
    PackingCallback(dataset).attach(trainer)
    with pytest.raises(ValueError, match="row 6 of train.json has token id 120"):
        trainer.train()
    assert torch.isfinite(model.lm_head.weight).all()

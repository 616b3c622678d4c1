"""mmpack inside LLaMA-Factory: its options, and runs; those of the second half need it, and skip without it."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from builders import stock_processor, tiny_config, tiny_model
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from mmpack import Encoder, PackedDataset, VideoSpec, VisionSpec
from mmpack.cli.main import main
from mmpack.hf import PackCollator, PackingCallback, patch_model
from mmpack.integrations import llamafactory
from mmpack.integrations.chosen_rows import RowChoice
from mmpack.integrations.llamafactory_options import (
    ALWAYS,
    OF_ROWS,
    REFUSED,
    taken_options,
    vision_with_budgets,
)
from mmpack.integrations.replaced_names import replaced

BUDGET = 56 * 56
FROZEN = {
    "freeze_vision_tower": True,
    "freeze_multi_modal_projector": True,
    "freeze_language_model": False,
}
needs_llamafactory = pytest.mark.skipif(
    find_spec("llamafactory") is None,
    reason="needs LLaMA-Factory, in an environment of benchmarks/environments/llamafactory.sh",
)


@pytest.fixture
def fake(monkeypatch):
    """A module tree with a few names."""
    package, module = types.ModuleType("framework"), types.ModuleType("framework.workflow")
    module.load, module.collate = len, sum
    monkeypatch.setitem(sys.modules, "framework", package)
    monkeypatch.setitem(sys.modules, "framework.workflow", module)
    return module


def test_names_are_replaced_and_restored_after_errors(fake):
    makers = {"load": lambda theirs: (theirs, 1), "collate": lambda theirs: (theirs, 2)}
    with replaced("framework.workflow", makers):
        assert (fake.load, fake.collate) == ((len, 1), (sum, 2))
    assert (fake.load, fake.collate) == (len, sum)
    with pytest.raises(KeyError), replaced("framework.workflow", makers):
        raise KeyError
    assert (fake.load, fake.collate) == (len, sum)


def test_a_name_that_is_gone_replaces_nothing(fake):
    makers = {"load": lambda theirs: 1, "gone": lambda theirs: 2}
    error = "framework.workflow has no gone, which mmpack replaces; use a version that"
    with pytest.raises(ValueError, match=error), replaced("framework.workflow", makers):
        pass
    assert fake.load is len and not hasattr(fake, "gone")


def test_an_error_while_replacing_restores(fake):
    makers = {"load": lambda theirs: 1, "collate": lambda theirs: 1 / 0}
    with pytest.raises(ZeroDivisionError), replaced("framework.workflow", makers):
        pass
    assert (fake.load, fake.collate) == (len, sum)


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_does_not_apply_is_refused_by_name(name):
    accepted, why, advice = REFUSED[name]
    for value in (None, *accepted):
        assert taken_options({name: value}, FROZEN).packed is None
    refused = next(value for value in ("other", 7, True, False) if value not in accepted)
    shown = str(refused).lower()
    with pytest.raises(ValueError) as error:
        taken_options({name: refused}, FROZEN)
    assert str(error.value) == f"{name}: {shown} does not apply: {why}; {advice}"


@pytest.mark.parametrize("name", OF_ROWS)
def test_options_of_rows_are_refused_beside_a_store(name):
    assert taken_options({name: 3}, FROZEN).packed is None
    with pytest.raises(
        ValueError, match=f"^{name}: 3 does not apply: the rows of folder are packed"
    ):
        taken_options({name: 3, "packed": "folder"}, FROZEN)


def test_options_of_mmpacks_own():
    args = {"packed": "a", "eval_packed": "b", "flash_attn": "fa2", "freeze_vision_tower": False}
    own = taken_options(args, FROZEN)
    assert (own.packed, own.eval_packed, own.impl) == ("a", "b", "flash2")
    assert own.frozen == ("merger",)
    assert args == {"freeze_vision_tower": False, "do_train": True}
    with pytest.raises(ValueError, match="^packed is a folder"):
        taken_options({"packed": ["a"]}, FROZEN)
    with pytest.raises(ValueError, match="^eval_packed does not apply without packed"):
        taken_options({"eval_packed": "b"}, FROZEN)
    with pytest.raises(ValueError, match="^flash_attn: disabled does not apply: packs need"):
        taken_options({"flash_attn": "disabled"}, FROZEN)


def test_the_command_trains_by_default():
    for args in ({}, {"do_train": None}, {"do_train": True}):
        taken_options(args, FROZEN)
        assert args == {"do_train": True}


def model_args(**changed):
    """LLaMA-Factory's defaults."""
    values = {"image_max_pixels": 768 * 768, "image_min_pixels": 32 * 32, "video_maxlen": 128}
    values |= {"video_max_pixels": 256 * 256, "video_min_pixels": 16 * 16, "video_fps": 2.0}
    return types.SimpleNamespace(**{**values, **changed})


def test_the_narrower_budget_holds():
    video = VideoSpec(min_pixels=3136, max_pixels=602112, min_frames=4, max_frames=768)
    spec = VisionSpec(min_pixels=3136, max_pixels=12845056, video=video)
    ours = vision_with_budgets(spec, model_args(), {})
    assert (ours.min_pixels, ours.max_pixels) == (3136, 768 * 768)
    assert (ours.video.min_pixels, ours.video.max_pixels) == (3136, 256 * 256)
    assert (ours.video.fps, ours.video.min_frames, ours.video.max_frames) == (2.0, 4, 128)
    few = vision_with_budgets(spec, model_args(video_maxlen=2, image_min_pixels=5000), {})
    assert (few.min_pixels, few.video.min_frames, few.video.max_frames) == (5000, 2, 2)
    with pytest.raises(ValueError, match="^image_max_pixels: 100 .* smaller than 3136 pixels"):
        vision_with_budgets(spec, model_args(image_max_pixels=100), {})


def test_a_budget_per_frame_is_refused_where_there_is_one_for_the_clip():
    video = VideoSpec(min_pixels=4096, max_pixels=25165824, budgets_clip=True)
    spec = VisionSpec(min_pixels=65536, max_pixels=16777216, video=video)
    assert vision_with_budgets(spec, model_args(), {}).video.max_pixels == 25165824
    with pytest.raises(ValueError, match="^video_max_pixels does not apply: it is for one frame"):
        vision_with_budgets(spec, model_args(), {"video_max_pixels": 65536})


@pytest.fixture
def numbered(tmp_path):
    """Two data sets, the first one of two files."""
    folder = tmp_path / "a"
    folder.mkdir()
    counts = {folder / "0.jsonl": 5, folder / "1.jsonl": 4, tmp_path / "b.jsonl": 6}
    start = 0
    for path, count in counts.items():
        rows = [{"prompt": "p", "completion": str(start + n)} for n in range(count)]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        start += count
    entry = {"columns": {"prompt": "prompt", "response": "completion"}}
    info = {"a": {"file_name": "a", **entry}, "b": {"file_name": "b.jsonl", **entry}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path


def chosen(folder, choice):
    from mmpack import Reader

    groups_of = [list(Reader(mapping=[name]).groups(folder)) for name in ("a", "b")]
    rows = [row for group in choice.of(groups_of) for row in group.rows]
    return [int(row.content["completion"]) for row in rows]


def test_max_samples_are_the_first_of_each_data_set(numbered):
    assert chosen(numbered, RowChoice(None, 0, 0)) == list(range(15))
    assert chosen(numbered, RowChoice(7, 0, 0)) == [*range(7), *range(9, 15)]
    assert chosen(numbered, RowChoice(3, 0, 0)) == [0, 1, 2, 9, 10, 11]


@pytest.mark.parametrize("size", [0.2, 0.5, 4])
def test_val_size_holds_out_the_rows_that_datasets_would(numbered, size):
    datasets = pytest.importorskip("datasets")
    numbers = [*range(7), *range(9, 15)]
    split = datasets.Dataset.from_dict({"n": numbers}).train_test_split(test_size=size, seed=3)
    choice = RowChoice(7, size, 3)
    held_out = chosen(numbered, choice.evaluation())
    assert held_out == sorted(split["test"]["n"])
    assert chosen(numbered, choice.training()) == sorted(split["train"]["n"])
    assert choice.training().as_record() != choice.evaluation().as_record() != {}


@pytest.mark.parametrize("size", [1, 15, 20, 0.99, math.inf, math.nan])
def test_a_val_size_that_leaves_nothing_is_refused(numbered, size):
    with pytest.raises(ValueError, match=f"^val_size: {size} holds "):
        chosen(numbered, RowChoice(None, size, 0).evaluation())
    with pytest.raises(ValueError, match=f"^val_size: {size} holds "):
        chosen(numbered, RowChoice(None, size, 0).training())


@pytest.mark.parametrize("limit", ["num_samples", "max_samples"])
@pytest.mark.parametrize(
    ("choice", "option"),
    [
        (RowChoice(None, 0.2, 0).training(), "val_size"),
        (RowChoice(None, 0.2, 0).evaluation(), "val_size"),
        (RowChoice(7, 0, 0), "max_samples"),
    ],
)
def test_a_limit_of_an_entry_beside_another_choice_is_refused(numbered, limit, choice, option):
    """LLaMA-Factory draws num_samples first and splits them; here packs are planned after the split."""
    info = json.loads((numbered / "dataset_info.json").read_text())
    info["b"][limit] = 3
    (numbered / "dataset_info.json").write_text(json.dumps(info))
    error = (
        f"^{option} does not apply to b.jsonl, whose entry has {limit}: .* leave one of them out"
    )
    with pytest.raises(ValueError, match=error):
        chosen(numbered, choice)
    assert len(chosen(numbered, RowChoice(None, 0, 0))) == 15  # the plan applies the limit


def test_the_command_without_llamafactory(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.yaml").write_text("stage: sft\n")
    monkeypatch.setitem(sys.modules, "llamafactory", None)
    monkeypatch.setattr(llamafactory, "_read", lambda words: __import__("llamafactory"))
    assert llamafactory.main([]) == 2
    assert llamafactory.main(["train.json"]) == 2
    assert capsys.readouterr().err.startswith("usage: python -m mmpack.integrations.llamafactory")
    assert llamafactory.main([str(tmp_path / "train.yaml")]) == 1
    assert "llamafactory is not installed; docs/llama_factory.md" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            ModuleNotFoundError(name="torchaudio"),
            "torchaudio is not installed; pip install torchaudio",
        ),
        (ModuleNotFoundError(name="The 'x>=1' was not found"), "The 'x>=1' was not found"),
        (
            ModuleNotFoundError("No module named 'peft.x'", name="peft.x"),
            "No module named 'peft.x'",
        ),
        (
            ImportError("transformers<=5.6.0 is required."),
            "transformers<=5.6.0 is required. LLaMA-Factory's check of versions refuses the transformers that "
            "mmpack needs; set DISABLE_VERSION_CHECK=1",
        ),
        (ImportError("trl<=0.24.0 is required."), "trl<=0.24.0 is required."),
        (
            ImportError("cannot import name 'X' from 'transformers'", name="transformers"),
            "cannot import name 'X' from 'transformers'",
        ),
        (ImportError("Using `x` requires y: pip install y"), "Using `x` requires y: pip install y"),
    ],
)
def test_what_cannot_be_imported_is_one_sentence(error, text, monkeypatch, capsys):
    def fail(words):
        raise error

    monkeypatch.setattr(llamafactory, "_read", fail)
    assert llamafactory.main(["train.yaml"]) == 1
    assert capsys.readouterr().err == f"mmpack: {text}\n"


@pytest.fixture(scope="module")
def world(small_set, tmp_path_factory):
    """The demo's rows as data sets of a dataset_info.json, documents, and a tiny model with its processor's
    files."""
    folder = tmp_path_factory.mktemp("llamafactory")
    shutil.copytree(small_set / "charts", folder / "charts")
    shutil.copytree(small_set / "tokenizer", folder / "model")
    rows = json.loads((small_set / "train.json").read_text())
    texts = [{"text": " ".join(t["value"] for t in row["conversations"])} for row in rows]
    for row, text in zip(rows, texts):
        text["images"] = row["images"]
    documents = {"file_name": "text.json", "columns": {"prompt": "text", "images": "images"}}
    sharegpt = {
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "images": "images"},
    }
    info = {
        "charts": {"file_name": "train.json", **sharegpt},
        "others": {"file_name": "eval.json", **sharegpt},
        "text": documents,
    }
    for name, content in (
        ("train.json", rows[:14]),
        ("eval.json", rows[14:20]),
        ("text.json", texts[:12]),
        ("dataset_info.json", info),
    ):
        (folder / name).write_text(json.dumps(content))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    vision = Encoder.from_folder(folder / "model").vision
    config = tiny_config(len(tokenizer), vision=vision)
    tiny_model(config).save_pretrained(folder / "model")
    return folder


def yaml_of(world, out, **changed):
    """The options of a run of two epochs at a constant learning rate."""
    return {
        "model_name_or_path": str(world / "model"),
        "template": "qwen2_vl",
        "dataset_dir": str(world),
        "dataset": "charts",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "freeze_vision_tower": False,
        "freeze_multi_modal_projector": False,
        "image_max_pixels": BUDGET,
        "cutoff_len": 256,
        "output_dir": str(out),
        "seed": 3,
        "gradient_accumulation_steps": 2,
        **{name: value for name, value in TRAINING.items()},
        **changed,
    }


TRAINING = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "num_train_epochs": 2,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


def stock_log(world, out, model, **changed):
    """The log of a stock Trainer on the same packs."""
    data = PackedDataset.from_store(out / "packs" / "train")
    model = patch_model(model)
    args = TrainingArguments(
        str(out / "stock"), gradient_accumulation_steps=2, seed=3, **{**TRAINING, **changed}
    )
    sets = {}
    if (out / "packs" / "eval").exists():
        sets["eval_dataset"] = PackedDataset.from_store(out / "packs" / "eval")
    trainer = Trainer(
        model, args, train_dataset=data, data_collator=PackCollator(model=model), **sets
    )
    PackingCallback(data).attach(trainer)
    trainer.train()
    if sets:
        trainer.evaluate()
    return trainer.state.log_history


def values(log, name):
    return [entry[name] for entry in log if name in entry]


def loaded(world):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(world / "model", dtype=torch.float32)


@pytest.fixture
def framework(world, monkeypatch):
    """A small framework with LLaMA-Factory's names, whose Trainers are kept in `trainers`."""
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    processor = stock_processor(tokenizer, 28 * 28 * 256)
    made = {}

    class DataArguments(types.SimpleNamespace):
        cutoff_len = 2048
        dataset = eval_dataset = max_samples = None
        val_size = 0.0
        eval_on_each_dataset = train_on_prompt = mask_history = False
        preprocessing_num_workers = 1

    class FinetuningArguments:
        stage = "sft"
        freeze_vision_tower = freeze_multi_modal_projector = True
        freeze_language_model = False

    class CustomSeq2SeqTrainer(Trainer):
        def __init__(self, *, processor, tokenizer, **kwargs):
            super().__init__(**kwargs)
            self.model_accepts_loss_kwargs = False
            assert processor is None
            made["trainer"], made["saved"] = self, tokenizer

    class Template:
        def encode_multiturn(self, tokenizer, messages):
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            return [(tokenizer(text + made.get("more", ""))["input_ids"], [])]

    def refused(*args, **kwargs):
        raise AssertionError("was not replaced")

    def run_exp(args, callbacks):
        named = {name: args.get(name) for name in ("dataset", "eval_dataset")}
        lists = {name: value.split(",") for name, value in named.items() if value}
        given = {name: args[name] for name in ("val_size", "max_samples") if name in args}
        data_args = DataArguments(
            dataset_dir=args.get("dataset_dir"), template=args["template"], **lists, **given
        )
        names = ("output_dir", "gradient_accumulation_steps", "seed", *TRAINING)
        training_args = TrainingArguments(**{name: args[name] for name in names})
        name = args["model_name_or_path"]
        model_arguments = model_args(model_name_or_path=name, image_max_pixels=BUDGET)
        sets = workflow.get_dataset(
            Template(), model_arguments, data_args, training_args, stage="sft",
            tokenizer=tokenizer, processor=processor,
        )  # fmt: skip
        model = workflow.load_model(tokenizer, model_arguments, None, True)
        trainer = workflow.CustomSeq2SeqTrainer(
            model=model, args=training_args, processor=processor, tokenizer=tokenizer,
            callbacks=callbacks,
            data_collator=workflow.SFTDataCollatorWith4DAttentionMask(model=model), **sets,
        )  # fmt: skip
        trainer.train()
        if "eval_dataset" in sets:
            trainer.evaluate()

    tree = {
        "llamafactory": {},
        "llamafactory.hparams": {"FinetuningArguments": FinetuningArguments},
        "llamafactory.hparams.parser": {"read_args": refused},
        "llamafactory.train": {},
        "llamafactory.train.tuner": {"run_exp": run_exp},
        "llamafactory.train.sft": {},
        "llamafactory.train.sft.workflow": {
            "get_dataset": refused,
            "load_model": lambda *args: loaded(world),
            "SFTDataCollatorWith4DAttentionMask": refused,
            "CustomSeq2SeqTrainer": CustomSeq2SeqTrainer,
        },
        "llamafactory.extras": {},
        "llamafactory.extras.misc": {"is_env_enabled": lambda name: name == made.get("enabled")},
        "llamafactory.model": {},
        "llamafactory.model.model_utils": {},
        "llamafactory.model.model_utils.checkpointing": {
            "get_custom_gradient_checkpointing_func": lambda checkpoint: checkpoint
        },
    }
    for name, content in tree.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    workflow = sys.modules["llamafactory.train.sft.workflow"]
    return made


def test_a_run_equals_a_stock_trainer(world, framework, tmp_path, capsys):
    """Losses, gradient norms and eval_loss, with rows held out and packs of different numbers of answers."""
    seen = TrainerCallback()
    llamafactory.run(yaml_of(world, tmp_path, val_size=3, max_samples=12), [seen])
    assert seen in framework["trainer"].callback_handler.callbacks
    log = framework["trainer"].state.log_history
    expected = stock_log(world, tmp_path, loaded(world))
    for name in ("loss", "grad_norm", "eval_loss"):
        assert values(log, name) == pytest.approx(values(expected, name), rel=1e-6)
    assert len(values(log, "loss")) > 2 and len(values(log, "eval_loss")) == 1
    assert "12 rows" not in capsys.readouterr().out  # 3 of them are held out
    assert PackedDataset.from_store(tmp_path / "packs" / "train").capacity == 256
    assert framework["saved"].image_processor.size["longest_edge"] == 28 * 28 * 256


def test_the_processor_is_saved_with_the_budgets_trained_on(small_set, tmp_path):
    class Theirs:
        def save_pretrained(self, folder, push_to_hub=True):
            assert not push_to_hub
            shutil.copytree(small_set / "tokenizer", folder, dirs_exist_ok=True)
            return ["a file"]

    vision = Encoder.from_folder(small_set / "tokenizer").vision
    vision = dataclasses.replace(vision, max_pixels=BUDGET)
    processor = llamafactory._with_budgets(Theirs(), vision)
    assert processor.save_pretrained(str(tmp_path), push_to_hub=False) == ["a file"]
    assert Encoder.from_folder(tmp_path).vision == vision


def test_the_second_run_reuses_packs_and_a_store_trains_alike(world, framework, tmp_path, capsys):
    llamafactory.run(yaml_of(world, tmp_path))
    first = values(framework["trainer"].state.log_history, "loss")
    capsys.readouterr()
    llamafactory.run(yaml_of(world, tmp_path))
    assert "nothing encoded anew" in capsys.readouterr().out
    options = yaml_of(world, tmp_path, packed=str(tmp_path / "packs" / "train"))
    for name in ("dataset", "dataset_dir", "image_max_pixels"):
        del options[name]
    llamafactory.run(options)
    assert values(framework["trainer"].state.log_history, "loss") == first
    split = tmp_path / "split"
    words = ["pack", world / "train.json", "--tokenizer", world / "model", "--capacity", 256]
    assert (
        main(
            [
                *map(str, words),
                "--val-size",
                "3",
                "--quiet",
                "--on-overflow",
                "drop",
                "--out",
                str(split),
            ]
        )
        == 0
    )
    llamafactory.run({**options, "packed": str(split), "eval_packed": f"{split}:val"})
    held_out = PackedDataset.from_store(split, split="val")
    evaluated = framework["trainer"].eval_dataset
    assert [s.row for s in evaluated[0].samples] == [s.row for s in held_out[0].samples]
    assert len(values(framework["trainer"].state.log_history, "eval_loss")) == 1
    written = re.escape(f"write packed: {split} and eval_packed: {split}:val")
    with pytest.raises(ValueError, match=f"^packed: .* held out for evaluation; {written}$"):
        llamafactory.run({**options, "packed": f"{split}:val"})
    with pytest.raises(ValueError, match="^cutoff_len: 100 does not apply: the packs of"):
        llamafactory.run({**options, "cutoff_len": 100})


@pytest.mark.parametrize(("num_samples", "used"), [(5, 5), (40, 14)])
def test_num_samples_leaves_rows_and_repeats_none(
    world, framework, tmp_path, caplog, num_samples, used
):
    info = json.loads((world / "dataset_info.json").read_text())
    info["charts"]["num_samples"] = num_samples
    info = {
        name: {**entry, "file_name": str(world / entry["file_name"])}
        for name, entry in info.items()
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    changed = {"dataset_dir": str(tmp_path), "media_dir": str(world), "num_train_epochs": 1}
    llamafactory.run(yaml_of(world, tmp_path, **changed))
    data = PackedDataset.from_store(tmp_path / "packs" / "train")
    rows = [data.samples[n].row for n in data.plan.sample_index.tolist()]
    assert len(rows) == len(set(rows)) == used
    said = "num_samples of train.json is 40, but 14 samples are there; each is used once per epoch"
    assert (said in caplog.text) == (used < num_samples)


def test_layers_are_checkpointed_as_bound_methods():
    """As before transformers 5.23, also where it passes a function and the layer."""

    class Layer:
        def forward(self, x, scale, shift=0):
            return self, x * scale + shift

    def theirs(checkpoint):
        def of_layer(function, *args):
            return checkpoint(function.func.__self__, function(*args))

        return of_layer

    run = llamafactory._Run(taken_options({}, FROZEN), {})
    of_layer = run.checkpointing(theirs)(lambda *results: results)
    layer = Layer()
    for function in (partial(Layer.forward, layer, shift=1), partial(layer.forward, shift=1)):
        assert of_layer(function, 2, 3) == (layer, (layer, 7))


def test_errors_restore_the_names(world, framework, tmp_path):
    workflow = sys.modules["llamafactory.train.sft.workflow"]
    before = dict(vars(workflow))
    with pytest.raises(ValueError, match="no dataset 'absent'"):
        llamafactory.run(yaml_of(world, tmp_path, dataset="absent"))
    framework["enabled"] = "USE_RAY"
    with pytest.raises(ValueError, match="^USE_RAY=1 does not apply: it starts another trainer"):
        llamafactory.run(yaml_of(world, tmp_path))
    del framework["enabled"]
    framework["more"] = "?"
    with pytest.raises(ValueError, match="^template: qwen2_vl writes .*; choose a template that"):
        llamafactory.run(yaml_of(world, tmp_path))
    assert vars(workflow) == before


@pytest.fixture
def any_version(monkeypatch):
    """As docs/llama_factory.md says, for imports of LLaMA-Factory."""
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")


@needs_llamafactory
@pytest.mark.usefixtures("any_version")
def test_every_name_of_llamafactory_is_there():
    import importlib

    for module, names in llamafactory.USED.items():
        found = importlib.import_module(f"llamafactory.{module}")
        assert [name for name in names if not hasattr(found, name)] == []
    for modules in llamafactory.REPLACED.values():
        for module, names in modules.items():
            found = importlib.import_module(f"llamafactory.{module}")
            assert [name for name in names if not hasattr(found, name)] == []


@needs_llamafactory
@pytest.mark.usefixtures("any_version")
def test_every_option_of_llamafactorys_data_is_known():
    """A new one must be put into a table, and what is in one must exist."""
    from dataclasses import fields

    from llamafactory.hparams import DataArguments, FinetuningArguments, ModelArguments
    from llamafactory.hparams.model_args import ProcessorArguments
    from llamafactory.hparams.training_args import TrainingArguments as TheirArguments

    known = {*REFUSED, *OF_ROWS, *ALWAYS}
    of_data = {one.name for kind in (DataArguments, ProcessorArguments) for one in fields(kind)}
    assert of_data - known == set()
    others = {
        one.name
        for kind in (FinetuningArguments, ModelArguments, TheirArguments)
        for one in fields(kind)
    }
    assert known - of_data - others == set()
    defaults = {}
    for kind in (DataArguments, FinetuningArguments, ModelArguments):
        defaults |= {one.name: one.default for one in fields(kind)}
    for name, (accepted, _, _) in REFUSED.items():  # a YAML may name the default
        if accepted and name in defaults and defaults[name] is not None:
            assert defaults[name] in accepted, name


@pytest.fixture
def run_llamafactory(monkeypatch, any_version):
    """Runs a YAML in this process; returns the log of its Trainer, and the trainer."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    kept = []
    attach = PackingCallback.attach

    def keep(self, trainer):
        kept.append(trainer)
        return attach(self, trainer)

    monkeypatch.setattr(PackingCallback, "attach", keep)

    def run(options):
        kept.clear()
        llamafactory.run(options)
        return kept[0]

    return run


@needs_llamafactory
@pytest.mark.parametrize("checkpointing", [True, False])
def test_full_training_equals_a_stock_trainer(world, run_llamafactory, tmp_path, checkpointing):
    """LLaMA-Factory checkpoints activations unless it is told not to; its model, freezing and Trainer are kept."""
    options = yaml_of(world, tmp_path, disable_gradient_checkpointing=not checkpointing)
    trainer = run_llamafactory({**options, "val_size": 3, "do_eval": True})
    log, expected = trainer.state.log_history, stock_log(world, tmp_path, loaded(world))
    for name in ("loss", "grad_norm", "eval_loss"):
        assert values(log, name) == pytest.approx(values(expected, name), rel=1e-5)
    assert len(values(log, "loss")) > 2
    assert all(weight.requires_grad for weight in trainer.model.parameters())


@needs_llamafactory
def test_lora_with_a_frozen_tower_and_sets_to_evaluate(world, run_llamafactory, tmp_path):
    """Only adapters of the text model change; each evaluation set has its eval_loss; the folder loads with stock
    classes and has the budgets that were trained on."""
    changed = {"finetuning_type": "lora", "lora_rank": 4, "freeze_vision_tower": True}
    changed |= {"freeze_multi_modal_projector": True, "eval_strategy": "epoch", "bf16": True}
    changed |= {"eval_dataset": "charts, others", "eval_on_each_dataset": True}
    trainer = run_llamafactory(yaml_of(world, tmp_path, **changed))
    log = trainer.state.log_history
    losses = values(log, "eval_charts_loss")
    assert len(losses) == len(values(log, "eval_others_loss")) == 3  # two epochs, and the end
    assert losses[0] > losses[1] == losses[2]
    trained = [name for name, w in trainer.model.named_parameters() if w.requires_grad]
    assert trained and all(".lora_" in name and "visual" not in name for name in trained)
    planning = PackedDataset.from_store(tmp_path / "packs" / "train").samples.about.planning
    assert planning.frozen == ("vision", "merger")
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert Encoder.from_folder(tmp_path, loaded(world).config).vision.max_pixels == BUDGET


@needs_llamafactory
def test_documents(world, run_llamafactory, tmp_path):
    """stage: pt, with images in place, cut into packs."""
    options = yaml_of(world, tmp_path, stage="pt", dataset="text", cutoff_len=64)
    del options["template"]
    log = run_llamafactory({**options, "image_max_pixels": 28 * 28 * 9}).state.log_history
    expected = stock_log(world, tmp_path, loaded(world))
    assert values(log, "loss") == pytest.approx(values(expected, "loss"), rel=1e-5)
    data = PackedDataset.from_store(tmp_path / "packs" / "train")
    assert len(data.samples) > 12 and data.samples.num_patches.any()


@needs_llamafactory
def test_rows_held_out_are_llamafactorys(world, run_llamafactory, tmp_path):
    from llamafactory.data.data_utils import split_dataset

    datasets = pytest.importorskip("datasets")
    trainer = run_llamafactory(yaml_of(world, tmp_path, val_size=0.3, max_samples=10))
    args = types.SimpleNamespace(val_size=0.3, streaming=False)
    train, held_out = split_dataset(datasets.Dataset.from_dict({"n": range(10)}), None, args, 3)
    for part, theirs in (("train", train["train"]), ("eval", held_out["validation"])):
        samples = PackedDataset.from_store(tmp_path / "packs" / part).samples
        assert sorted(one.row for one in samples) == sorted(theirs["n"])
    assert trainer.eval_dataset is not None


@needs_llamafactory
def test_a_resumed_run_equals_an_uninterrupted_one(world, run_llamafactory, tmp_path):
    """LLaMA-Factory resumes by itself if `output_dir` has a checkpoint."""
    whole = run_llamafactory(yaml_of(world, tmp_path / "whole", max_steps=3))
    saving = {"save_strategy": "steps", "save_steps": 1}
    run_llamafactory(yaml_of(world, tmp_path / "parts", max_steps=1, **saving))
    parts = run_llamafactory(yaml_of(world, tmp_path / "parts", max_steps=3, **saving))
    assert (parts.state.global_step, len(values(whole.state.log_history, "loss"))) == (3, 3)
    for name in ("loss", "grad_norm"):
        assert values(parts.state.log_history, name) == values(whole.state.log_history, name)
    with pytest.raises(ValueError, match="^the run has finished its 3 steps"):
        run_llamafactory(yaml_of(world, tmp_path / "parts", max_steps=3, **saving))
    assert Encoder.from_folder(tmp_path / "parts" / "checkpoint-1").vision.max_pixels == BUDGET


@needs_llamafactory
@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"template": "llama3"}, "^template: llama3 writes .*, and the tokenizer's chat template"),
        ({"dataset_dir": "ONLINE"}, "^dataset_dir: ONLINE is not a folder; download"),
        ({"stage": "dpo"}, "^stage: dpo does not apply: mmpack packs conversations"),
        ({"compute_accuracy": True}, "^compute_accuracy: true does not apply: "),
    ],
)
def test_what_is_refused_restores_the_names(world, run_llamafactory, tmp_path, changed, error):
    from llamafactory.train.pt import workflow as pretraining
    from llamafactory.train.sft import workflow

    before = [dict(vars(one)) for one in (workflow, pretraining)]
    with pytest.raises(ValueError, match=error):
        run_llamafactory(yaml_of(world, tmp_path, **changed))
    assert [vars(one) for one in (workflow, pretraining)] == before


@needs_llamafactory
def test_the_command_trains_from_a_yaml(world, tmp_path, monkeypatch, capsys):
    """`python -m mmpack.integrations.llamafactory`, with an option on the command line, and without do_train."""
    import yaml

    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    file = tmp_path / "train.yaml"
    options = yaml_of(world, tmp_path / "run")
    del options["do_train"]
    file.write_text(yaml.safe_dump(options))
    assert llamafactory.main([str(file), "num_train_epochs=1"]) == 0
    assert (tmp_path / "run" / "model.safetensors").exists()
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["epoch"] == 1 and "pack/utilization" in state["log_history"][0]
    assert llamafactory.main([str(file), "streaming=true"]) == 1
    assert "mmpack: streaming: true does not apply: packs are planned" in capsys.readouterr().err


@needs_llamafactory
def test_the_page_runs_literally(world, tmp_path):
    """docs/llama_factory.md, with a tiny model in place of the published one."""
    page = (Path(__file__).parent.parent / "docs" / "llama_factory.md").read_text(encoding="utf-8")
    options = page.partition("```yaml\n")[2].partition("```")[0]
    commands = page.partition("```bash\n")[2].partition("```")[0]
    assert options.count("Qwen/Qwen2-VL-2B-Instruct") == 1 and "llamafactory" in commands
    options = options.replace("Qwen/Qwen2-VL-2B-Instruct", str(world / "model"))
    (tmp_path / "train.yaml").write_text(options)
    (tmp_path / "demo_data").symlink_to(world)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(["bash", "-e", "-c", commands], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert (tmp_path / "run-full" / "model.safetensors").exists()

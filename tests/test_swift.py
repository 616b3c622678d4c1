"""ms-swift's `swift sft` on packs, in an environment of its own (benchmarks/environments/swift.sh): it trains like
a stock Trainer, everything replaced is restored, and options that would do nothing are refused. CI does not have
ms-swift."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import QUIET
from test_docs import blocks_of
from transformers import AutoConfig, AutoProcessor, Trainer, TrainerCallback, TrainingArguments

from mmpack import Encoder, PackedDataset
from mmpack.hf import PackCollator, PackingCallback, patch_model

pytest.importorskip("swift.pipelines")
plugin = pytest.importorskip("mmpack.integrations.swift", exc_type=ImportError)

from swift.arguments import PretrainArguments  # noqa: E402
from swift.arguments.base_args.data_args import DataArguments  # noqa: E402
from swift.arguments.base_args.template_args import TemplateArguments  # noqa: E402
from swift.callbacks import callbacks_map  # noqa: E402
from swift.pipelines import sft_main  # noqa: E402
from swift.pipelines.train.sft import SftArguments, SwiftSft  # noqa: E402
from swift.template import Template  # noqa: E402
from swift.trainers.trainer_factory import TrainerFactory  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SAME = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "adam_beta2": 0.999,
}
SAME |= {"max_steps": 3, "logging_steps": 1}


class Keep(TrainerCallback):
    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.log, self.model = state.log_history, model


def pack(small_set, out, *more):
    from mmpack.cli.main import main

    words = [small_set / "train.json", "--tokenizer", small_set / "tokenizer", "--capacity", 2048]
    assert main(["pack", *map(str, words), "--quiet", "--out", str(out), *more]) == 0


@pytest.fixture(scope="module")
def setting(small_set, tmp_path_factory):
    """A folder with the packed rows and a model's files."""
    folder = tmp_path_factory.mktemp("swift")
    from mmpack.cli.demo import tiny_model

    torch.manual_seed(0)
    shutil.copytree(small_set / "packed", folder / "packed")
    shutil.copytree(small_set / "packed", folder / "packed_val")
    pack(small_set, folder / "split", "--val-size", "4")
    shutil.copytree(small_set / "tokenizer", folder / "model")
    tiny_model(AutoConfig.from_pretrained(small_set / "config.json")).save_pretrained(
        folder / "model"
    )
    return folder


def swift(setting, where, **options):
    """(log, model) of a run of `sft_main` with the plugin."""
    keep = Keep()
    callbacks_map["keep"] = lambda args, trainer: keep
    words = {
        "model": setting / "model", "model_type": "qwen2_vl", "template": "qwen2_vl",
        "dataset": setting / "packed", "torch_dtype": "float32", "fp16": False, "bf16": False,
        "check_model": False, "add_version": False, "report_to": "none", "save_strategy": "no",
        "dataloader_num_workers": 0, "gradient_accumulation_steps": 1, "callbacks": "keep",
        "output_dir": setting / where, **SAME, **options,
    }  # fmt: skip
    with plugin.packs():
        sft_main(
            [
                str(word)
                for name, value in words.items()
                for word in (f"--{name}", *(value if isinstance(value, list) else [value]))
            ]
        )
    return keep.log, keep.model


def stock(setting, model=None, **options):
    """The log of a stock Trainer on the same packs."""
    from transformers import AutoModelForImageTextToText

    model = model or AutoModelForImageTextToText.from_pretrained(setting / "model")
    data = PackedDataset.from_store(setting / "packed")
    args = TrainingArguments(str(setting / "stock"), **{**QUIET, **SAME, **options})
    args.max_epochs = None  # ms-swift's callbacks read it from every Trainer
    trainer = Trainer(
        patch_model(model), args, train_dataset=data, data_collator=PackCollator(model=model)
    )
    PackingCallback(data).attach(trainer)
    trainer.train()
    return trainer


def steps(log):
    return [[entry["loss"], entry["grad_norm"]] for entry in log if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_full_training_equals_a_stock_trainers(setting, checkpointing):
    """With accumulation over packs of unequal numbers of supervised tokens."""
    options = {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": 2}
    full = {"tuner_type": "full", "freeze_vit": False, "freeze_aligner": False}
    log, model = swift(setting, f"full{checkpointing}", **options, **full)
    theirs = stock(setting, gradient_accumulation_steps=2)
    np.testing.assert_allclose(steps(log), steps(theirs.state.log_history), rtol=2e-4)
    assert any("pack/utilization" in entry for entry in log)
    for (name, a), b in zip(model.state_dict().items(), theirs.model.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_lora_trains_the_adapters(setting):
    """ms-swift's default: LoRA on the text model, gradient checkpointing."""
    log, model = swift(setting, "lora", lora_rank=4)
    trained = [name for name, one in model.named_parameters() if one.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    theirs = stock(setting, max_steps=1)
    ours, stocks = steps(log), steps(theirs.state.log_history)
    assert ours[0][0] == pytest.approx(stocks[0][0], rel=1e-4)  # adapters begin at 0
    assert ours[0][1] > 0
    second = [one for name, one in model.named_parameters() if "lora_B" in name]
    assert all(one.abs().max() > 0 for one in second)  # of every layer, also with checkpointing


def test_sets_to_evaluate(setting):
    """One, and several, whose losses have the folders' names."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "tuner_type": "full"}
    options |= {"freeze_vit": False, "learning_rate": 0.0}
    theirs = stock(setting, max_steps=1, learning_rate=0.0)
    expected = theirs.evaluate(PackedDataset.from_store(setting / "packed"))["eval_loss"]
    sets = {"eval_loss": ["packed"], "eval_packed_val_loss": ["packed", "packed_val"]}
    both = [setting / one for one in sets["eval_packed_val_loss"]]
    with pytest.raises(ValueError, match="pass --metric_for_best_model packed_loss"):
        swift(setting, "unknown", val_dataset=both, **options)
    for name, folders in sets.items():
        options["metric_for_best_model"] = name
        log, _ = swift(setting, name, val_dataset=[setting / one for one in folders], **options)
        assert [entry[name] for entry in log if name in entry][0] == pytest.approx(expected, 1e-4)


def test_rows_held_out(setting):
    """Of `mmpack pack --val-size`: FOLDER:val, alone and beside another set; they are not trained on."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "tuner_type": "full"}
    options |= {"freeze_vit": False, "learning_rate": 0.0, "dataset": setting / "split"}
    held_out = f"{setting / 'split'}:val"
    theirs = stock(setting, max_steps=1, learning_rate=0.0)
    data = PackedDataset.from_store(setting / "split", split="val")
    expected = pytest.approx(theirs.evaluate(data)["eval_loss"], 1e-4)
    log, _ = swift(setting, "held_out", val_dataset=held_out, **options)
    assert [entry["eval_loss"] for entry in log if "eval_loss" in entry][0] == expected
    options |= {"metric_for_best_model": "eval_split_val_loss"}
    log, _ = swift(setting, "two", val_dataset=[setting / "split", held_out], **options)
    name = "eval_split_val_loss"
    assert [entry[name] for entry in log if name in entry][0] == expected
    with pytest.raises(
        ValueError, match="split:val are the rows held out for evaluation; train on"
    ):
        swift(setting, "trained", **{**options, "dataset": held_out})


def test_a_resumed_run_is_the_run(setting):
    options = {"save_strategy": "steps", "save_steps": 2, "tuner_type": "full", "freeze_vit": False}
    whole, first = swift(setting, "whole", **options)
    half = setting / "whole" / "checkpoint-2"
    resumed, second = swift(setting, "resumed", resume_from_checkpoint=half, **options)
    assert steps(resumed)[-1] == pytest.approx(steps(whole)[-1], rel=1e-5)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_the_processor_is_saved_with_the_budgets_trained_on(small_set, setting, tuner):
    """In each file that holds one; ms-swift saves the model's, and for adapters none."""
    if not (setting / "small_images").exists():
        pack(small_set, setting / "small_images", "--max-pixels", str(56 * 56))
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "tuner_type": tuner}
    swift(setting, f"saved_{tuner}", dataset=setting / "small_images", **options)
    saved = setting / f"saved_{tuner}" / "checkpoint-1"
    vision = PackedDataset.from_store(setting / "small_images").vision
    assert vision.max_pixels == 56 * 56 != Encoder.from_folder(setting / "model").vision.max_pixels
    assert (
        Encoder.from_folder(saved, AutoConfig.from_pretrained(setting / "model")).vision == vision
    )
    processor = AutoProcessor.from_pretrained(saved)
    assert processor.image_processor.size["longest_edge"] == vision.max_pixels
    assert processor.video_processor.size["longest_edge"] == vision.video.max_pixels
    texts = [json.loads(path.read_text()) for path in saved.glob("*processor_config.json")]
    images = [
        text.get("image_processor", text) for text in texts if "video_processor_type" not in text
    ]
    assert images and all(
        {one["size"]["longest_edge"], one.get("max_pixels", 56 * 56)} == {56 * 56} for one in images
    )


def test_names_are_replaced_and_restored():
    """Also after an error; a version that lacks one is refused."""
    before = SwiftSft._prepare_dataset, TrainerFactory.TRAINER_MAPPING["causal_lm"]
    tables = TrainerFactory.TRAINER_MAPPING
    with pytest.raises(KeyError):
        with plugin.packs():
            name = TrainerFactory.TRAINER_MAPPING["causal_lm"]
            assert name == "mmpack.integrations.swift.PackedTrainer"
            assert SwiftSft._prepare_dataset is not before[0]
            raise KeyError
    assert before == (SwiftSft._prepare_dataset, TrainerFactory.TRAINER_MAPPING["causal_lm"])
    assert TrainerFactory.TRAINER_MAPPING is tables


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (SwiftSft, "_prepare_dataset", "SwiftSft has no _prepare_dataset, which mmpack replaces"),
        (TrainerFactory, "TRAINER_MAPPING", "TrainerFactory has no TRAINER_MAPPING, which"),
        (TrainerFactory.TRAINER_MAPPING, "causal_lm", "TRAINER_MAPPING has no causal_lm, which"),
    ],
)
def test_a_version_that_lacks_a_name_is_refused(monkeypatch, owner, name, error):
    change = monkeypatch.delitem if isinstance(owner, dict) else monkeypatch.delattr
    change(owner, name)
    before = vars(SwiftSft).get("_prepare_dataset")
    with pytest.raises(ValueError, match=error), plugin.packs():
        pass
    assert vars(SwiftSft).get("_prepare_dataset") is before


@pytest.mark.parametrize("name", [*plugin.REPLACED, *plugin.OVERRIDDEN])
def test_ms_swift_still_has(name):
    there = {"SwiftSft": SwiftSft, "TrainerFactory": TrainerFactory, "template": Template}
    owner, _, rest = name.rpartition(".")
    owner = there[owner] if owner else plugin.PackedTrainer.__base__
    assert hasattr(owner, rest.partition("[")[0])
    if "[" in rest:
        assert "causal_lm" in owner.TRAINER_MAPPING


def arguments(**given):
    """Arguments of `swift sft` with their defaults."""
    values = {
        one.name: one.default if one.default_factory is MISSING else one.default_factory()
        for one in fields(SftArguments)
    }
    values |= {"task_type": "causal_lm", "model_info": SimpleNamespace(max_model_len=32768)}
    values |= {"template_meta": None}
    found = object.__new__(SftArguments)
    vars(found).update(values | given)
    return found


VALUES = {
    "columns": {"a": "b"},
    "lazy_tokenize": False,
    "loss_scale": "all",
    "acc_strategy": "seq",
    "use_chat_template": False,
    "router_aux_loss_coef": 0.01,
}


@pytest.mark.parametrize("name", plugin.REFUSED_OPTIONS)
def test_options_are_refused(name):
    default = getattr(arguments(), name)
    value = VALUES.get(name, not default if isinstance(default, bool) else "2")
    plugin.check_arguments(arguments(truncation_strategy="delete", columns={}), 2048)
    with pytest.raises(ValueError, match=rf"^--{name} .* does not apply: .*; .+"):
        plugin.check_arguments(arguments(**{name: value}), 2048)


def test_every_option_of_data_and_text_is_in_a_table():
    names = {one.name for kind in (DataArguments, TemplateArguments) for one in fields(kind)}
    names |= {one.name for one in fields(SftArguments) if one.name.startswith("packing")}
    assert names <= plugin.REFUSED_OPTIONS.keys() | set(plugin.APPLIED)
    assert not plugin.REFUSED_OPTIONS.keys() & set(plugin.APPLIED)


@pytest.mark.parametrize("template", ["qwen3_5", "qwen2_vl"])
@pytest.mark.parametrize("kind", [SftArguments, PretrainArguments])
def test_what_ms_swift_fills_in_is_accepted(setting, template, kind):
    """Real arguments; to `loss_scale` of a hybrid thinking template ms-swift appends."""
    given = {"model": str(setting / "model"), "model_type": "qwen2_vl", "template": template}
    given |= {"dataset": [str(setting / "packed")], "check_model": False, "add_version": False}
    given |= {"output_dir": str(setting / "arguments"), "fp16": False, "bf16": False}
    given |= {"torch_dtype": "float32", "report_to": ["none"]}
    found = kind(**given)
    assert found.loss_scale.endswith("+ignore_empty_think") == (template == "qwen3_5")
    plugin.check_arguments(found, 2048)
    with pytest.raises(ValueError, match="^--loss_scale last_round does not apply"):
        plugin.check_arguments(kind(**given, loss_scale="last_round"), 2048)
    other = kind is PretrainArguments
    with pytest.raises(ValueError, match=f"^--use_chat_template {other} does not apply"):
        plugin.check_arguments(kind(**given, use_chat_template=other), 2048)
    if template == "qwen2_vl":
        with pytest.raises(ValueError, match="^--loss_scale .*ignore_empty_think does not apply"):
            scale = f"{found.loss_scale}+ignore_empty_think"
            plugin.check_arguments(kind(**given, loss_scale=scale), 2048)


def test_other_refusals(setting, tmp_path):
    for length in (None, 32768, 2048):
        plugin.check_arguments(arguments(max_length=length), 2048)
    with pytest.raises(ValueError, match="--max_length 99 does not apply: the packs have up to 2,"):
        plugin.check_arguments(arguments(max_length=99), 2048)
    with pytest.raises(ValueError, match="mmpack trains swift sft and swift pt, not dpo"):
        plugin.check_arguments(arguments(rlhf_type="dpo"), 2048)
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([]))
    with pytest.raises(ValueError, match=r"--dataset .*rows.json is not a folder of mmpack pack"):
        swift(setting, "rows", dataset=rows)


def test_the_pages_plugin_installs():
    """The two lines that the page writes into packs.py."""
    (block,) = [one for one in blocks_of(ROOT / "docs" / "ms_swift.md") if one.language == "bash"]
    code = block.text.partition("printf '")[2].partition("'")[0].replace("\\n", "\n")
    before = SwiftSft._prepare_dataset, TrainerFactory.TRAINER_MAPPING["causal_lm"]
    try:
        exec(code, {})
        exec(code, {})
        assert TrainerFactory.TRAINER_MAPPING["causal_lm"].endswith("swift.PackedTrainer")
    finally:
        plugin._for_good.close()
    assert before == (SwiftSft._prepare_dataset, TrainerFactory.TRAINER_MAPPING["causal_lm"])


def test_the_page_is_followed(setting, small_set, tmp_path):
    """Its commands, before and after, in a shell; a tiny model's folder stands for the published one's name, and a
    few options say what ms-swift knows of that, and that this is a CPU."""
    (block,) = [one for one in blocks_of(ROOT / "docs" / "ms_swift.md") if one.language == "bash"]
    rows = json.loads((small_set / "train.json").read_text())
    roles = {"human": "user", "gpt": "assistant"}
    lines = [
        {
            "messages": [
                {"role": roles[t["from"]], "content": t["value"]} for t in row["conversations"]
            ],
            "images": [str(small_set / name) for name in row["images"]],
        }
        for row in rows
    ]
    for name in ("train", "val"):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    shutil.copytree(setting / "model", tmp_path / "model")
    known = "--model_type qwen2_vl --template qwen2_vl --torch_dtype float32 --fp16 false --check_model false"
    name = "Qwen/Qwen2-VL-2B-Instruct"
    assert block.text.count(f"--model {name}") == 2 and block.text.count(f"--tokenizer {name}") == 2
    script = block.text.replace(f"--tokenizer {name}", f"--media-dir {small_set} --tokenizer model")
    script = script.replace(
        f"--model {name}", f"--model model {known} --max_steps 2 --eval_steps 2 --logging_steps 1"
    )
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {**os.environ, "PATH": os.pathsep.join(paths)}
    done = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    runs = sorted((tmp_path / "run").iterdir())
    logs = [(one / "logging.jsonl").read_text() for one in runs]
    assert len(logs) == 2
    assert [("pack/utilization" in log) for log in logs] == [False, True]
    assert all("eval_loss" in log for log in logs)

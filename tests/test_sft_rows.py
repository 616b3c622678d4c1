"""docs/sft_trainer.md as it is: PackedSFTTrainer on the demo's packed rows, and the README's rows, `conversations`
and images as paths, in TRL's SFTTrainer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from builders import stock_processor, tiny_config, tiny_model
from test_docs import blocks_of, commands_of
from transformers import AutoConfig, AutoTokenizer

from mmpack import Encoder, PackedDataset
from mmpack.cli.main import main
from mmpack.hf import PackCollator

PAGE = Path(__file__).parent.parent / "docs" / "sft_trainer.md"


def test_rows_with_paths_need_a_folder_that_the_error_names(small_set, tmp_path, monkeypatch):
    """Images of rows in memory are in the current folder, or where the encoder says."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    path = str(small_set / "train.json")
    rows = list(datasets.load_dataset("json", data_files=path, split="train"))[:3]
    encoder = Encoder.from_folder(small_set / "tokenizer")
    with pytest.raises(ValueError, match=r"\(processor, media_dir=FOLDER\)\)$"):
        PackCollator(encoder)(rows)
    batch = PackCollator(Encoder.from_folder(small_set / "tokenizer", media_dir=small_set))(rows)
    assert len(batch["image_grid_thw"]) == sum(len(row["images"]) for row in rows) > 0


def test_packs_in_the_pages_trainer(small_set, tmp_path, monkeypatch, capsys):
    """Literally, on a CPU and with a tiny model's folder in place of a published one."""
    pytest.importorskip("mmpack.integrations.trl", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_set, tmp_path / "demo_data")
    shutil.copytree(small_set / "tokenizer", tmp_path / "model")
    config = AutoConfig.from_pretrained(small_set / "config.json")
    tiny_model(config).save_pretrained(tmp_path / "model")
    pack, script, _ = blocks_of(PAGE)
    ((_, *words),) = commands_of(pack.text)
    assert main(words) == 0
    code = script.text.replace('"MODEL"', '"model"')
    code = code.replace("bf16=True", "bf16=False, use_cpu=True, report_to='none'")
    namespace = {}
    exec(compile(code.replace("trainer.train()", ""), "sft_trainer.md", "exec"), namespace)
    before = namespace["trainer"].evaluate()["eval_charts_loss"]
    namespace["trainer"].train()
    logged = [entry["loss"] for entry in namespace["trainer"].state.log_history if "loss" in entry]
    assert len(logged) == 2
    assert logged[0] == pytest.approx(before, rel=0.2)
    assert "eval_charts_mean_token_accuracy" in capsys.readouterr().out
    namespace["trainer"].save_model("saved")
    budget = json.loads(Path("saved/preprocessor_config.json").read_text())["size"]
    packed_with = PackedDataset.from_store("packed").vision
    assert budget["longest_edge"] == packed_with.max_pixels
    assert AutoTokenizer.from_pretrained("saved").chat_template


def test_the_page_runs_on_the_readmes_rows(small_set, tmp_path, monkeypatch):
    """Literally, with a tiny model and a processor made from parts in place of the published ones, on a CPU."""
    trl = pytest.importorskip("trl")
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    shutil.copytree(small_set / "charts", tmp_path / "data" / "charts")
    rows = json.loads((small_set / "train.json").read_text())[:4]
    (tmp_path / "data" / "train.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(small_set / "tokenizer")
    processor = stock_processor(tokenizer, 28 * 28 * 16)
    encoder = Encoder.from_processor(processor, media_dir="data")
    model = tiny_model(tiny_config(len(tokenizer), vision=encoder.vision))
    trainers = []

    def train(trainer):
        with torch.no_grad():
            batch = PackCollator(encoder)(list(trainer.train_dataset))
            trainers.append((trainer, model(**batch).loss.item()))
        trainer.args.logging_steps = trainer.state.logging_steps = 1
        return stock_train(trainer)

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda name: processor)
    name = "transformers.Qwen2VLForConditionalGeneration.from_pretrained"
    monkeypatch.setattr(name, lambda name: model)
    stock_train = trl.SFTTrainer.train
    monkeypatch.setattr("trl.SFTTrainer.train", train)
    code = blocks_of(PAGE)[-1].text
    assert code.count("bf16=True") == 1
    code = code.replace("bf16=True", "use_cpu=True, report_to='none', save_strategy='no'")
    exec(compile(code, "sft_trainer.md", "exec"), {})
    ((trainer, expected),) = trainers
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3  # epochs of one batch
    assert losses[0] == pytest.approx(expected, rel=1e-3)
    code = code.replace("        remove_unused_columns=False,\n", "")
    with pytest.raises(ValueError, match="conversations"):
        exec(compile(code, "sft_trainer.md", "exec"), {})

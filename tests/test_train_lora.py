"""`mmpack train` end to end: a frozen tower, LoRA, evaluation, the best model, and what the run's folder holds."""

import json
import shutil
import sys

import pytest
import torch
from builders import tiny_config, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from mmpack import Encoder, PackedDataset
from mmpack.cli.main import main
from mmpack.cli.train import tell_other_settings
from mmpack.hf.lora import add_lora

FAMILY = "qwen2_vl"
BUDGET = 56 * 56


@pytest.fixture(scope="module")
def world(small_set, tmp_path_factory):
    """The demo's rows, a model for its tokenizer, and another 6 rows to evaluate on."""
    folder = tmp_path_factory.mktemp("lora")
    for name in ("tokenizer", "charts"):
        shutil.copytree(small_set / name, folder / name)
    rows = json.loads((small_set / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps(rows[:8]))
    (folder / "eval.json").write_text(json.dumps(rows[8:14]))
    size = len(AutoTokenizer.from_pretrained(small_set / "tokenizer"))
    vision = Encoder.from_folder(small_set / "tokenizer").vision
    config = tiny_config(size, family=FAMILY, vision=vision)
    tiny_model(config).save_pretrained(folder / "model")
    words = f"pack {folder}/train.json --tokenizer {folder}/tokenizer --capacity 1024 --quiet"
    assert main([*words.split(), "--max-pixels", str(BUDGET), "--out", f"{folder}/packed"]) == 0
    return folder


def train(world, out, *options):
    words = f"train --model {world}/model --output_dir {out} --use_cpu --learning_rate 0.03 --json"
    return main([*words.split(), *map(str, options)])


@pytest.fixture(scope="module")
def lora_run(world, tmp_path_factory):
    """(folder of a run, what it printed)."""
    import contextlib
    import io

    out = tmp_path_factory.mktemp("run")
    options = ["--data", world / "packed", "--frozen", "vision", "--frozen", "merger"]
    options += ["--eval-data", world / "eval.json", "--tokenizer", world / "tokenizer"]
    options += ["--max-pixels", BUDGET, "--lora-rank", 4, "--load_best_model_at_end"]
    options += ["--num_train_epochs", 3]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert train(world, out, *options) == 0
    return out, json.loads(text.getvalue().splitlines()[-1])


def test_lora_with_a_frozen_tower_keeps_the_best_model(world, lora_run):
    """Adapters of text layers only, and those of the checkpoint with the smallest eval_loss."""
    out, result = lora_run
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(losses) == 3  # after each epoch
    assert result["eval_loss"] == losses[-1]
    steps = [entry["step"] for entry in log if "eval_loss" in entry]
    best = steps[losses.index(min(losses))]
    assert result["best_checkpoint"] == str(out / f"checkpoint-{best}")
    saved = load_file(out / "adapter_model.safetensors")
    assert all(".language_model.layers." in name and ".lora_" in name for name in saved)
    kept = load_file(out / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert saved.keys() == kept.keys()
    assert all(torch.equal(saved[name], kept[name]) for name in saved)
    assert max(weight.abs().max() for name, weight in saved.items() if ".lora_B." in name) > 0
    assert not (out / "model.safetensors").exists()


def test_generate_from_the_run_with_stock_classes(world, lora_run, monkeypatch, tmp_path):
    """The tokens of the base model plus the adapter's products, computed here by hand; from another folder."""
    out, _ = lora_run
    monkeypatch.chdir(tmp_path)
    stock = AutoModelForImageTextToText.from_pretrained(out).eval()
    byhand = AutoModelForImageTextToText.from_pretrained(world / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "How many?"}]}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip

    def answer(model):
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        return model.generate(**asked, **options)[0, asked["input_ids"].shape[1] :].tolist()

    before = answer(byhand)
    saved = load_file(out / "adapter_model.safetensors")
    weights = dict(byhand.named_parameters())
    with torch.no_grad():
        for name in [name for name in saved if ".lora_A." in name]:
            layer = name.replace("base_model.model.", "").replace(".lora_A", "")
            # lora_alpha is twice the rank
            weights[layer] += 2 * saved[name.replace("lora_A", "lora_B")] @ saved[name]
    assert answer(stock) == answer(byhand) != before


def test_the_seed_determines_the_adapters(world):
    """And not what was random before."""

    def adapters(seed):
        torch.rand(1)
        model = AutoModelForImageTextToText.from_pretrained(world / "model")
        adapted = add_lora(model, 2, str(world / "model"), seed)
        return [weight for name, weight in adapted.named_parameters() if ".lora_A." in name]

    first, again, other = adapters(1), adapters(1), adapters(2)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


@pytest.mark.parametrize("where", ["", "checkpoint"])
def test_tokenizer_and_processor_are_saved_with_the_budget(world, lora_run, where):
    out, _ = lora_run
    folder = next(out.glob("checkpoint-*")) if where else out
    source = world / "tokenizer"
    for path in source.iterdir():  # what was published is all there
        assert (folder / path.name).is_file()
    theirs, ours = (AutoTokenizer.from_pretrained(one) for one in (source, folder))
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    before, after = (Encoder.from_folder(one).vision for one in (source, folder))
    assert before.max_pixels != after.max_pixels == BUDGET
    assert after.video == before.video  # whose budget is their own


def test_a_store_without_its_tokenizer_is_told(world, tmp_path, capsys):
    """Training goes on."""
    (tmp_path / "data").mkdir()
    shutil.copytree(world / "tokenizer", tmp_path / "tokenizer")
    words = f"pack {world}/train.json --tokenizer {tmp_path}/tokenizer --capacity 1024 --quiet"
    assert main([*words.split(), "--out", f"{tmp_path}/packed"]) == 0
    shutil.rmtree(tmp_path / "tokenizer")
    options = ["--data", tmp_path / "packed", "--steps", 1, "--save_strategy", "no"]
    assert train(world, tmp_path / "run", *options) == 0
    assert "will be saved without tokenizer and processor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--lora-rank", "0"], "--lora-rank must be positive, got 0"),
        (["--lora-rank", "4", "--frozen", "language"], "leaves nothing to train"),
    ],
)
def test_what_lora_refuses(world, tmp_path, capsys, options, text):
    assert train(world, tmp_path, "--data", world / "packed", "--steps", 1, *options) == 1
    assert text in capsys.readouterr().err


def test_a_missing_peft_is_one_line(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert train(world, tmp_path, "--data", world / "packed", "--lora-rank", 4) == 1
    error = capsys.readouterr().err
    assert error == "mmpack: --lora-rank needs peft, which is not installed; pip install peft\n"


def test_other_settings_of_evaluation_are_told(world, tmp_path, capsys):
    options = ["--data", world / "packed", "--eval-data", world / "eval.json", "--steps", 1]
    options += ["--tokenizer", world / "tokenizer", "--save_strategy", "no"]
    assert train(world, tmp_path, *options) == 0
    captured = capsys.readouterr()
    assert "--eval-data was encoded with other settings than --data: max_pixels" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["eval_loss"] > 0


def test_another_tokenizer_of_evaluation_is_told(world, tmp_path, capsys):
    tokenizer = shutil.copytree(world / "tokenizer", tmp_path / "tokenizer")
    saved = json.loads((tokenizer / "tokenizer.json").read_text())
    ids = saved["model"]["vocab"]
    first, second = (word for word, number in ids.items() if number in (40, 41))
    ids[first], ids[second] = ids[second], ids[first]
    (tokenizer / "tokenizer.json").write_text(json.dumps(saved))
    words = ["--capacity", "1024", "--max-pixels", str(BUDGET), "--out", str(tmp_path / "other")]
    files = [str(world / "eval.json"), "--tokenizer", str(tokenizer)]
    assert main(["pack", *files, *words, "--quiet"]) == 0
    train_set = PackedDataset.from_store(world / "packed")
    other = PackedDataset.from_store(tmp_path / "other")
    tell_other_settings(train_set, train_set)
    assert not capsys.readouterr().err
    for one in (train_set, PackedDataset.mixed({"a": (train_set, 1)})):
        tell_other_settings(one, other)
        told = capsys.readouterr().err
        assert "--eval-data was encoded with other text settings than --data: the tokenizer" in told


@pytest.fixture(scope="module")
def stopped_run(world, tmp_path_factory):
    """(folder, options, what was printed) of a run that gets worse, with two evaluation sets."""
    out = tmp_path_factory.mktemp("stopped")
    rows = json.loads((world / "eval.json").read_text())
    (world / "few.json").write_text(json.dumps(rows[:2]))
    options = ["--data", world / "packed", "--tokenizer", world / "tokenizer"]
    options += ["--eval-data", f"all={world / 'eval.json'}", f"few={world / 'few.json'}"]
    options += ["--max-pixels", BUDGET, "--metric_for_best_model", "eval_few_loss"]
    options += ["--early-stopping-patience", 2, "--eval_strategy", "steps", "--eval_steps", 1]
    options += ["--steps", 12, "--lr_scheduler_type", "constant", "--frozen", "vision"]
    return out, options


def run_of(capsys, world, out, options):
    assert train(world, out, *options) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_run_stops_early_with_its_best_model(world, stopped_run, tmp_path, capsys):
    """By the loss of the set that is named; resumed, it does not count from 0 again."""
    out, options = stopped_run
    result = run_of(capsys, world, out, options)
    last = out / f"checkpoint-{result['steps']}"
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    losses = {entry["step"]: entry["eval_few_loss"] for entry in log if "eval_few_loss" in entry}
    best = min(losses, key=losses.get)
    assert result["steps"] == best + 2 < 12
    assert result["best_checkpoint"] == str(out / f"checkpoint-{best}")
    (everything,) = [
        e["eval_all_loss"] for e in log if "eval_all_loss" in e and e["step"] == best + 2
    ]
    assert result["eval_loss"] == {"all": everything, "few": losses[best + 2]}
    kept, saved = (
        load_file(one / "model.safetensors") for one in (out / f"checkpoint-{best}", out)
    )
    assert all(torch.equal(saved[name], kept[name]) for name in kept)
    again = run_of(
        capsys, world, out, [*options, "--resume_from_checkpoint", out / f"checkpoint-{best + 1}"]
    )
    assert again["steps"] == best + 2


def test_a_run_without_early_stopping_is_resumed_with_it(world, tmp_path, capsys):
    """Its state has no count: evaluations of the resumed part count, and checkpoints hold it."""
    options = ["--data", world / "packed", "--eval-data", world / "packed", "--frozen", "vision"]
    options += ["--eval_strategy", "steps", "--eval_steps", 1, "--save_strategy", "steps"]
    options += ["--save_steps", 1, "--lr_scheduler_type", "constant"]
    run_of(capsys, world, tmp_path, [*options, "--steps", 1])
    options += ["--steps", 2, "--early-stopping-patience", 3]
    options += ["--resume_from_checkpoint", tmp_path / "checkpoint-1"]
    assert run_of(capsys, world, tmp_path, options)["steps"] == 2
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["_EarlyStopping"]["args"]["early_stopping_patience"] == 3


def test_the_best_of_several_sets_needs_a_name(world, tmp_path, capsys):
    options = ["--data", world / "packed", "--eval-data", f"a={world}/packed", f"b={world}/packed"]
    assert train(world, tmp_path, *options, "--load_best_model_at_end") == 1
    error = capsys.readouterr().err
    assert (
        "--eval-data has 2 named sets; pass --metric_for_best_model eval_a_loss or eval_b_loss"
        in error
    )

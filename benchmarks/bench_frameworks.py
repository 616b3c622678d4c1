"""What do mmpack's packs give inside another framework's trainer, beside that framework's own batches?

The same rows, one epoch, a tiny model: the framework's trainer with its own padding or packing, with mmpack's
packs inside it, and transformers' Trainer with the same packs, whose losses ours must equal. Useful tokens are
those of the rows, however they are batched; padding share is what the model computes beyond them. The peer is the
framework's own way, which also tokenizes there; the ceiling is transformers' Trainer with the packs, which has no
framework around it.

A framework that is not installed in this Python is skipped. CI has TRL; `benchmarks/environments` has a script for
each of the others.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from benchmarks.harness import CEILING
from benchmarks.peer_collators import processor_of
from mmpack import Encoder, PackedDataset
from mmpack.cli.demo import tiny_model, write_data
from mmpack.hf import PackCollator, PackingCallback, patch_model

pytestmark = pytest.mark.cpu
CAPACITY = 1024
# What every trainer here is told; SGD-like steps would hide errors of scale.
OPTIONS: dict[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "adam_beta2": 0.999,
    "warmup_steps": 0,
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_num_workers": 0,
    "bf16": False,
    "gradient_checkpointing": False,
    "seed": 42,
}  # as in train.yaml or on a command line, where a framework has one


class Watch(TrainerCallback):
    """What a Trainer did: its losses, seconds of its steps, and tokens that the model computed.

    Attributes:
        slots: tokens of all batches, with padding. tokens: without it; no row has the padding's id. (A mask does
            not always say: LLaMA-Factory's `packing` attends to padding.)
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.slots = self.tokens = 0
        self._begin = 0.0
        self._hook: Any = None
        self._padding = -1

    def _see(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]
        self.slots += ids.numel()
        self.tokens += int((ids != self._padding).sum())

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self._padding = model.config.get_text_config().pad_token_id
        self._hook = model.register_forward_pre_hook(self._see, with_kwargs=True, prepend=True)
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._begin)  # with the batch's making
        self._begin = now

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hook.remove()


@dataclass
class Setting:
    """The rows, packed, and a tiny model, in a folder: `train.json` (ShareGPT), `charts`, `tokenizer`,
    `config.json`, `packed` (`mmpack pack`'s) and `model`, with the files of a published model."""

    folder: Path
    num_rows: int
    packed: PackedDataset
    rows_per_pack: int
    processor: Any
    base: Any = field(repr=False)

    def model(self) -> Any:
        """The model, with the same weights each time."""
        return copy.deepcopy(self.base)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of `train.json`."""
        return json.loads((self.folder / "train.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def setting(tmp_path_factory: Any, quick: bool) -> Setting:
    folder, num_rows = tmp_path_factory.mktemp("frameworks"), 24 if quick else 96
    write_data(folder, num_rows)
    config = AutoConfig.from_pretrained(folder / "config.json")
    torch.manual_seed(0)
    base = tiny_model(config)
    encoder = Encoder.from_folder(folder / "tokenizer")
    packed = PackedDataset.from_files(folder / "train.json", encoder, CAPACITY, cost=config)
    packed.save(folder / "packed")
    packed = PackedDataset.from_store(folder / "packed")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    processor = processor_of(tokenizer, encoder.vision)
    shutil.copytree(folder / "tokenizer", folder / "model")
    base.save_pretrained(folder / "model")
    per_pack = round(num_rows / len(packed))
    return Setting(folder, num_rows, packed, per_pack, processor, base)


Run = Callable[[Setting, Watch], None]


def stock(setting: Setting, watch: Watch) -> None:
    """The packs in transformers' Trainer."""
    model = patch_model(setting.model())
    args = TrainingArguments(str(setting.folder / "stock"), **OPTIONS)
    args.max_epochs = None  # ms-swift, once imported, asks every Trainer for it
    collate = PackCollator(model=model)
    trainer = Trainer(
        model, args, train_dataset=setting.packed, data_collator=collate, callbacks=[watch]
    )
    PackingCallback(setting.packed).attach(trainer)
    trainer.train()


def compare(
    setting: Setting, recorder: Any, name: str, package: str, runs: dict[str, Run], rounds: int
) -> None:
    """Run transformers' Trainer, then each of a framework's ways, in turn, `rounds` times; record them, and check
    that `runs["mmpack"]` has the losses of the first.

    Args:
        name: the framework's. package: the distribution that has its version.
        runs: "mmpack", and the framework's own ways by what they do.
    """
    version = f"{name} {importlib.metadata.version(package)}"
    ways = {CEILING: stock, **runs}
    watches: dict[str, list[Watch]] = {way: [] for way in ways}
    stock(setting, Watch())  # a process's first steps are slower
    for _ in range(rounds):
        for way, run in ways.items():
            watches[way].append(Watch())
            run(setting, watches[way][-1])
    expected, ours = watches[CEILING][0].losses, watches["mmpack"][0].losses
    assert len(ours) == len(setting.packed)
    np.testing.assert_allclose(ours, expected, rtol=2e-4)
    useful = int(setting.packed.plan.num_tokens.sum())
    for way, every in watches.items():
        assert every[0].tokens == pytest.approx(useful, rel=0.02), way
        rates = [useful / sum(one.seconds) for one in every]
        padding = 1 - useful / every[0].slots
        impl = way if way == CEILING else f"{name} {way}"
        common = {
            "x": ("rows", setting.num_rows),
            "config": f"{version}, demo rows, capacity={CAPACITY}",
        }
        for metric, unit, values in (("useful tokens", "1/s", rates), ("padding", "1", [padding])):
            recorder.add(
                f"inside {name}", impl, "epoch", metric=metric, unit=unit, values=values, **common
            )
        print(
            f"{version}: {way}: {np.median(rates):,.0f} useful tokens/s, {100 * padding:.1f} % padding"
        )


@pytest.mark.peer("--no-deps llamafactory", "llamafactory")
def test_llamafactory(setting, recorder, quick, monkeypatch):
    """LLaMA-Factory pads rows, or packs them with `packing`, where rows attend to each other. Its `neat_packing`
    keeps them apart; in 0.9.5, without flash attention, it stops on these rows: the mask is shorter than the
    tokens."""
    from mmpack.integrations import llamafactory

    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    tuner = importlib.import_module("llamafactory.train.tuner")
    columns = {"messages": "conversations", "images": "images"}
    entry = {"file_name": "train.json", "formatting": "sharegpt", "columns": columns}
    (setting.folder / "dataset_info.json").write_text(json.dumps({"charts": entry}))
    fixed = {
        "model_name_or_path": str(setting.folder / "model"), "template": "qwen2_vl", "stage": "sft",
        "do_train": True, "finetuning_type": "full", "freeze_vision_tower": False,
        "freeze_multi_modal_projector": False, "disable_gradient_checkpointing": True,
        "output_dir": str(setting.folder / "llamafactory"), "overwrite_output_dir": True, **OPTIONS,
    }  # fmt: skip
    rows = {"dataset_dir": str(setting.folder), "dataset": "charts", "overwrite_cache": True}

    def ours(setting: Setting, watch: Watch) -> None:
        llamafactory.run({**fixed, "packed": str(setting.folder / "packed")}, [watch])

    def theirs(**options: Any) -> Run:
        def run(setting: Setting, watch: Watch) -> None:
            tuner.run_exp({**fixed, **rows, **options}, [watch])

        return run

    runs: dict[str, Run] = {
        "mmpack": ours,
        "padded": theirs(per_device_train_batch_size=setting.rows_per_pack),
        "packed": theirs(packing=True, cutoff_len=CAPACITY),
    }
    compare(setting, recorder, "LLaMA-Factory", "llamafactory", runs, 1 if quick else 3)


@pytest.mark.peer("trl", "trl")
def test_trl(setting, recorder, quick):
    """TRL's SFTTrainer pads rows with images; its packing refuses them."""
    from datasets import Dataset, Image, Sequence
    from trl import SFTConfig, SFTTrainer

    integration = pytest.importorskip("mmpack.integrations.trl", exc_type=ImportError)

    def args() -> Any:
        return SFTConfig(str(setting.folder / "trl"), max_length=None, **OPTIONS)

    def ours(setting: Setting, watch: Watch) -> None:
        integration.PackedSFTTrainer(
            setting.model(),
            args(),
            train_dataset=setting.packed,
            processing_class=setting.processor.tokenizer,
            callbacks=[watch],
        ).train()

    def padded(setting: Setting, watch: Watch) -> None:
        config = args()
        config.per_device_train_batch_size = setting.rows_per_pack
        SFTTrainer(
            setting.model(),
            config,
            train_dataset=conversations,
            processing_class=setting.processor,
            callbacks=[watch],
        ).train()

    names = {"human": "user", "gpt": "assistant"}
    rows = []
    for row in setting.rows():
        turns = [
            {
                "role": names[turn["from"]],
                "content": [
                    part
                    for number, text in enumerate(turn["value"].split("<image>"))
                    for part in ([{"type": "image", "text": None}] if number else [])
                    + ([{"type": "text", "text": text}] if text else [])
                ],
            }
            for turn in row["conversations"]
        ]
        images = [str(setting.folder / path) for path in row["images"]]
        rows.append({"messages": turns, "images": images})
    conversations = Dataset.from_list(rows).cast_column("images", Sequence(Image()))
    runs = {"mmpack": ours, "padded": padded}
    compare(setting, recorder, "TRL", "trl", runs, 1 if quick else 3)


@pytest.mark.peer("ms-swift", "swift")
def test_swift(setting, recorder, quick, monkeypatch):
    """ms-swift pads rows; its packing needs flash attention, which a CPU does not have. Its template has the ids
    of the published tokenizer, which are others in the demo's."""
    from swift.callbacks import callbacks_map
    from swift.pipelines import sft_main
    from swift.template.templates.qwen import Qwen2VLTemplate

    from mmpack.integrations.swift import packs

    fixed = {"model": setting.folder / "model", "model_type": "qwen2_vl", "template": "qwen2_vl"}
    fixed |= {"torch_dtype": "float32", "fp16": False, "check_model": False, "add_version": False}
    fixed |= {"tuner_type": "full", "freeze_vit": False, "freeze_aligner": False}
    fixed |= {"output_dir": setting.folder / "swift", "callbacks": "watch", **OPTIONS}

    def sft(watch: Watch, dataset: Path, **options: Any) -> None:
        callbacks_map["watch"] = lambda args, trainer: watch
        words = [
            word
            for name, value in {**fixed, "dataset": dataset, **options}.items()
            for word in (f"--{name}", str(value))
        ]
        sft_main(words)

    def ours(setting: Setting, watch: Watch) -> None:
        with packs():
            sft(watch, setting.folder / "packed")

    def padded(setting: Setting, watch: Watch) -> None:
        sft(watch, path, per_device_train_batch_size=setting.rows_per_pack)

    for name in ("image_token_id", "video_token_id"):
        monkeypatch.setattr(Qwen2VLTemplate, name, getattr(setting.packed.vision, name))
    path = setting.folder / "swift.json"
    roles = {"human": "user", "gpt": "assistant"}
    rows = [
        {
            "messages": [
                {"role": roles[turn["from"]], "content": turn["value"]}
                for turn in row["conversations"]
            ],
            "images": [str(setting.folder / name) for name in row["images"]],
        }
        for row in setting.rows()
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    runs = {"mmpack": ours, "padded": padded}
    compare(setting, recorder, "ms-swift", "ms-swift", runs, 1 if quick else 3)

"""LLaMA-Factory's command on packs: `python -m mmpack.integrations.llamafactory train.yaml [name=value ...]`.

LLaMA-Factory reads the options, loads tokenizer, processor and model, adds adapters, freezes parts, and makes the
optimizer, the Trainer and the files of the run. From mmpack come the data sets, the collator, the patched model and
`PackingCallback`: five names of LLaMA-Factory are replaced while the run lasts (`REPLACED`).
docs/llama_factory.md is the user's page.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

from mmpack.cli.options import PackOptions
from mmpack.cli.pack import pack_groups
from mmpack.cli.terminal import escaped_streams, one_line
from mmpack.cli.train import tell_other_costs
from mmpack.data.encoder import Encoder
from mmpack.integrations.chosen_rows import RowChoice
from mmpack.integrations.llamafactory_options import (
    OwnOptions,
    taken_options,
    vision_with_budgets,
)
from mmpack.integrations.replaced_names import replaced

USAGE = "python -m mmpack.integrations.llamafactory FILE.yaml [name=value ...]"
_LIBRARY = "llamafactory"

# What is called and read of LLaMA-Factory: module -> names
USED = {
    "train.tuner": ("run_exp",),
    "hparams.parser": ("read_args",),
    "hparams": ("FinetuningArguments",),
    "extras.misc": ("is_env_enabled",),
}
# Its environment variables that choose other code than the workflows below
_OTHER_CODE = ("USE_RAY", "USE_MCA", "USE_V1")
_CHECKPOINTING = {
    "model.model_utils.checkpointing": {"get_custom_gradient_checkpointing_func": "checkpointing"}
}
# stage -> module -> name in it -> the method of `_Run` that makes the replacement from it
REPLACED: dict[str, dict[str, dict[str, str]]] = {
    "sft": {
        "train.sft.workflow": {
            "get_dataset": "datasets",
            "load_model": "model",
            "SFTDataCollatorWith4DAttentionMask": "collator",
            "CustomSeq2SeqTrainer": "trainer",
        },
        **_CHECKPOINTING,
    },
    "pt": {
        "train.pt.workflow": {
            "get_dataset": "datasets",
            "load_model": "model",
            "DataCollatorForLanguageModeling": "collator",
            "CustomTrainer": "trainer",
        },
        **_CHECKPOINTING,
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 refused with a reason, 2 usage, 130 Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or not words[0].endswith((".yaml", ".yml")):
        print(f"usage: {USAGE}", file=sys.stderr)
        return 2
    with escaped_streams():
        try:
            run(_read(words))
            return 0
        except KeyboardInterrupt:
            print("mmpack: interrupted", file=sys.stderr)
            return 130
        except (ValueError, OSError) as error:
            reason = str(error)
        except ImportError as error:  # LLaMA-Factory's check of versions is one
            reason = _not_importable(error)
    print(f"mmpack: {one_line(reason)}", file=sys.stderr)
    return 1


def run(args: Mapping[str, Any], callbacks: Sequence[Any] = ()) -> None:
    """Train as the options of a LLaMA-Factory YAML say, on packs.

    Args:
        args: the options, with `packed` and `eval_packed` for folders that `mmpack pack` wrote.
        callbacks: for the Trainer, beside LLaMA-Factory's.

    Raises:
        ValueError: an option does not apply to packs, or what `mmpack pack` and `mmpack train` refuse.
    """
    args = dict(args)
    used = {
        name: getattr(importlib.import_module(f"{_LIBRARY}.{module}"), name)
        for module, names in USED.items()
        for name in names
    }
    if enabled := [name for name in _OTHER_CODE if used["is_env_enabled"](name)]:
        raise ValueError(
            f"{enabled[0]}=1 does not apply: it starts another trainer than the one that mmpack's packs go to; unset "
            "it, and start several ranks with torchrun -m mmpack.integrations.llamafactory"
        )
    defaults = used["FinetuningArguments"]
    parts = ("freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model")
    own = taken_options(args, {name: getattr(defaults, name) for name in parts})
    this = _Run(own, args)
    this.name_stores()
    with ExitStack() as stack:
        for module, names in REPLACED[str(args.get("stage", defaults.stage))].items():
            makers = {name: getattr(this, method) for name, method in names.items()}
            stack.enter_context(replaced(f"{_LIBRARY}.{module}", makers))
        used["run_exp"](args, [*callbacks])


class _Run:
    """One run: what replaces LLaMA-Factory's names, and what they share.

    Attributes:
        args: the options for LLaMA-Factory.
        data: the training data, once `datasets` has made it.
        patched: the model, once `model` has loaded it.
    """

    def __init__(self, own: OwnOptions, args: dict[str, Any]) -> None:
        self.own, self.args = own, args
        self.data: Any = None
        self.patched: Any = None

    def name_stores(self) -> None:
        """Give LLaMA-Factory what it requires of data that it does not read: names, and the length of rows."""
        if self.own.packed is None:
            return
        from mmpack.packing.dataset import PackedDataset

        self.data = PackedDataset.from_store(self.own.packed)
        given, capacity = self.args.get("cutoff_len"), self.data.capacity
        if given not in (None, capacity):
            raise ValueError(
                f"cutoff_len: {given} does not apply: the packs of {self.own.packed} hold {capacity} tokens; leave "
                "it out, or pack again with --capacity"
            )
        self.args["cutoff_len"] = capacity
        self.args["dataset"] = _name_of(self.own.packed)
        if self.own.eval_packed is not None:
            self.args["eval_dataset"] = _name_of(self.own.eval_packed)
        planning = _store_of(self.data).about.planning
        tell_other_costs(planning, self.own.frozen, False)

    def datasets(self, theirs: Any) -> Callable[..., dict[str, Any]]:
        """For `get_dataset`, which reads, tokenizes and packs rows."""

        def get_dataset(
            template: Any,
            model_args: Any,
            data_args: Any,
            training_args: Any,
            stage: str,
            tokenizer: Any,
            processor: Any = None,
        ) -> dict[str, Any]:
            if self.own.packed is not None:
                module = {"train_dataset": self.data}
                if self.own.eval_packed is not None:
                    module["eval_dataset"] = type(self.data).from_store(self.own.eval_packed)
                return module
            if processor is None:
                raise ValueError(
                    f"{model_args.model_name_or_path} has no processor that LLaMA-Factory could load, see its "
                    "message above; install torchvision, or pack with mmpack pack and pass packed: FOLDER"
                )
            rows = _Rows(self, model_args, data_args, training_args, stage, processor)
            if stage == "sft":
                rows.check_template(template, tokenizer)
            module = rows.datasets()
            self.data = module["train_dataset"]
            return module

        return get_dataset

    def model(self, theirs: Callable[..., Any]) -> Callable[..., Any]:
        """For `load_model`, which also adds adapters and freezes parts."""

        def load_model(*args: Any, **kwargs: Any) -> Any:
            from mmpack.hf.fit import check_fit
            from mmpack.hf.model_parts import inner_model
            from mmpack.hf.model_patch import patch_model

            model = theirs(*args, **kwargs)
            check_fit(inner_model(model), self.data)
            self.patched = patch_model(model, impl=self.own.impl)
            return self.patched

        return load_model

    def collator(self, theirs: Any) -> Callable[..., Any]:
        """For the collators, which pad rows and decode their images."""

        def make(**kwargs: Any) -> Any:
            from mmpack.hf.collator import PackCollator

            return PackCollator(model=self.patched)

        return make

    def trainer(self, theirs: Callable[..., Any]) -> Callable[..., Any]:
        """For the Trainers, which are kept. The loss of a step is the mean over its supervised tokens: they turn
        that off for every model with a processor (`model_accepts_loss_kwargs`)."""

        def make(*, tokenizer: Any, processor: Any, **kwargs: Any) -> Any:
            from mmpack.hf.callbacks import PackingCallback

            # As Trainer's `processing_class`, it is in a checkpoint before the list of the checkpoint's files is.
            saved = tokenizer if processor is None else _with_budgets(processor, self.data.vision)
            trainer = theirs(tokenizer=saved, processor=None, **kwargs)
            trainer.model_accepts_loss_kwargs = True
            PackingCallback(self.data).attach(trainer)
            return trainer

        return make

    def checkpointing(self, theirs: Callable[..., Any]) -> Callable[..., Any]:
        """For the function that makes the one with which layers checkpoint their activations. It expects a layer's
        bound method; transformers from 5.23 on gives it the class's function and the layer."""

        def make(checkpoint: Any) -> Callable[..., Any]:
            run_layer = theirs(checkpoint)

            def of_layer(function: Any, *args: Any, **kwargs: Any) -> Any:
                is_partial = isinstance(function, partial)
                if is_partial and not hasattr(function.func, "__self__"):
                    layer, *first = function.args
                    bound = MethodType(function.func, layer)
                    function = partial(bound, *first, **function.keywords)
                return run_layer(function, *args, **kwargs)

            return of_layer

        return make


class _Rows:
    """The data sets of a YAML -> packs, which are kept in `output_dir/packs` and reused by the next run."""

    def __init__(
        self,
        this: _Run,
        model_args: Any,
        data_args: Any,
        training_args: Any,
        stage: str,
        processor: Any,
    ) -> None:
        from mmpack.data.model_folder import local_path, pinned
        from mmpack.data.processor_folder import load_config

        self._data_args, self._training_args = data_args, training_args
        self._stage = "pretrain" if stage == "pt" else "sft"
        self._own, self._given = this.own, this.args
        self._source = pinned(model_args.model_name_or_path)
        self._config = load_config(local_path(self._source))
        encoder = Encoder.from_processor(
            processor,
            self._config,
            stage=self._stage,
            media_dir=this.args.get("media_dir"),
            train_on_prompt=data_args.train_on_prompt,
            mask_history=data_args.mask_history,
        )
        vision = vision_with_budgets(encoder.vision, model_args, this.args)
        self._encoder = replace(encoder, vision=vision)

    def check_template(self, template: Any, tokenizer: Any) -> None:
        """Refuse a template that writes turns differently from the tokenizer's chat template.

        Raises:
            ValueError: shows both texts.
        """
        says = (("user", "Which one?"), ("assistant", "This one."))
        messages = [{"role": role, "content": text} for role, text in says * 2]
        pairs = template.encode_multiturn(tokenizer, messages)
        theirs = tokenizer.decode([token for pair in pairs for ids in pair for token in ids])
        encoder = replace(self._encoder, mask_history=False, on_error="raise")
        (encoded,) = encoder.encode(encoder.read([{"messages": messages}]))
        ours = tokenizer.decode(encoded.input_ids.tolist())
        if theirs != ours:
            raise ValueError(
                f"template: {self._data_args.template or 'the parsed one'} writes {theirs!r}, and the tokenizer's "
                f"chat template, which mmpack uses, {ours!r}; choose a template that writes the same (one that "
                "ends in _nothink for an instruct model), or pack with mmpack pack and pass packed: FOLDER"
            )

    def datasets(self) -> dict[str, Any]:
        """`train_dataset`, and with an evaluation set `eval_dataset`, one or a dict of them."""
        args = self._data_args
        choice = RowChoice(args.max_samples, args.val_size, self._training_args.seed)
        module = {"train_dataset": self._packed("train", args.dataset, choice.training())}
        names = args.eval_dataset
        if args.val_size > 1e-6:
            module["eval_dataset"] = self._packed("eval", args.dataset, choice.evaluation())
        elif names is not None and args.eval_on_each_dataset:
            module["eval_dataset"] = {
                name: self._packed(f"eval-{name}", [name], choice.training()) for name in names
            }
        elif names is not None:
            module["eval_dataset"] = self._packed("eval", names, choice.training())
        return module

    def _packed(self, part: str, names: Sequence[str], choice: RowChoice) -> Any:
        from mmpack.packing.dataset import PackedDataset

        args = self._data_args
        if not isinstance(args.dataset_dir, str) or not Path(args.dataset_dir).is_dir():
            raise ValueError(
                f"dataset_dir: {args.dataset_dir} is not a folder; download the data, so that it has a "
                "dataset_info.json and its files"
            )
        out = Path(self._training_args.output_dir) / "packs" / part
        options = PackOptions(
            data=(args.dataset_dir,),
            dataset=tuple(names),
            out=str(out),
            tokenizer=self._source,
            config=self._source,
            capacity=self._given.get("cutoff_len")
            or type(args).cutoff_len,  # packing: true takes 1 off
            stage=self._stage,  # type: ignore[arg-type]  # one of the two
            on_overflow="split" if self._stage == "pretrain" else "truncate",
            frozen=self._own.frozen,  # type: ignore[arg-type]  # the names of parts
            plan_seed=self._training_args.seed,
            jobs=args.preprocessing_num_workers,
            overwrite=True,  # what is there is this command's
        )
        begun = time.time_ns()
        groups_of = [
            list(replace(self._encoder, mapping=[name]).groups(args.dataset_dir)) for name in names
        ]
        chosen = choice.of(groups_of)
        is_first = self._training_args.local_process_index == 0
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            with redirect_stdout(sys.stdout if is_first else nowhere):
                pack_groups(chosen, options, self._encoder, self._config, begun, choice.as_record())
        return PackedDataset.from_store(out)


def _with_budgets(processor: Any, vision: Any) -> Any:
    """The processor, which from now on is saved with the pixel budgets that the rows were encoded with."""
    stock = processor.save_pretrained

    def save_pretrained(folder: str, *args: Any, **kwargs: Any) -> Any:
        from mmpack.hf.processor_files import ProcessorFiles

        files = stock(folder, *args, **kwargs)
        ProcessorFiles(Path(folder), vision).save_pretrained(folder)
        return files

    processor.save_pretrained = save_pretrained
    return processor


def _read(words: list[str]) -> dict[str, Any]:
    """A YAML file and `name=value` words -> options, by LLaMA-Factory's reader."""
    parser = importlib.import_module(f"{_LIBRARY}.hparams.parser")
    before = sys.argv
    sys.argv = [before[0], *words]
    try:
        found = parser.read_args()
    finally:
        sys.argv = before
    return {str(name): value for name, value in found.items()}


def _not_importable(error: ImportError) -> str:
    package = str(error.name or "").partition(".")[0]
    if package == _LIBRARY:
        return (
            f"{_LIBRARY} is not installed; docs/llama_factory.md has the commands that install it"
        )
    if package.isidentifier():
        return f"{package} is not installed; pip install {package}"
    if package:  # a sentence of LLaMA-Factory's check of packages
        return one_line(str(error.name))
    return (
        f"{one_line(str(error))} LLaMA-Factory's check of versions refuses the transformers that mmpack needs; set "
        "DISABLE_VERSION_CHECK=1"
    )


def _name_of(folder: str) -> str:
    """A store's name where LLaMA-Factory lists data sets, between commas."""
    return Path(folder).resolve().name.replace(",", "_")


def _store_of(dataset: Any) -> Any:
    return getattr(dataset.samples, "samples", dataset.samples)


if __name__ == "__main__":
    sys.exit(main())

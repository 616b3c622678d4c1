"""LLaMA-Factory's command on packs: `python -m mmpack.integrations.llamafactory train.yaml [name=value ...]`.

LLaMA-Factory reads the options, loads tokenizer, processor and model, adds adapters, freezes parts, and makes the
optimizer, the Trainer and the files of the run. From mmpack come the data sets, the collator, the patched model
and `PackingCallback`: five names of LLaMA-Factory are replaced while the run lasts (`REPLACED`).
docs/llama_factory.md is the user's page.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

from mmpack.cli.terminal import escaped_streams, one_line
from mmpack.cli.train import tell_other_costs
from mmpack.integrations.llamafactory_options import OwnOptions, taken_options
from mmpack.integrations.llamafactory_rows import Rows
from mmpack.integrations.replaced_names import replaced
from mmpack.store.manifest import packed_split

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
            f"{enabled[0]}=1 does not apply: it starts another trainer than the one that mmpack's packs go to; "
            "unset it, and start several ranks with torchrun -m mmpack.integrations.llamafactory"
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
        from mmpack.packing.split_documents import unsplit

        folder, split = packed_split(self.own.packed) or (self.own.packed, "train")
        if split == "val":
            raise ValueError(
                f"packed: {self.own.packed} are the rows held out for evaluation; write packed: {folder} and "
                f"eval_packed: {self.own.packed}"
            )
        self.data = PackedDataset.from_store(folder)
        given, capacity = self.args.get("cutoff_len"), self.data.capacity
        if given not in (None, capacity):
            raise ValueError(
                f"cutoff_len: {given} does not apply: the packs of {self.own.packed} hold {capacity} tokens; "
                "leave it out, or pack again with --capacity"
            )
        self.args["cutoff_len"] = capacity
        self.args["dataset"] = _name_of(self.own.packed)
        if self.own.eval_packed is not None:
            self.args["eval_dataset"] = _name_of(self.own.eval_packed)
        planning = unsplit(self.data.samples).about.planning
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
                    from mmpack.integrations.packed_folders import open_packs

                    module["eval_dataset"] = open_packs(self.own.eval_packed)
                return module
            if processor is None:
                raise ValueError(
                    f"{model_args.model_name_or_path} has no processor that LLaMA-Factory could load, see its "
                    "message above; install torchvision, or pack with mmpack pack and pass packed: FOLDER"
                )
            rows = Rows(self.own, self.args, model_args, data_args, training_args, stage, processor)
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
    """The sentence of a package that is missing or of another version; other errors say why themselves."""
    name = str(error.name or "")
    if isinstance(error, ModuleNotFoundError):
        if name == _LIBRARY:
            return (
                f"{name} is not installed; docs/llama_factory.md has the commands that install it"
            )
        if name.isidentifier():
            return f"{name} is not installed; pip install {name}"
        if " " in name:  # a sentence of LLaMA-Factory's check of packages
            return one_line(name)
    text = one_line(str(error))
    if text.startswith("transformers") and " is required" in text:
        return (
            f"{text} LLaMA-Factory's check of versions refuses the transformers that mmpack needs; set "
            "DISABLE_VERSION_CHECK=1"
        )
    return text


def _name_of(folder: str) -> str:
    """A store's name where LLaMA-Factory lists data sets, between commas."""
    return Path(folder).resolve().name.replace(",", "_")


if __name__ == "__main__":
    sys.exit(main())

"""The data sets of a LLaMA-Factory YAML -> packs, as its options say."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmpack.cli.options import PackOptions
from mmpack.cli.pack import pack_groups
from mmpack.data.encoder import Encoder
from mmpack.integrations.chosen_rows import RowChoice
from mmpack.integrations.llamafactory_options import OwnOptions, vision_with_budgets


class Rows:
    """The data sets of a YAML -> packs, which are kept in `output_dir/packs` and reused by the next run."""

    def __init__(
        self,
        own: OwnOptions,
        given: Mapping[str, Any],
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
        self._own, self._given = own, given
        self._source = pinned(model_args.model_name_or_path)
        self._config = load_config(local_path(self._source))
        encoder = Encoder.from_processor(
            processor,
            self._config,
            stage=self._stage,
            media_dir=given.get("media_dir"),
            train_on_prompt=data_args.train_on_prompt,
            mask_history=data_args.mask_history,
        )
        vision = vision_with_budgets(encoder.vision, model_args, given)
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

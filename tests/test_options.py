"""Every option of every command acts, or is refused with a reason that names it."""

import base64
import dataclasses
import json
import re
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from builders import tiny_config
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, TrainingArguments

import mmpack.errors
from mmpack import Encoder, PackedDataset
from mmpack.cli.command_line import COMMANDS, parse
from mmpack.cli.demo import write_data
from mmpack.cli.main import main
from mmpack.cli.options import flag
from mmpack.hf import training_options
from mmpack.hf.training_options import EVALUATION, NEEDED, REFUSED, parse_training_arguments
from mmpack.hf.unavailable import unavailable
from mmpack.ops import tuning
from mmpack.store.encoded_store import open_store
from mmpack.trials import Outcome

VIDEO_PART = "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}"


class Case(NamedTuple):
    """A command with and without some options. They must make a difference, or be refused with this text."""

    command: str
    options: str  # names of fields
    base: str  # words without them; {out} is a new folder
    words: str
    refused: str = ""


# A store cannot be trained on as if its rows were read now.
PACKED_ALREADY = {
    "stage": "pretrain", "dataset": "a", "allow_data_uri": "", "missing_marker": "refuse", "decode": "",
    "tokenizer": "tokenizer", "typed_tokens": "ids", "template_arg": "add_vision_id=true", "max_pixels": "3136", "min_pixels": "9408", "video_fps": "2",
    "video_max_frames": "4", "video_max_pixels": "3136", "capacity": "512", "patch_capacity": "512", "max_image_share": "0.5",
    "on_error": "raise", "on_overflow": "error", "train_on_prompt": "",
    "mask_history": "", "mask_thinking": "", "plan_seed": "0", "group_images": "",
}  # fmt: skip
# The options that check, pack and train have in common: base, words.
READING = [
    ("stage", "docs.jsonl", "--stage pretrain"),
    ("dataset", "named", "--dataset two"),
    ("media_dir", "elsewhere.json", "--media-dir pictures"),
    ("allow_data_uri", "uri.json", "--allow-data-uri"),
    ("missing_marker", "unmarked.json", "--missing-marker prepend"),
    ("missing_marker", "unmarked.jsonl --stage pretrain", "--missing-marker prepend"),
    ("decode", "damaged.json", "--decode"),
]
PIXELS = [
    ("max_pixels", "rows.json", "--max-pixels 3136"),
    ("min_pixels", "rows.json", "--min-pixels 150000"),
    ("video_fps", "video.json", "--video-fps 1"),
    ("video_max_frames", "video.json", "--video-max-frames 4"),
    ("video_max_pixels", "video.json", "--video-max-pixels 3136"),
]
PACKING = [
    ("capacity", "rows.json", "--capacity 700"),
    ("patch_capacity", "rows.json", "--patch-capacity 400"),
    ("max_image_share", "rows.json", "--max-image-share 0.1"),
    ("on_error", "damaged.json --decode", "--on-error skip"),
    ("max_bad", "damaged.json --decode --on-error skip", "--max-bad 0.01"),
    ("on_overflow", "long.json", "--on-overflow truncate"),
    ("train_on_prompt", "rows.json", "--train-on-prompt"),
    ("mask_history", "rows.json", "--mask-history"),
    ("mask_thinking", "thought.json", "--mask-thinking"),
    ("plan_seed", "rows.json", "--plan-seed 7"),
    ("group_images", "rows.json", "--group-images"),
]
TYPED = "--typed-tokens text"
ARGUMENT = "--template-arg add_vision_id=true"
PACK = "{data} --tokenizer tokenizer --capacity 2048 --out {out}/packed"
ROWS = "--data {data} --tokenizer tokenizer --capacity 2048 --config config.json"
TRAIN = "--data packed --config config.json --output_dir {out}/run"
RANKS = TRAIN + " --ddp_timeout 60"  # on two ranks
MIX = "--data packed packed --mix 1 1 --config config.json --output_dir {out}/run"


def pack(base, command="pack"):
    """The words of `pack` or `train` for `base`, with an option it already has replaced."""
    words = PACK if command == "pack" else ROWS
    return words.replace("{data}", base)


CASES = [
    *[Case("check", name, base, words) for name, base, words in READING],
    *[Case("check", name, base + " --tokenizer tokenizer", words) for name, base, words in PIXELS],
    *[
        Case("check", name, "rows.json", words, "pass --tokenizer too")
        for name, _, words in (
            *PIXELS, ("config", "", "--config config.json"), ("typed_tokens", "", TYPED),
            ("template_arg", "", ARGUMENT),
        )
    ],
    *[
        Case(command, name, base, words, "documents have no videos")
        for name, _, words in PIXELS[2:]
        for command, base in (
            ("check", "docs.jsonl --stage pretrain --tokenizer tokenizer"),
            ("pack", pack("docs.jsonl --stage pretrain")),
            ("train", pack("docs.jsonl --stage pretrain", "train")),
        )
    ],
    Case("check", "config", "docs.jsonl --stage pretrain --tokenizer tokenizer", "--config config.json",
         "documents have no videos"),
    Case("check", "config", "video.json --tokenizer timed", "--config timed.json"),
    Case("check", "template_arg", "rows.json --tokenizer tokenizer", ARGUMENT),
    Case("pack", "template_arg", pack("rows.json"), ARGUMENT),
    Case("train", "template_arg", pack("rows.json", "train"), ARGUMENT),
    Case("pack", "template_arg", pack("rows.json"), "--template-arg add_vision_id", "takes NAME=VALUE"),
    Case("pack", "template_arg", pack("rows.json"), ARGUMENT.replace("vision", "v"), "no argument 'add_v_id' to set"),
    Case("check", "typed_tokens", "boxes.json --tokenizer boxes", TYPED),
    Case("pack", "typed_tokens", pack("boxes.json").replace(" tokenizer ", " boxes "), TYPED),
    Case("train", "typed_tokens", pack("boxes.json", "train").replace(" tokenizer ", " boxes "), TYPED),
    Case("check", "config", "video.json --tokenizer tokenizer", "--config config.json", "only Qwen2.5-VL's"),
    Case("check", "tokenizer", "rows.json", "--tokenizer tokenizer"),
    Case("check", "data", "rows.json", "docs.jsonl"),
    Case("check", "bad", "damaged.json --decode", "--bad {out}/bad.jsonl"),
    Case("check", "png", "rows.json", "--png {out}/a.png"),
    Case("check", "json", "rows.json", "--json"),
    Case("check", "quiet", "rows.json", "--quiet"),
    # pack
    *[Case("pack", name, pack(base), words) for name, base, words in (*READING, *PIXELS, *PACKING[1:])],
    Case("pack", "max_bad", pack("rows.json"), "--max-bad 0.05", "pass --on-error skip to leave rows out"),
    Case("pack", "png", pack("rows.json"), "--png {out}/a.png"),
    Case("pack", "png", pack("rows.json --shard 1/1"), "--png {out}/a.png", "pass it to mmpack merge"),
    Case("pack", "config", pack("rows.json"), "--config config.json"),
    Case("pack", "frozen", pack("rows.json --config config.json"), "--frozen vision"),
    Case("pack", "frozen", pack("rows.json"), "--frozen vision", "pass --config too"),
    Case("pack", "on_overflow", pack("rows.json"), "--on-overflow split", "is for documents"),
    Case("pack", "train_on_prompt", pack("docs.jsonl --stage pretrain"), "--train-on-prompt", "have no turns"),
    Case("pack", "mask_history", pack("rows.json --train-on-prompt"), "--mask-history", "leave out"),
    Case("pack", "mask_thinking", pack("thought.json --train-on-prompt"), "--mask-thinking", "leave out"),
    Case("pack", "data", pack("rows.json"), "more.json"),
    Case("pack", "overwrite", "rows.json --tokenizer tokenizer --capacity 700 --out {copy}", "--overwrite"),
    Case("pack", "jobs", pack("rows.json"), "--jobs 1"),
    Case("pack", "ray", pack("rows.json"), "--ray"),
    Case("pack", "ray", pack("rows.json"), "--ray more.json", "takes HOST:PORT of a cluster, or auto"),
    Case("pack", "jobs", pack("rows.json --ray"), "--jobs 2", "Ray gives each chunk a core"),
    Case("pack", "shard", pack("rows.json"), "--shard 1/2"),
    Case("pack", "val_size", pack("rows.json"), "--val-size 4"),
    Case("pack", "val_size", pack("rows.json"), "--val-size 1.5", "must be a number of rows, or a share"),
    Case("pack", "val_size", pack("rows.json"), "--val-size inf", "--val-size is inf, not a number"),
    Case("pack", "video_fps", pack("video.json"), "--video-fps inf", "fps must be a positive number and"),
    Case("pack", "json", pack("rows.json"), "--json"),
    Case("pack", "quiet", pack("rows.json"), "--quiet"),
    # merge
    Case("merge", "overwrite", "{copy} part", "--overwrite"),
    Case("merge", "max_bad", "{out}/merged skipping", "--max-bad 0.01"),
    Case("merge", "max_bad", "{out}/merged part", "--max-bad 0.1", "the parts have no bad rows"),
    Case("merge", "png", "{out}/merged part", "--png {out}/a.png"),
    Case("merge", "json", "{out}/merged part", "--json"),
    Case("merge", "quiet", "{out}/merged part", "--quiet"),
    # inspect
    Case("inspect", "pack", "packed", "--pack 1"),
    Case("inspect", "row", "packed", "--row 1"),
    Case("inspect", "segment", "packed", "--segment 1"),
    Case("inspect", "segment", "packed --row 1", "--segment 0", "leave one of the two out"),
    Case("inspect", "tokenizer", "moved", "--tokenizer tokenizer"),
    Case("inspect", "png", "packed", "--png {out}/a.png"),
    Case("inspect", "html", "packed", "--html {out}/a.html"),
    Case("inspect", "json", "packed", "--json"),
    Case("inspect", "quiet", "packed", "--quiet"),
    # train on rows
    *[Case("train", name, pack(base, "train"), words)
      for name, base, words in (*READING, *PIXELS, *PACKING[1:])],
    Case("train", "capacity", "--data rows.json --tokenizer tokenizer --config config.json", "--capacity 2048"),
    Case("train", "tokenizer", "--data rows.json --capacity 2048 --config config.json", "--tokenizer tokenizer"),
    Case("train", "data", pack("rows.json", "train"), "--data more.json"),
    Case("train", "frozen", pack("rows.json", "train"), "--frozen vision"),
    Case("train", "on_changed_data", pack("rows.json", "train"), "--on-changed-data raise", "are read and packed now"),
    Case("train", "max_bad", pack("rows.json", "train"), "--max-bad 0.05", "pass --on-error skip or --on-bad-image"),
    Case("train", "max_bad", pack("rows.json --on-bad-image drop", "train"), "--max-bad 0.5"),
    # train on packs
    *[Case("train", name, TRAIN, f"{flag(name)} {value}".strip(), "packed is packed, and mmpack pack has settled")
      for name, value in PACKED_ALREADY.items()],
    Case("train", "max_bad", TRAIN, "--max-bad 0.05", "pass --on-bad-image drop"),
    Case("train", "max_bad", TRAIN + " --on-bad-image drop", "--max-bad 0.5"),
    Case("train", "media_dir", TRAIN, "--media-dir pictures"),
    Case("train", "on_bad_image", TRAIN, "--on-bad-image drop"),
    Case("train", "on_changed_data", TRAIN.replace("packed", "changed"), "--on-changed-data warn"),
    Case("train", "frozen", TRAIN, "--frozen merger"),
    Case("train", "eval_data", TRAIN, "--eval-data packed"),
    Case("train", "eval_data", TRAIN + " --eval-data packed", "--eval-data a=packed", "--eval-data packed has no name, others have"),
    Case("train", "eval_data", TRAIN, "--eval-data a=packed b=packed"),
    Case("train", "early_stopping_patience", TRAIN + " --eval-data packed", "--early-stopping-patience 2"),
    Case("train", "early_stopping_patience", TRAIN + " --eval-data packed", "--early-stopping-patience 0",
         "--early-stopping-patience must be positive, got 0"),
    Case("train", "early_stopping_patience", TRAIN, "--early-stopping-patience 2", "there is no evaluation set"),
    Case("train", "options", TRAIN, "--options options.yaml"),
    Case("train", "options", TRAIN, "--options unknown.yaml", "unknown.yaml: max_step is not an option of mmpack train or TrainingArguments; did you mean max_steps?"),
    Case("train", "options", TRAIN, "--options empty.yaml", "empty.yaml has no options; write one per line"),
    Case("train", "options", TRAIN, "--options broken.yaml", "broken.yaml is not a YAML file: "),
    Case("train", "options", TRAIN, "--options twice.yaml", "twice.yaml: max_steps is given twice"),
    Case("train", "options", TRAIN, "--options none.yaml", "none.yaml: max_steps has no value"),
    Case("train", "eval_data", TRAIN, "--eval-data packed rows.json", "one of 2 --eval-data, but a packed folder"),
    Case("train", "tokenizer", TRAIN + " --eval-data rows.json", "--tokenizer tokenizer"),
    Case("train", "lora_rank", "--data packed --model model", "--lora-rank 4"),
    Case("train", "lora_rank", TRAIN, "--lora-rank 4", "LoRA adapts trained weights (--lora-rank); pass --model"),
    Case("train", "weights_dtype", TRAIN, "--weights-dtype bfloat16"),
    Case("train", "loss_reduction", TRAIN, "--loss-reduction sample"),
    Case("train", "loss_reduction", pack("rows.json", "train"), "--loss-reduction sqrt"),
    Case("train", "context_size", RANKS, "--context-size 2"),
    Case("train", "context_size", RANKS, "--context-size 3", "the run's processes, 2, do not divide into groups of 3"),
    Case("train", "context_size", TRAIN, "--context-size 2", "the run's processes, 1, do not divide into groups of 2"),
    Case("train", "context_size", TRAIN, "--context-size 0", "--context-size must be positive, got 0"),
    Case("train", "on_bad_image", RANKS + " --context-size 2", "--on-bad-image drop", "another pack than the ranks"),
    Case("train", "source_weight", pack("rows.json --data more.json", "train"), "--source-weight more.json=2"),
    Case("train", "source_weight", TRAIN, "--source-weight rows.json=2", "which changes nothing; leave it out"),
    Case("train", "source_weight", TRAIN, "--source-weight rows=2", "the data's sources are 'rows.json'"),
    Case("train", "source_weight", TRAIN, "--source-weight rows.json", "takes NAME=FACTOR, each name once"),
    Case("train", "model", "--data packed", "--model model"),
    Case("train", "config", "--data packed", "--config config.json"),
    Case("train", "steps", TRAIN, "--steps 3"),
    Case("train", "data", TRAIN, "--data rows.json", "a packed folder must be the only one; mix them with --mix"),
    Case("train", "mix", TRAIN, "--data packed --mix 1 3"),
    Case("train", "mix", TRAIN, "--mix 1 3", "--mix has 2 weights for 1 --data; pass one for each"),
    Case("train", "mix", TRAIN, "--data packed --mix 1 0", "the weight of 'packed-2' is 0.0, not a positive number"),
    Case("train", "mix_by", MIX, "--mix-by samples"),
    Case("train", "plan_seed", MIX, "--plan-seed 7"),
    Case("train", "capacity", MIX, "--capacity 512", "packed and packed are packed, and mmpack pack has settled"),
    Case("train", "mix_by", TRAIN, "--mix-by samples", "there is one source of data; pass --mix too"),
    Case("train", "epoch_tokens", MIX, "--epoch-tokens 9000"),
    Case("train", "epoch_tokens", MIX, "--epoch-tokens 9", "must be at least the tokens of a pack, 2,048, got 9"),
    Case("train", "epoch_tokens", TRAIN, "--epoch-tokens 9000", "there is one source of data; pass --mix too"),
    Case("train", "impl", TRAIN, "--impl libraries"),
    Case("train", "json", TRAIN, "--json"),
    Case("train", "quiet", TRAIN, "--quiet"),
    # others
    Case("tune", "models", "config.json", "wide.json"),
    Case("tune", "capacity", "config.json", "--capacity 1000"),
    Case("tune", "capacity", "config.json", "--capacity 0", "--capacity must be positive, got 0"),
    Case("tune", "context_size", "config.json", "--context-size 2"),
    Case("tune", "context_size", "config.json", "--context-size 3", "do not divide among the 3 ranks"),
    Case("tune", "context_size", "config.json", "--context-size 0", "--context-size must be positive, got 0"),
    Case("tune", "dtype", "config.json", "--dtype float16"),
    Case("tune", "json", "config.json", "--json"),
    Case("tune", "quiet", "config.json", "--quiet"),
    Case("demo", "write", "", "--write {out}/kept"),
    Case("demo", "json", "", "--json"),
    Case("demo", "quiet", "", "--quiet"),
    Case("env", "json", "", "--json"),
    Case("env", "quiet", "", "--quiet"),
]  # fmt: skip
# Required, and so in every case of their command.
REQUIRED = {
    ("pack", "out"), ("pack", "tokenizer"), ("pack", "capacity"), ("merge", "out"), ("merge", "parts"),
    ("inspect", "data"),
}  # fmt: skip


def turns(*texts):
    names = ("human", "gpt")
    return [{"from": names[n % 2], "value": text} for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of data files, tokenizers, configs and stores."""
    folder = tmp_path_factory.mktemp("options")
    write_data(folder, 4)
    (folder / "pictures").mkdir()
    for name, side in (("a.png", 140), ("b.png", 280), ("pictures/c.png", 112)):
        Image.effect_noise((side, side), 60).convert("RGB").save(folder / name)
    for name, text in {
        "options": "max_steps: 3", "unknown": "max_step: 3", "empty": "", "broken": "[", "none": "max_steps:",
        "twice": "max_steps: 3\nmax_steps: 4",
    }.items():  # fmt: skip
        (folder / f"{name}.yaml").write_text(text)
    damaged = bytearray((folder / "b.png").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (folder / "damaged.png").write_bytes(damaged)

    def write(name, *rows):
        text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    asked = "<image>What is it?"
    row = {"conversations": turns(asked, "Bars.", "How many?", "Six bars."), "images": ["a.png"]}
    other = {"conversations": turns(asked, "Eggs and hats."), "images": ["b.png"]}
    rows = [row, other, {"conversations": turns("Hello", "All together.")}] * 8
    write("rows.json", *rows)
    write("more.json", other)
    write("named/data.json", {"ask": "Hello", "say": "All together."})
    columns = {"columns": {"prompt": "ask", "response": "say"}, "file_name": "data.json"}
    both = {"one": {"file_name": "data.json"}, "two": columns}
    (folder / "named/dataset_info.json").write_text(json.dumps(both))
    write("elsewhere.json", {**other, "images": ["c.png"]})
    write("uri.json", {**other, "images": ["data:image/png;base64," + b64(folder / "a.png")]})
    write("unmarked.json", {**other, "conversations": turns("What?", "Bars.")})
    write("unmarked.jsonl", {"text": "Bars.", "images": ["a.png"]})
    write("docs.jsonl", {"text": "All together that makes six bars."})
    write("damaged.json", *[{**other, "images": ["damaged.png"]}, *[other] * 23])
    write("long.json", {"conversations": turns("Hello", "bars " * 3000)}, other)
    video = {"conversations": turns("<video>What is it?", "Bars."), "videos": [["b.png"] * 8]}
    write("video.json", video)
    template = folder / "tokenizer" / "chat_template.jinja"
    template.write_text(
        template.read_text().replace("{% else %}{{ part.text", VIDEO_PART + "{{ part.text")
    )
    shutil.copytree(folder / "tokenizer", folder / "timed")
    processor = json.loads((folder / "timed/preprocessor_config.json").read_text())
    processor["processor_class"] = "Qwen2_5_VLProcessor"
    (folder / "timed/preprocessor_config.json").write_text(json.dumps(processor))
    vision = Encoder.from_folder(folder / "tokenizer").vision
    tiny_config(4096, vision=vision, family="qwen2_5_vl").to_json_file(folder / "timed.json")
    shutil.copy(folder / "config.json", folder / "model.json")
    tiny_config(8192, vision=vision).to_json_file(folder / "wide.json")
    write("thought.json", {"conversations": turns("Hello", "<think>All</think>together")})
    write("boxes.json", {"conversations": turns("Hello", "At <|box_start|>(1,2)")})
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|box_start|>"]})
    shutil.copytree(folder / "tokenizer", folder / "boxes")
    tokenizer.save_pretrained(folder / "boxes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(mmpack.errors, "_JUDGED_FROM", 24)
        words = "pack rows.json --tokenizer tokenizer --capacity 2048 --quiet --out "
        assert main((words + "packed").split()) == 0
        assert main((words + "part --shard 1/1").split()) == 0
        skip = "skipping --shard 1/1 --decode --on-error skip"
        assert main((words.replace("rows", "damaged") + skip).split()) == 0
        shutil.copytree("tokenizer", "gone")
        assert main((words.replace("tokenizer tokenizer", "tokenizer gone") + "moved").split()) == 0
        shutil.rmtree("gone")
        write("later.json", *rows)
        assert main((words.replace("rows", "later") + "changed").split()) == 0
        write("later.json", *rows[:1])
    return folder


def b64(path):
    return base64.b64encode(path.read_bytes()).decode()


known = {}  # outcomes of commands that several cases share


@pytest.fixture
def run(world, tmp_path, monkeypatch, capsys):
    """Run a command: (exit code, what it printed, made and handed on)."""
    monkeypatch.chdir(world)
    monkeypatch.setattr(mmpack.errors, "_JUDGED_FROM", 24)
    seen = {}
    from_folder, index_rows = Encoder.from_folder, mmpack.cli.pack.index_rows

    def keep_spec(*args, **options):
        encoder = from_folder(*args, **options)
        seen["video"] = encoder.vision.video
        return encoder

    def keep_jobs(*args, jobs, ray, **options):
        seen.update(jobs=jobs, ray=ray)
        return index_rows(*args, jobs=1, **options)

    def patch(model, impl, context):
        seen.update(impl=impl, context=context)
        return model

    def train(model, dataset, args, loss_reduction, eval_dataset, patience, processor):
        names = ("on_bad_image", "max_bad", "media_folders", "capacity")
        seen["trained"] = {name: getattr(dataset, name) for name in names}
        seen["trained"] |= dataset.fingerprint() | {"steps": args.max_steps}
        sets = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        seen["evaluated"] = {name: one and one.fingerprint() for name, one in sets.items()}
        seen["patience"] = patience
        seen["trained"]["reduction"] = loss_reduction
        return {"steps": 0}

    monkeypatch.setattr(Encoder, "from_folder", keep_spec)
    monkeypatch.setattr("mmpack.cli.pack.index_rows", keep_jobs)
    monkeypatch.setattr("mmpack.store.ray_chunks.find_spec", lambda name: name)
    monkeypatch.setattr("mmpack.hf.training.train", train)
    monkeypatch.setattr("mmpack.hf.model_patch.patch_model", patch)
    monkeypatch.setattr(
        "mmpack.hf.loading.load_model", lambda *args: seen.update(loaded=args) or nn.Module()
    )
    monkeypatch.setattr(
        "mmpack.hf.model_parts.freeze", lambda model, parts: seen.update(frozen=parts)
    )
    monkeypatch.setattr(
        "mmpack.hf.lora.add_lora", lambda model, rank, name, seed: seen.update(lora=rank) or model
    )
    for picture in ("plots.check_picture", "pack_report.pack_picture", "plots.inspect_picture"):
        monkeypatch.setattr(f"mmpack.cli.{picture}", lambda *args: Path(args[-1]).touch())
    monkeypatch.setattr(tuning, "machine", lambda: {"GPU": "NVIDIA H200"})
    monkeypatch.setattr(tuning, "cache_folder", lambda: Path("cache"))
    monkeypatch.setattr(
        tuning, "run_trials",
        lambda make, jobs, limit: seen.update(jobs=jobs) or ((job, Outcome("a", {"a": 1.0})) for job in jobs),
    )  # fmt: skip
    monkeypatch.setattr("mmpack.cli.demo.run_demo", lambda folder: print("figures", folder) or {})
    places = iter(range(9))

    def outcome(words):
        if words in known:
            return known[words]
        out = tmp_path / str(next(places))
        out.mkdir()
        if "--ddp_timeout" in words:
            monkeypatch.setattr(TrainingArguments, "world_size", 2)
        if "{copy}" in words:
            shutil.copytree("packed", out / "copy")
        seen.clear()
        placed = words.replace("{copy}", f"{out}/copy").replace("{out}", str(out))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                code = main(placed.split())
            except SystemExit as ended:
                code = ended.code
        printed = capsys.readouterr()
        text = re.sub(r"[\d.,]+ s\b|\"seconds\": [\d.]+", "", printed.out).replace(str(out), "")
        made = {str(p.relative_to(out)): content(p) for p in sorted(out.rglob("*"))}
        handed = repr(seen).replace(str(out), "")
        known[words] = (code, text, made, handed), printed.err.replace("\n", " ")
        return known[words]

    return outcome


def content(path):
    """A store's packs and which part it is; of other files, that they are there."""
    if not (path / "mmpack.json").is_file():
        return ""
    store = open_store(path)
    part = store.about.part
    if part is not None:
        return part
    return PackedDataset.from_store(path, "warn").fingerprint()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.command}-{case.options}")
def test_an_option_acts_or_is_refused(case, run):
    result, error = run(f"{case.command} {case.base} {case.words}")
    if case.refused:
        assert result[0] == 1
        assert case.refused in error
        return
    assert "not apply" not in error  # a refusal is a difference, too
    assert result != run(f"{case.command} {case.base}")[0], error


def test_every_option_has_a_case():
    every = {
        (command, one.name)
        for command, (kind, _) in COMMANDS.items()
        for one in dataclasses.fields(kind)
        if one.metadata
    }
    assert every == REQUIRED | {(case.command, case.options) for case in CASES if not case.refused}
    assert {(case.command, case.options) for case in CASES} <= every


def test_python_refuses_videos_of_documents_too(world):
    with pytest.raises(ValueError, match=r"\(fps\) do not apply: documents have no videos"):
        Encoder.from_folder(world / "tokenizer", video={"fps": 1.0}, stage="pretrain")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            "pack a --tokenizer t --out o --capacity 8 --capacity 9",
            "--capacity is given twice, 8 and 9",
        ),
        ("train --data a --steps 2 --steps 3", "--steps is given twice, 2 and 3"),
        (
            "train --data a --steps 2 --max-steps=3",
            "--max_steps is given twice (--steps is short for it)",
        ),
        ("train --data a --learning_rate 1 --learning-rate 1", "--learning_rate is given twice"),
    ],
)
def test_a_second_value_is_refused(words, text, capsys):
    """The first one would be forgotten."""
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    assert text in capsys.readouterr().err


# TrainingArguments

# What they do is transformers' to say, and the same in mmpack train as in a script.
TRAINERS = set(
    """
    output_dir per_device_train_batch_size max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
    warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps
    average_tokens_across_devices max_grad_norm bf16 fp16 tf32 activation_checkpointing gradient_checkpointing
    torch_compile torch_compile_backend torch_compile_mode use_liger_kernel use_cache neftune_noise_alpha
    torch_empty_cache_steps logging_strategy logging_first_step log_on_each_node
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to save_strategy
    enable_jit_checkpoint full_determinism seed use_cpu accelerator_config
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug skip_memory_metrics
    resume_from_checkpoint local_rank
    """.split()
)
UNPASSABLE = {
    "liger_kernel_config",
    "parallelism_config",
}  # transformers' parser takes no value for them
# Where a needed option is there by default: what takes it away.
WITHOUT = {
    "num_train_epochs": ["--max_steps", "3"],
    "save_steps": ["--save_strategy", "epoch"],
    "logging_steps": ["--logging_strategy", "epoch"],
    **dict.fromkeys(
        ("save_total_limit", "save_only_model", "save_on_each_node", "push_to_hub"),
        ["--save_strategy", "no"],
    ),
}


def test_every_training_argument_is_known():
    names = {one.name for one in dataclasses.fields(TrainingArguments)}
    needed = {name for group, _, _ in NEEDED for name in group}
    assert names == TRAINERS | UNPASSABLE | set(REFUSED) | set(EVALUATION) | needed
    assert not TRAINERS & (set(REFUSED) | set(EVALUATION) | needed)
    assert set(REFUSED) & needed == {"metric_for_best_model"}  # other metrics are refused


def value_of(name):
    """A value that changes something in a Trainer of one's own."""
    if name in REFUSED and True in REFUSED[name][0]:
        return "False"
    default = next(one for one in dataclasses.fields(TrainingArguments) if one.name == name)
    kinds = {
        "eval_strategy": "steps",
        "hub_strategy": "end",
        "train_sampling_strategy": "sequential",
    }
    if name in kinds:
        return kinds[name]
    if "dict" in str(default.type):
        return '{"a": 1}'
    words = str(default.type)
    return "True" if "bool" in words else "3" if "int" in words or "float" in words else "a"


@pytest.mark.parametrize(
    "name", [*REFUSED, *EVALUATION, *(name for group, _, _ in NEEDED for name in group)]
)
def test_a_training_argument_without_effect_is_refused(name):
    words = [f"--{name}", value_of(name), "--use_cpu", *WITHOUT.get(name, [])]
    with pytest.raises(ValueError, match=f"^--{name} .*does not apply: "):
        parse_training_arguments(words)


def test_what_is_given_reaches_the_trainer(tmp_path):
    """Also where mmpack train has a default of its own."""
    given = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 2, "max_steps": 7, "learning_rate": 0.5,
        "lr_scheduler_type": "cosine", "warmup_steps": 3, "optim": "adafactor", "optim_args": "a=1",
        "weight_decay": 0.25, "adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 0.5,
        "gradient_accumulation_steps": 3, "average_tokens_across_devices": False, "max_grad_norm": 0.5,
        "gradient_checkpointing": True, "neftune_noise_alpha": 1.5, "torch_empty_cache_steps": 3,
        "logging_strategy": "epoch", "logging_first_step": True, "log_on_each_node": False,
        "log_level": "error", "log_level_replica": "error",
        "disable_tqdm": True, "save_strategy": "epoch", "full_determinism": True, "seed": 5, "use_cpu": True,
        "use_cache": True, "dataloader_num_workers": 2, "dataloader_persistent_workers": True,
        "dataloader_prefetch_factor": 3, "dataloader_multiprocessing_context": "spawn",
        "ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 3, "ddp_broadcast_buffers": True,
        "ddp_static_graph": True, "ddp_timeout": 60, "skip_memory_metrics": False,
        "resume_from_checkpoint": "last",
    }  # fmt: skip
    args = parse_training_arguments(
        [str(w) for name, value in given.items() for w in (f"--{name}", value)]
    )
    assert {name: getattr(args, name) for name in given} == given


@pytest.mark.parametrize("name", sorted(UNPASSABLE))
def test_no_value_is_taken(name, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_training_arguments([f"--{name}", '{"a": 1}'])
    assert re.search(rf"argument --{name}/\S+: invalid \w+ value", capsys.readouterr().err)


def test_what_is_so_anyway_may_be_said():
    words = "--do_train --do_eval False --eval_strategy no --remove_unused_columns False --use_cpu"
    args = parse_training_arguments(
        [*words.split(), "--save_steps", "7", "--num_train_epochs", "2"]
    )
    assert (args.save_steps, args.num_train_epochs, args.eval_strategy) == (7, 2, "no")
    for words in ("--save_strategy best", "--lr_scheduler_type greedy"):
        with pytest.raises(ValueError, match=f"^{words} does not apply: there is no eval"):
            parse_training_arguments(words.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {"eval_strategy": "epoch", "save_strategy": "steps"}),
        ("--save_strategy epoch", {"eval_strategy": "epoch", "save_strategy": "epoch"}),
        ("--save_steps 7 --save_strategy steps", {"eval_strategy": "steps", "eval_steps": 7}),
        ("--eval_strategy steps", {"eval_steps": 500}),
        ("--load_best_model_at_end", {"eval_strategy": "epoch", "save_strategy": "epoch"}),
        (
            "--load_best_model_at_end --eval_strategy steps --eval_steps 7",
            {"eval_steps": 7, "save_strategy": "steps", "save_steps": 7},
        ),
        ("--save_strategy best --eval_delay 3", {"eval_strategy": "epoch", "eval_delay": 3}),
        ("--per_device_eval_batch_size 2", {"per_device_eval_batch_size": 2}),
        (
            "--load_best_model_at_end --metric_for_best_model loss",
            {"metric_for_best_model": "loss", "greater_is_better": False},
        ),
    ],
)
def test_evaluation_options_act_with_an_evaluation_set(words, expected):
    args = parse_training_arguments([*words.split(), "--use_cpu"], evaluates=True)
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--eval_strategy no", "--eval-data would never be evaluated"),
        ("--do_eval False", "--eval-data would never be evaluated"),
        ("--metric_for_best_model accuracy", "mmpack train evaluates the loss alone"),
        ("--metric_for_best_model loss", "it needs --load_best_model_at_end"),
        ("--eval_steps 3", "it needs --eval_strategy steps"),
    ],
)
def test_evaluation_options_without_effect_are_refused(words, text):
    with pytest.raises(ValueError, match=f"^--{words[2:].split()[0]} .*does not apply: {text}"):
        parse_training_arguments([*words.split(), "--use_cpu"], evaluates=True)


def test_a_backend_of_one_process_is_refused():
    from accelerate.state import PartialState

    PartialState._reset_state()
    try:
        text = (
            "^--ddp_backend gloo does not apply: there is one process; start several with torchrun"
        )
        with pytest.raises(ValueError, match=text):
            parse_training_arguments(["--ddp_backend", "gloo", "--use_cpu"])
    finally:
        PartialState._reset_state()


def test_a_file_of_options_is_the_command_line(tmp_path):
    """In every form a value has; what is passed as well replaces the file's, under either name."""
    file = tmp_path / "run.yaml"
    file.write_text(
        """
        data: [a.json, b.json]
        eval_data: {ocr: c.json, chat: [d.json, e.json]}
        tokenizer: t
        capacity: 512
        frozen: [vision, merger]
        template-arg: {enable_thinking: false, name: x y}
        mask_thinking: true
        decode: false
        learning_rate: 1e-5
        bf16: true
        average_tokens_across_devices: false
        max_steps: 3
        report_to: [none]
        lr_scheduler_kwargs: {min_lr_rate: 0.1}
        """
    )
    words = ["train", "--options", str(file), "--steps", "5", "--capacity=700", "--use_cpu"]
    _, options = parse(words)
    assert options.data == ("a.json", "b.json")
    assert options.eval_sets() == {"ocr": ("c.json",), "chat": ("d.json", "e.json")}
    assert (options.capacity, options.steps, options.frozen) == (700, 5, ("vision", "merger"))
    assert options.template_arg == ("enable_thinking=false", 'name="x y"')
    assert (options.mask_thinking, options.decode) == (True, False)
    assert "decode" not in options.given
    assert options.words == tuple(words)
    args = parse_training_arguments(options.training)
    assert (args.learning_rate, args.bf16, args.average_tokens_across_devices) == (
        1e-5,
        True,
        False,
    )
    assert (args.report_to, args.lr_scheduler_kwargs) == ([], {"min_lr_rate": 0.1})


def test_the_docs_file_of_options_is_read(tmp_path):
    text = (Path(__file__).parent.parent / "docs" / "trainer.md").read_text(encoding="utf-8")
    (tmp_path / "run1.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    _, options = parse(["train", "--options", str(tmp_path / "run1.yaml")])
    assert (options.lora_rank, options.frozen) == (16, ("vision", "merger"))
    args = parse_training_arguments([*options.training, "--use_cpu"])
    assert (args.learning_rate, args.lr_scheduler_kwargs) == (1e-4, {"min_lr_rate": 0.1})


# What an option needs


@pytest.mark.parametrize(
    ("words", "package"),
    [
        ("--report_to wandb", "wandb"),
        ("--report_to neptune", "neptune"),
        ("--report_to tensorboard", "tensorboard"),
        ("--optim adamw_8bit", "bitsandbytes"),
        ("--optim paged_lion_32bit", "bitsandbytes"),
        ("--optim ademamix", "bitsandbytes"),
        ("--use_liger_kernel", "liger-kernel"),
        ("--deepspeed zero3.json", "deepspeed"),
    ],
)
def test_a_missing_package_is_named_before_anything_is_loaded(words, package, monkeypatch, capsys):
    monkeypatch.setattr(training_options, "find_spec", lambda name: None)
    assert main(["train", "--data", "nowhere", *words.split()]) == 1
    option = words.replace(" zero3.json", "")
    message = f"mmpack: {option} needs {package}, which is not installed; pip install {package}"
    assert capsys.readouterr().err.splitlines()[-1] == message


def test_a_folder_of_runs_is_not_the_package(tmp_path, monkeypatch, capsys):
    """wandb writes runs to a folder of its name, which Python takes for a package."""
    if find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert find_spec("wandb") is not None
    assert main(["train", "--data", "nowhere", "--report_to", "wandb"]) == 1
    assert "--report_to wandb needs wandb, which is not installed" in capsys.readouterr().err


class ConnectError(Exception):
    __module__ = "httpx"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ModuleNotFoundError("no", name="lomo_optim.adam"), "lomo_optim is not installed; pip install lomo_optim"),
        (ModuleNotFoundError("no", name="mpi4py"), "start it with torchrun"),
        (ModuleNotFoundError("Try:\n it", name="The 'x>=1' distribution"), "Try: it"),
        (ImportError("You need to install `x`:\n `pip install x`"), "You need to install `x`: `pip install x`"),
        (RuntimeError("XCallback requires x to be installed. Run `pip install x`."), "requires x to be installed"),
        (RuntimeError("XCallback requires X_URL environment variable to be set."), "requires X_URL"),
        (ConnectError("refused"), r"the Hugging Face Hub cannot be reached \(refused\); leave out --push_to_hub"),
    ],
)  # fmt: skip
def test_what_is_missing_while_training_is_told_in_a_line(error, text):
    with pytest.raises(ValueError, match=text), unavailable():
        raise error


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError(name="mmpack.x"), RuntimeError("x"), KeyError("x")]
)
def test_other_errors_keep_their_traces(error):
    with pytest.raises(type(error)) as found, unavailable():
        raise error
    assert found.value is error


def test_a_package_that_is_nobodys_extra(run, monkeypatch, capsys):
    def lacks(options):
        raise ModuleNotFoundError(name="surprise.inner")

    monkeypatch.setitem(mmpack.cli.main._COMMANDS, "env", lacks)
    assert main(["env"]) == 1
    assert capsys.readouterr().err == "mmpack: surprise is not installed; pip install surprise\n"

"""Exit codes and examples in the help of the commands."""

from __future__ import annotations

CODES = "exit code: 0 done, 1 refused with a reason, 2 usage, 130 Ctrl-C, 141 broken pipe"
CHECK_EXAMPLES = """exit code: 0 every row is usable, 1 some are refused, 2 usage

examples:
  mmpack check data/train.json
  mmpack check data/train.json --tokenizer Qwen/Qwen2-VL-2B-Instruct --png lengths.png --bad refused.jsonl
  mmpack check data/train.json --quiet --bad refused.jsonl
"""
PACK_EXAMPLES = """examples:
  mmpack pack data/train.json --tokenizer Qwen/Qwen2-VL-2B-Instruct --capacity 8192 --out packed
  mmpack pack data/train.json --tokenizer Qwen/Qwen2-VL-2B-Instruct --config Qwen/Qwen2-VL-2B-Instruct \\
      --capacity 8192 --out packed --json
  mmpack pack data --tokenizer Qwen/Qwen2-VL-2B-Instruct --capacity 8192 --out parts/3 --shard 3/8
  mmpack pack data --tokenizer Qwen/Qwen2-VL-2B-Instruct --capacity 8192 --out packed --ray head:6379
  mmpack pack docs.jsonl --stage pretrain --tokenizer Qwen/Qwen2-VL-2B --capacity 8192 --out packed
"""
MERGE_EXAMPLES = """Machine I of N makes a part: mmpack pack ... --shard I/N --out parts/I

examples:
  mmpack merge packed parts/1 parts/2 parts/3
  mmpack merge packed parts/* --overwrite
"""
INSPECT_EXAMPLES = """\
Supervised tokens are green, or between [[ and ]] if the output is not a terminal. The placeholders
of an image are shown as one word; --json has the exact positions.

examples:
  mmpack inspect packed
  mmpack inspect packed --row 1843
  mmpack inspect packed --pack 17 --png pack17.png | less
  mmpack inspect packed --pack 0-19 --html packs.html
  mmpack inspect packed --pack 17 --segment 3 --tokenizer Qwen/Qwen2-VL-2B-Instruct
"""
TRAIN_EXAMPLES = """Every option of transformers' TrainingArguments works too (--learning_rate, --bf16, ...).
--resume_from_checkpoint FOLDER resumes a run; `last`: the newest complete checkpoint, else a new run.
The last line printed is a JSON object. With --json it is the only one, and Trainer's log goes to stderr.

examples:
  mmpack train --data packed --model Qwen/Qwen2-VL-2B-Instruct --bf16 --output_dir run1
  mmpack train --data packed --model Qwen/Qwen2-VL-2B-Instruct --bf16 --output_dir run1 \\
      --resume_from_checkpoint last
  mmpack train --options run1.yaml --data packed --learning_rate 2e-5
  mmpack train --data packed --model Qwen/Qwen2-VL-2B-Instruct --bf16 --output_dir run1 --frozen vision \\
      --frozen merger --lora-rank 16 --eval-data packed_eval --load_best_model_at_end
  mmpack train --data chat docs --mix 0.7 0.3 --eval-data chat:val --model Qwen/Qwen2-VL-2B-Instruct --bf16
  mmpack train --data data/train.json --tokenizer Qwen/Qwen2-VL-2B-Instruct --capacity 8192 \\
      --config tiny_config.json --steps 20
"""
TUNE_EXAMPLES = """\
Implementations run in a child process, so one that crashes or hangs is left out. Results are kept in
the user's cache folder; patch_model(impl="auto"), which mmpack train uses, reads them. mmpack env shows them.

examples:
  mmpack tune Qwen/Qwen2-VL-2B-Instruct
  mmpack tune run1/config.json --capacity 32768 --json
"""
DEMO_EXAMPLES = """examples:
  mmpack demo
  mmpack demo --write demo_data
"""
ENV_EXAMPLES = """\
Paste the output into bug reports. Missing and broken packages are listed; the command never fails.

examples:
  mmpack env
  mmpack env --json
"""

"""Training and serving agree: a prompt's ids are those of transformers' own processor."""

from dataclasses import replace

import numpy as np
import pytest
from builders import encode_one, stock_processor
from PIL import Image

from mmpack import Encoder, Reader, VisionSpec, assemble, render_prompt
from mmpack.types import ImageRef

MAX_PIXELS = 28 * 28 * 64


@pytest.fixture(scope="module")
def processor(tokenizer):
    return stock_processor(tokenizer, MAX_PIXELS)


@pytest.fixture(scope="module")
def spec(processor):
    return VisionSpec.from_processor(processor)


@pytest.fixture(scope="module")
def encoder(tokenizer, spec):
    return Encoder(tokenizer, spec)


def as_chat(messages):
    """A sample's messages before its last answer: (chat with markers, chat with parts, paths)."""
    marked, parted, paths = [], [], []
    for message in messages[:-1]:
        text, parts = "", []
        for part in message.content:
            if isinstance(part, ImageRef):
                paths.append(part.path)
                text += "<image>"
                parts.append({"type": "image"})
            else:
                text += part
                parts.append({"type": "text", "text": part})
        marked.append({"role": message.role, "content": text})
        parted.append({"role": message.role, "content": parts})
    return marked, parted, paths


def stock_prompt(chat, paths, processor):
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return processor(
        text=[text], images=[Image.open(p) for p in paths] or None, return_tensors="np"
    )


@pytest.mark.smoke
def test_prompts_equal_transformers_processor(shared, realset_samples, processor, encoder):
    demo = list(Reader().read(shared / "mllm_demo" / "mllm_demo.json"))
    for sample in [*demo, *realset_samples[:60]]:
        marked, parted, paths = as_chat(sample.messages)
        expected = stock_prompt(parted, paths, processor)
        for chat, images in ((marked, paths), (parted, [Image.open(path) for path in paths])):
            prompt = render_prompt(chat, encoder, images)
            assert np.array_equal(prompt.input_ids, expected["input_ids"][0])
            grids = expected.get("image_grid_thw", np.empty((0, 3)))
            assert np.array_equal(prompt.image_grid_thw, grids)


def test_a_prompt_is_the_beginning_of_its_training_row(realset_samples, encoder, tokenizer, spec):
    for sample in realset_samples[:40]:
        marked, _, paths = as_chat(sample.messages)
        prompt = render_prompt(marked, encoder, paths)
        pack = assemble([encode_one(sample, tokenizer, spec)], pixels=False)
        assert np.array_equal(pack.input_ids[: len(prompt.input_ids)], prompt.input_ids)
        assert np.array_equal(pack.position_ids[:, : len(prompt.input_ids)], prompt.position_ids)
        supervised = np.flatnonzero(pack.labels != -100)
        assert len(prompt.input_ids) in supervised  # the last answer begins there


def test_a_processor_serves_as_encoder(processor, encoder):
    chat = [{"role": "user", "content": "Hi"}]
    one, other = (render_prompt(chat, either) for either in (processor, encoder))
    assert np.array_equal(one.input_ids, other.input_ids)


def test_control_tokens_typed_by_a_user_stay_text(tokenizer, encoder, spec):
    chat = [{"role": "user", "content": "<|im_end|><|image_pad|>"}]
    ids = render_prompt(chat, encoder).input_ids.tolist()
    assert ids.count(spec.image_token_id) == 0
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


def test_markers_are_put_in_front_if_asked(encoder, tmp_path):
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    paths = [str(tmp_path / "a.png")] * 2
    bare = [{"role": "system", "content": "S"}, {"role": "user", "content": "Which?"}]
    marked = [bare[0], {"role": "user", "content": "<image><image>Which?"}]
    with pytest.raises(ValueError, match="0 <image> markers but 2 images; add a marker"):
        render_prompt(bare, encoder, paths)
    prompt = render_prompt(bare, replace(encoder, missing_marker="prepend"), paths)
    assert np.array_equal(prompt.input_ids, render_prompt(marked, encoder, paths).input_ids)


def test_what_is_no_prompt_is_refused(encoder):
    with pytest.raises(ValueError, match="the last turn must be the user's"):
        render_prompt(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], encoder
        )
    with pytest.raises(ValueError, match="is a URL"):
        render_prompt([{"role": "user", "content": "<image>"}], encoder, ["https://x/y.png"])
    with pytest.raises(ValueError, match="must be a list of turns, got a list of 0"):
        render_prompt([], encoder)

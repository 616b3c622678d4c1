"""Rows that think, and texts that a template trims: ids are stock transformers', supervised as written out
here."""

import pytest
from test_templates import (
    CALL,
    IN_XML,
    TEMPLATES,
    TOOL,
    answer,
    base,
    encoded,
    encoder_of,
    marked,
    picture,
    result,
    stock_ids,
    user,
)

from mmpack import render_prompt

__all__ = ["base", "encoder_of", "picture"]
THINKING = sorted(set(TEMPLATES) - {"qwen3_vl", "qwen2_5_vl"})
SPLITTING = sorted(set(THINKING) - {"qwen3_8"})  # take a thought out of the text
CALLED = '<tool_call>\n{"name": "zoom", "arguments": {"box": [1, 2], "note": "ü"}}\n</tool_call>'
ASKED = "<|im_start|>user\nFind it.<|im_end|>\n<|im_start|>assistant\n"
INLINE = "<think>\nTwo bars,\nso five.\n</think>\n\nFive."


def with_field(thought, content, *calls, key="reasoning_content"):
    return {**answer(content, *calls), key: thought}


def text_of(encoder, row):
    """The row marked, from the first user's turn on; its ids are stock's."""
    renamed = [
        {"reasoning_content" if key == "thinking" else key: value for key, value in turn.items()}
        for turn in row["messages"]
    ]
    stock = stock_ids(encoder.tokenizer, {**row, "messages": renamed})
    assert encoded(encoder, row).input_ids.tolist() == stock
    text = marked(encoder, row)
    return text[text.index("<|im_start|>user") :]


@pytest.mark.parametrize("name", THINKING)
@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_a_thought_in_a_field(encoder_of, name, key):
    row = {"messages": [user(), with_field("Two bars,\nso five.", "Five.", key=key)]}
    text = f"{ASKED}<think>\n[[Two bars,\nso five.\n</think>\n\nFive.<|im_end|>]]\n"
    assert text_of(encoder_of(name), row) == text
    masked = f"{ASKED}<think>\nTwo bars,\nso five.\n</think>\n\n[[Five.<|im_end|>]]\n"
    assert text_of(encoder_of(name, mask_thinking=True), row) == masked


@pytest.mark.parametrize("name", SPLITTING)
def test_a_thought_in_the_text_is_that_of_a_field(encoder_of, name):
    inline = encoded(encoder_of(name), {"messages": [user(), answer(INLINE)]})
    row = {"messages": [user(), with_field("Two bars,\nso five.", "Five.")]}
    field = encoded(encoder_of(name), row)
    assert inline.input_ids.tolist() == stock_ids(encoder_of(name).tokenizer, row)
    assert inline.input_ids.tolist() == field.input_ids.tolist()
    assert inline.labels.tolist() == field.labels.tolist()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_thought_in_the_text_without_a_thinking_template(encoder_of, name):
    row = {"messages": [user(), answer(INLINE), user("a"), answer("Six.")]}
    end = "<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[Six.<|im_end|>]]\n"
    assert text_of(encoder_of(name), row) == ASKED + f"[[{INLINE}<|im_end|>]]" + end[10:]
    masked = INLINE.replace("Five.", "[[Five.<|im_end|>]]")
    assert text_of(encoder_of(name, mask_thinking=True), row) == ASKED + masked + end[10:]


@pytest.mark.parametrize("name", SPLITTING)
@pytest.mark.parametrize("inline", [True, False])
def test_the_template_drops_thoughts_of_earlier_turns(encoder_of, name, inline):
    first = answer("<think>\nx\n</think>\n\none") if inline else with_field("x", "one")
    last = answer("<think>\ny\n</think>\n\ntwo") if inline else with_field("y", "two")
    row = {"messages": [user(), first, user("a"), last]}
    assert text_of(encoder_of(name), row) == (
        f"{ASKED}[[one<|im_end|>]]\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n[[y\n</think>\n\ntwo<|im_end|>]]\n"
    )
    text = text_of(encoder_of(name, mask_thinking=True, mask_history=True), row)
    assert text.endswith("<think>\ny\n</think>\n\n[[two<|im_end|>]]\n")
    assert text.count("[[") == 1


def test_a_template_that_keeps_all_thoughts(encoder_of):
    row = {"messages": [user(), with_field("x", "one"), user("a"), with_field("y", "two")]}
    assert text_of(encoder_of("qwen3_8"), row) == (
        f"{ASKED}<think>\n[[x\n</think>\n\none<|im_end|>]]\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n[[y\n</think>\n\ntwo<|im_end|>]]\n"
    )
    with pytest.raises(ValueError, match="an empty thought before .* turn 1; move .*reasoning_con"):
        marked(encoder_of("qwen3_8"), {"messages": [user(), answer(INLINE)]})


# A field with any content, where the template takes a missing one, and thoughts in the text where it splits that.
@pytest.mark.parametrize(
    ("name", "content", "inline"),
    [(name, content, False) for name in THINKING for content in ("", "Look.")]
    + [(name, None, False) for name in THINKING if name != "qwen3_vl_thinking"]
    + [(name, content, True) for name in SPLITTING for content in ("", "Look.")],
)
def test_calls_after_a_thought(encoder_of, name, content, inline):
    if inline:
        first = answer(f"<think>\nx\n</think>\n\n{content}", CALL)
    else:
        first = with_field("x", content, CALL)
    row = {"messages": [user(), first, result("one"), with_field("y", "Done.")], "tools": [TOOL]}
    call = CALLED if "vl" in name else IN_XML
    said = f"{content}\n{call}" if "vl" in name and content else f"{content}\n\n{call}"
    said = said if content else call
    rest = (
        "<|im_start|>user\n<tool_response>\none\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        "<think>\n"
    )
    assert text_of(encoder_of(name), row) == (
        f"{ASKED}<think>\n[[x\n</think>\n\n{said}<|im_end|>]]\n"
        f"{rest}[[y\n</think>\n\nDone.<|im_end|>]]\n"
    )
    assert text_of(encoder_of(name, mask_thinking=True), row) == (
        f"{ASKED}<think>\nx\n</think>\n\n[[{said}<|im_end|>]]\n"
        f"{rest}y\n</think>\n\n[[Done.<|im_end|>]]\n"
    )


@pytest.mark.parametrize("name", THINKING)
def test_an_empty_thought_of_the_template_is_not_supervised(encoder_of, name):
    """`qwen3_5_nothink` writes it at the end of a prompt, the others write `<think>` there."""
    encoder = encoder_of(name)
    prompt = encoder.tokenizer.apply_chat_template(
        [user()], tokenize=False, add_generation_prompt=True
    )
    empty = "\n</think>\n\n" if name == "qwen3_5_nothink" else ""
    assert prompt.endswith(f"{ASKED}<think>\n{empty}")
    for written in ("Five.", "<think>\n\n</think>\n\nFive."):
        row = {"messages": [user(), answer(written)]}
        if name == "qwen3_8" and written != "Five.":
            continue
        expected = f"{ASKED}<think>\n\n</think>\n\n[[Five.<|im_end|>]]\n"
        assert text_of(encoder, row) == expected


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8"])
def test_texts_that_the_template_trims(encoder_of, name):
    image = {"type": "image", "image": "a.png"}
    parts = [{"type": "text", "text": "\n Look: "}, image, {"type": "text", "text": " here \n"}]
    row = {
        "messages": [
            {"role": "system", "content": " Be brief.\n"},
            user(parts),
            with_field(" \nHm, \n", "\n\n Five. \n"),
        ]
    }
    assert text_of(encoder_of(name), row) == (
        "<|im_start|>user\nLook: <|vision_start|><|image_pad|><|vision_end|> here<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n[[Hm,\n</think>\n\nFive.<|im_end|>]]\n"
    )
    blank = {"messages": [{"role": "system", "content": "S"}, user(), answer(" \n", CALL)]}
    text = text_of(encoder_of(name), {**blank, "tools": [TOOL]})
    assert text == f"{ASKED}<think>\n\n</think>\n\n[[{IN_XML}<|im_end|>]]\n"


def test_a_thought_before_an_image(encoder_of):
    image = {"type": "image", "image": "a.png"}
    row = {"messages": [user(), {**answer([image]), "thinking": "x"}]}
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    text = f"{ASKED}<think>\n[[x\n</think>\n\n]]{picture}[[<|im_end|>]]\n"
    assert text_of(encoder_of("qwen3_vl_thinking"), row) == text


@pytest.mark.parametrize(
    ("name", "turn", "reason"),
    [
        ("qwen3_vl", with_field("x", "a"), r"not write the thought of turn 1 \(reasoning_content, thinking\)"),
        ("qwen2_5_vl", with_field("x", "a", key="thinking"), "use the template of a model that thinks"),
        ("qwen3_8", with_field("x", INLINE), "turn 1 has 'reasoning_content' and <think> in its text; keep"),
        ("qwen3_8", {**with_field("x", "a"), "thinking": "y"}, "turn 1 has 'reasoning_content' and 'thinking'"),
        ("qwen3_8", with_field(["x"], "a"), "'reasoning_content' of turn 1 must be a string, got a list"),
        ("qwen3_8", {**answer("a"), "reasoning": "y"}, "'reasoning', .* write it as 'reasoning_content' of"),
        ("qwen3_6", answer("<think>x</think>a</think>b"),
         r"moves or removes the thought in turn 1 \(assistant\); begin the text with the thought, once"),
        ("qwen3_8", with_field("x", ""), "the assistant's text in turn 1 is empty"),
    ],
)  # fmt: skip
def test_thoughts_that_are_refused(encoder_of, name, turn, reason):
    with pytest.raises(ValueError, match=f"^row 0 of .*{reason}"):
        encoded(encoder_of(name), {"messages": [user(), turn]})


def test_others_do_not_think(encoder_of):
    for other in ({**user(), "thinking": "x"}, {**result("a"), "reasoning_content": "x"}):
        with pytest.raises(ValueError, match="write it as 'reasoning_content' of the assistant's"):
            encoded(encoder_of("qwen3_8"), {"messages": [user(), other, answer("a")]})
    documents = encoder_of("qwen3_8", stage="pretrain")
    with pytest.raises(
        ValueError,
        match="the document has a thought .reasoning_content, thinking.; for conversations use",
    ):
        encoded(documents, {"messages": [with_field("x", "a")]})


def test_what_mask_thinking_contradicts(encoder_of):
    with pytest.raises(ValueError, match="leave out --train-on-prompt .* or --mask-thinking"):
        encoder_of("qwen3_8", mask_thinking=True, train_on_prompt=True)
    with pytest.raises(ValueError, match="documents have no thoughts; leave out --mask-thinking"):
        encoder_of("qwen3_8", mask_thinking=True, stage="pretrain")
    settings = encoder_of("qwen3_8").settings().items()
    changed = encoder_of("qwen3_8", mask_thinking=True).settings().items()
    assert changed - settings == {("mask_thinking", "True")}


@pytest.mark.parametrize("name", THINKING)
def test_a_prompt_after_thoughts_is_stocks(encoder_of, name):
    encoder = encoder_of(name)
    first = [user(), with_field("x", "one"), user("a"), with_field("y", "", CALL), result("two")]
    prompt = render_prompt(first, encoder, tools=[TOOL])
    text = encoder.tokenizer.apply_chat_template(
        first, tools=[TOOL], tokenize=False, add_generation_prompt=True
    )
    assert "<think>\ny\n</think>" in text
    assert prompt.input_ids.tolist() == encoder.tokenizer(text).input_ids


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("qwen3_5_think", {"enable_thinking": False}),
        ("qwen3_6", {"preserve_thinking": True}),
        ("qwen3_8", {"reasoning_effort": "low", "preserve_thinking": False}),
        ("qwen2_5_vl", {"add_vision_id": True}),
    ],
)
def test_arguments_of_the_template(encoder_of, name, arguments):
    encoder = encoder_of(name, template_args=arguments)
    image = {"type": "image", "image": "a.png"}
    thought = {} if name == "qwen2_5_vl" else {"reasoning_content": "x"}
    parts = [image, {"type": "text", "text": "Find it."}]
    messages = [user(parts), {**answer("one"), **thought}, user("a"), {**answer("b"), **thought}]
    render = encoder.tokenizer.apply_chat_template
    text = render(messages, tokenize=False, **arguments)
    ids = encoded(encoder, {"messages": messages}).input_ids.tolist()
    assert ids == encoder.tokenizer(text, add_special_tokens=False).input_ids
    begun = render([user()], tokenize=False, add_generation_prompt=True, **arguments)
    assert render_prompt([user()], encoder).input_ids.tolist() == encoder.tokenizer(begun).input_ids
    plain = [
        render(messages, tokenize=False),
        render([user()], tokenize=False, add_generation_prompt=True),
    ]
    assert plain != [text, begun]
    changed = encoder.settings().items() - encoder_of(name).settings().items()
    assert changed == {("template_args", repr(sorted(arguments.items())))}


@pytest.mark.parametrize(
    "name", ["enable_think", "tools", "messages", "padding", "image_count", "role"]
)
def test_arguments_that_a_template_does_not_have(encoder_of, name):
    with pytest.raises(ValueError, match=f"no argument '{name}' to set; leave it out"):
        encoder_of("qwen3_5_think", template_args={name: True})
    with pytest.raises(
        ValueError, match="documents have no chat template; leave out --template-arg"
    ):
        encoder_of("qwen3_5_think", template_args={"enable_thinking": True}, stage="pretrain")

"""Eight real chat templates (Qwen2-VL's and Qwen2.5-VL's are equal): ids are stock transformers', or the row is
refused with a reason. `templates/README.md` says where they are from."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken

from mmpack import Encoder, VisionSpec, render_prompt
from mmpack.cli.demo import _tokenizer

TEMPLATES = {p.stem: p.read_text() for p in (Path(__file__).parent / "templates").glob("*.jinja")}
# Added by Qwen3's tokenizers, and not special there.
ADDED = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
]
CONTROL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<|image_pad|>",
    "<|vision_pad|>",
]
TOOL = {
    "type": "function",
    "function": {"name": "zoom", "description": "Grö\u00dfer <b>", "parameters": {}},
}
CALL = {"type": "function", "function": {"name": "zoom", "arguments": {"box": [1, 2], "note": "ü"}}}
TEXT_CALL = {"function": {"name": "zoom", "arguments": '{"box":[1,2],"k":"\\u00fc"}'}}


@pytest.fixture(scope="module")
def base():
    """A small tokenizer with Qwen's special tokens, and some that a user added."""
    tokenizer = _tokenizer(
        ["zoom box find the small print, Three crops. function name arguments"] * 3
    )
    own = [
        AddedToken("<|dose|>", special=True),
        AddedToken("<|wide|>", special=True, lstrip=True, rstrip=True),
        AddedToken("solo", special=True, single_word=True),
    ]
    qwens = ["<|box_start|>", "<|box_end|>", "<|vision_pad|>"]
    tokenizer.add_special_tokens({"extra_special_tokens": [*qwens, *own]})
    tokenizer.add_tokens(ADDED)
    return tokenizer


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    Image.new("RGB", (56, 56)).save(path)
    return path


@pytest.fixture
def encoder_of(base, picture):
    """template's name -> an encoder with it."""

    def make(name, **options):
        base.chat_template = TEMPLATES[name]
        number = base.convert_tokens_to_ids
        vision = VisionSpec(
            min_pixels=1,
            max_pixels=1,
            image_token_id=number("<|image_pad|>"),
            video_token_id=number("<|video_pad|>"),
            vision_start_token_id=number("<|vision_start|>"),
            vision_end_token_id=number("<|vision_end|>"),
        )
        return Encoder(base, vision, media_dir=picture.parent, **options)

    return make


def stock_ids(tokenizer, row):
    text = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def encoded(encoder, row):
    (sample,) = encoder.encode(encoder.read([row]))
    return sample


def marked(encoder, row):
    """The row's text with supervised runs in [[ ]]."""
    sample = encoded(encoder, row)
    edges = np.flatnonzero(np.diff(sample.labels >= 0, prepend=False, append=False))
    pieces = np.split(sample.input_ids, edges)
    words = [encoder.tokenizer.decode(piece) for piece in pieces]
    return "".join(f"[[{w}]]" if n % 2 else w for n, w in enumerate(words))


WORDS = [
    "crop",
    "crop",
    " ",
    "\n",
    "<think>",
    "</think>",
    "<|box_start|>",
    "<|dose|>",
    "<|wide|>",
    "solo",
    "ü中",
    '"',
    "{",
    "<b>",
    "\\",
]
SHORT = st.sampled_from(
    ["Yes.", "the small print", "a <|box_start|>(1,2)<|box_end|>", "größer\n\n3 %"]
)
MIXED = st.lists(st.sampled_from(WORDS), max_size=5).map("".join)
TEXT = st.one_of(SHORT, SHORT, SHORT, MIXED)
PARTS = st.lists(
    st.one_of(
        st.just({"type": "image", "image": "a.png"}),
        TEXT.map(lambda text: {"type": "text", "text": text}),
    ),
    min_size=1,
    max_size=3,
)
VALUES = st.one_of(MIXED, st.integers(), st.booleans(), st.none(), st.lists(SHORT, max_size=2))
ARGUMENTS = st.one_of(
    st.dictionaries(st.sampled_from(["box", "note", 'k"', "<|dose|>"]), VALUES, max_size=3),
    st.sampled_from(['{"box":[1,2]}', "", "{}", "not JSON"]),
)
INNER = st.fixed_dictionaries({"name": st.sampled_from(["zoom", "größer"]), "arguments": ARGUMENTS})
CALLS = st.lists(
    st.one_of(INNER, INNER.map(lambda call: {"type": "function", "id": "1", "function": call})),
    min_size=1,
    max_size=2,
)
USER = st.fixed_dictionaries({"role": st.just("user"), "content": st.one_of(TEXT, PARTS)})
THOUGHT = st.one_of(TEXT, st.sampled_from([" Hm.\n", "\n\n", "one\ntwo"])).filter(bool)
INLINE = st.tuples(
    st.sampled_from(["<think>\n", "<think>", "\n<think>"]),
    THOUGHT,
    st.sampled_from(["\n</think>\n\n", "</think>", "</think> "]),
    TEXT,
).map("".join)
SPEAKS = {"role": st.just("assistant")}
ANSWER = st.one_of(
    st.fixed_dictionaries({**SPEAKS, "content": st.one_of(TEXT, TEXT, PARTS)}),
    st.fixed_dictionaries({**SPEAKS, "content": st.one_of(TEXT, TEXT, PARTS)}),
    st.fixed_dictionaries({**SPEAKS, "content": INLINE}),
    st.fixed_dictionaries({**SPEAKS, "content": SHORT, "reasoning_content": THOUGHT}),
)
CALLING = st.one_of(
    st.fixed_dictionaries(
        {**SPEAKS, "tool_calls": CALLS},
        optional={"content": st.one_of(TEXT, INLINE, st.none(), st.just(""))},
    ),
    st.fixed_dictionaries(
        {**SPEAKS, "tool_calls": CALLS, "content": st.just("")},
        optional={"reasoning_content": THOUGHT},
    ),
)
RESULT = st.fixed_dictionaries({"role": st.just("tool"), "content": st.one_of(TEXT, PARTS)})
FIRST = st.fixed_dictionaries(
    {"role": st.sampled_from(["system"] * 3 + ["developer"]), "content": TEXT}
)
TOOLS = st.lists(
    st.sampled_from([TOOL, TOOL["function"], {"name": "f", "description": "<|box_start|> \n"}]),
    min_size=1,
    max_size=2,
)


@st.composite
def rows(draw):
    # Half of the rows in the usual order, half in any.
    messages = draw(st.lists(FIRST, max_size=1))
    for _ in range(draw(st.integers(1, 2))):
        if draw(st.booleans()):
            messages += [draw(USER), draw(ANSWER)]
        elif draw(st.booleans()):
            messages += [draw(USER), draw(CALLING), draw(RESULT), draw(ANSWER)]
        else:
            messages += draw(st.lists(st.one_of(USER, ANSWER, CALLING, RESULT, FIRST), max_size=3))
            messages += [draw(st.one_of(ANSWER, CALLING))]
    row = {"messages": messages}
    if draw(st.booleans()):
        row["tools"] = draw(TOOLS)
    return row


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_ids_are_stocks_or_the_row_is_refused(encoder_of, name):
    refused = []
    encoder = encoder_of(name, on_error=refused)
    ends, thoughts = Counter(), Counter()

    @settings(max_examples=120, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(rows())
    def check(row):
        refused.clear()
        found = list(encoder.encode(encoder.read([row])))
        if found:
            assert found[0].input_ids.tolist() == stock_ids(encoder.tokenizer, row)
        else:
            (bad,) = refused
            assert bad.advice
        ends[bool(found)] += 1
        thinks = "reasoning_content" in str(row) or "</think>" in str(row["messages"])
        thoughts[bool(found)] += thinks

    check()
    # Qwen2-VL's and Qwen2.5-VL's template have neither tools nor calls.
    assert ends[True] > (0.1 if name == "qwen2_5_vl" else 0.25) * ends.total(), ends
    if name not in ("qwen2_5_vl", "qwen3_vl"):  # these take no `reasoning_content`
        assert thoughts[True] > 0.3 * thoughts.total(), thoughts


def user(content="Find it."):
    return {"role": "user", "content": content}


def answer(content, *calls):
    return {
        "role": "assistant",
        "content": content,
        **({"tool_calls": list(calls)} if calls else {}),
    }


def result(content):
    return {"role": "tool", "content": content}


CALLED = '<tool_call>\n{"name": "zoom", "arguments": {"box": [1, 2], "note": "ü"}}\n</tool_call>'
TEXT_CALLED = (
    '<tool_call>\n{"name": "zoom", "arguments": {"box":[1,2],"k":"\\u00fc"}}\n</tool_call>'
)
IN_XML = (
    "<tool_call>\n<function=zoom>\n<parameter=box>\n[1, 2]\n</parameter>\n<parameter=note>\nü\n"
    "</parameter>\n</function>\n</tool_call>"
)
AGENT = {
    "messages": [
        user(),
        answer("Two crops.", CALL, TEXT_CALL),
        result("one"),
        result([{"type": "image", "image": "a.png"}]),
        answer(None, CALL),
        result("three"),
        {**answer("Done."), "tool_calls": None},
    ]
}


def test_what_is_supervised_beside_tools(encoder_of):
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert marked(encoder_of("qwen3_vl"), AGENT) == (
        "<|im_start|>user\nFind it.<|im_end|>\n<|im_start|>assistant\n"
        f"[[Two crops.\n{CALLED}\n{TEXT_CALLED}<|im_end|>]]\n<|im_start|>user\n"
        f"<tool_response>\none\n</tool_response>\n<tool_response>\n{picture}\n</tool_response><|im_end|>\n"
        f"<|im_start|>assistant\n[[{CALLED}<|im_end|>]]\n<|im_start|>user\n"
        "<tool_response>\nthree\n</tool_response><|im_end|>\n<|im_start|>assistant\n[[Done.<|im_end|>]]\n"
    )


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_8"])
def test_calls_in_xml_are_supervised(encoder_of, name):
    row = {"messages": [user(), answer("", CALL, CALL)], "tools": [TOOL]}
    text = marked(encoder_of(name), row)
    assert text.endswith(
        f"<|im_start|>assistant\n<think>\n\n</think>\n\n[[{IN_XML}\n{IN_XML}<|im_end|>]]\n"
    )
    assert text.count("[[") == 1
    with pytest.raises(ValueError, match="row 0 of .* the chat template refuses .* from a mapping"):
        marked(encoder_of(name), {"messages": [user(), answer("", TEXT_CALL)]})


def test_the_options_for_supervision_beside_tools(encoder_of):
    text = marked(encoder_of("qwen3_vl", mask_history=True), AGENT)
    assert text.count("[[") == 1
    assert text.endswith("[[Done.<|im_end|>]]\n")
    row = {"messages": AGENT["messages"][:2]}
    text = marked(encoder_of("qwen3_vl", train_on_prompt=True), row)
    assert (text[:2], text[-2:], text.count("[[")) == ("[[", "]]", 1)


def test_supervised_is_what_a_template_generates(encoder_of, base):
    """transformers' own mask, by `{% generation %}` around what the template writes for an answer."""
    encoder = encoder_of("qwen3_vl")
    start, end, text = "{{- '<|im_start|>' + message.role + '\\n' }}", "{{- '<|im_end|>\\n' }}", ""
    for branch in base.chat_template.split("{%- elif message.role == "):
        if branch.startswith('"assistant"'):
            head, body, tail = branch.partition(start)
            body, tail = tail.rsplit(end, 1)
            tail = "{{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}" + tail
            branch = f"{head}{start}{{%- generation %}}{body}{tail}"
        text += ("{%- elif message.role == " if text else "") + branch
    base.chat_template = text
    refused = []
    encoder = dataclasses.replace(encoder, on_error=refused)
    compared = []

    @settings(max_examples=60, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(rows())
    def check(row):
        for sample in encoder.encode(encoder.read([row])):
            stock = base.apply_chat_template(
                row["messages"],
                tools=row.get("tools"),
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            assert sample.input_ids.tolist() == stock["input_ids"]
            # A token that an answer's newline shares with the template's counts as answer in both.
            assert (sample.labels >= 0).tolist() == [mask == 1 for mask in stock["assistant_masks"]]
            compared.append("tool_calls" in str(row))

    check()
    assert sum(compared) >= 5
    assert len(compared) - sum(compared) >= 5


OWN = (
    "{% set ns = namespace(n=0) %}{% for m in messages %}<|im_start|>{{ m.role }} {% for p in m.content %}"
    "{% if p.type == 'image' %}{% set ns.n = ns.n + 1 %}Picture {{ ns.n }}: <|vision_start|><|image_pad|>"
    "<|vision_end|>{% else %}{% if m.role == 'assistant' %}{% generation %}{{ p.text }}{% endgeneration %}"
    "{% else %}{{ p.text }}{% endif %}{% endif %}{% endfor %}<|im_end|>{% endfor %}<|endoftext|>"
)


def test_a_template_of_ones_own(encoder_of, base):
    encoder = encoder_of("qwen3_vl")
    base.chat_template = OWN.replace("for p in m.content", "for p in parts").replace(
        "<|im_start|>",
        "{% set parts = [{'type': 'text', 'text': m.content}] if m.content is string else m.content %}"
        "<|im_start|>",
    )
    image, text = {"type": "image", "image": "a.png"}, {"type": "text", "text": " or "}
    row = {"messages": [user([image, text, image]), answer("Both.")]}
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert marked(encoder, row) == (
        f"<|im_start|>user Picture 1: {picture} or Picture 2: {picture}<|im_end|>"
        "<|im_start|>assistant [[Both.<|im_end|>]]<|endoftext|>"
    )
    assert encoded(encoder, row).input_ids.tolist() == stock_ids(base, row)
    base.chat_template = base.chat_template.replace(
        "{{ m.role }} ", "{{ m.role }}|{{ '<|' + 'dose|>' }}"
    )
    typed = {"messages": [user("<|dose|>"), answer("a")]}  # now a token of the template
    ids = encoded(dataclasses.replace(encoder), typed).input_ids.tolist()
    assert ids.count(base.convert_tokens_to_ids("<|dose|>")) == 2


def test_turns_without_loss_beside_tools(encoder_of):
    messages = [{**turn, "loss": False} for turn in AGENT["messages"][:5]] + AGENT["messages"][5:]
    text = marked(encoder_of("qwen3_vl"), {"messages": messages})
    assert text.count("[[") == 1
    assert text.endswith("[[Done.<|im_end|>]]\n")
    text = marked(encoder_of("qwen3_vl", train_on_prompt=True), {"messages": messages})
    silent, _, rest = text.rpartition("user\n<tool_response>\nthree")
    assert CALLED in silent
    assert "[[Find" not in silent
    assert f"[[{CALLED}" not in silent


def test_no_system_prompt_is_added_for_tools(encoder_of):
    encoder = encoder_of("qwen3_vl")
    text = marked(encoder, {"messages": [user(), answer("Here.")], "tools": [TOOL, {"name": "f"}]})
    assert text.startswith("<|im_start|>system\n# Tools\n\nYou may call")
    assert '\n<tools>\n{"type": "function", "function": {"name": "zoom", "desc' in text.replace(
        "<tools></tools>", ""
    )
    assert '\n{"name": "f"}\n</tools>' in text


def test_sharegpt_calls_are_those_of_openai(encoder_of):
    encoder = encoder_of("qwen3_vl")
    spoken = [
        {"from": "human", "value": "Find it."},
        {"from": "function_call", "value": '{"name": "zoom", "arguments": {"box": "<image>"}}'},
        {"from": "observation", "value": "one"},
        {"from": "gpt", "value": "Here."},
    ]
    called = {"function": {"name": "zoom", "arguments": {"box": "<image>"}}}
    written = [user(), answer(None, called), result("one"), answer("Here.")]
    tools = '[{"name": "zoom"}]'
    one = encoded(encoder, {"conversations": spoken, "tools": tools})
    other = encoded(encoder, {"messages": written, "tools": [{"name": "zoom"}]})
    assert one.input_ids.tolist() == other.input_ids.tolist()
    assert one.labels.tolist() == other.labels.tolist()


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("qwen2_5_vl", {"messages": [user(), answer("a")], "tools": [TOOL]}, "not write the row's tools"),
        ("qwen2_5_vl", {"messages": [user(), answer("a", CALL)]}, "not write the tool calls of turn 1"),
        ("qwen3_vl", {"messages": [{"role": "developer", "content": "S"}, user(), answer("a")]},
         r"turn 0 \(developer\) is missing"),
        ("qwen3_vl", {"messages": [user(), {"role": "system", "content": "S"}, answer("a")]},
         r"the text of turn 1 \(system\) is missing"),
        ("qwen3_5_think", {"messages": [answer("Hi"), result("x"), answer("a")]},
         "refuses this row: No user query found in messages"),
        ("qwen3_vl", {"messages": [answer("A text.")]}, "--stage pretrain"),
        ("qwen3_vl", {"messages": [user(), answer(None, {"name": "f\ufdd0", "arguments": {}})]},
         "has U\\+FDD0, which is no character"),
        ("qwen3_vl", {"messages": [user(), answer([{"type": "text", "text": ""}], CALL)]},
         "turn 1 has an empty text part beside its tool calls"),
        ("qwen3_vl", {"messages": [{**user(), "tool_calls": [CALL]}, answer("a")]},
         "turn 0 is the user's and has 'tool_calls'"),
        ("qwen3_vl", {"messages": [user(), answer("a")], "tools": [{"type": "function"}]},
         "'tools' has a function without a name"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_write_is_refused(encoder_of, name, row, reason):
    with pytest.raises(ValueError, match=f"^row 0 of .*: .*{reason}"):
        encoded(encoder_of(name), row)


def test_thoughts_stay_where_the_template_keeps_them(encoder_of):
    row = {"messages": [user(), answer("<think>\nx\n</think>\n\nFive.")]}
    assert "[[<think>\nx\n</think>\n\nFive.<|im_end|>]]" in marked(encoder_of("qwen3_vl"), row)


def test_turns_in_any_order_that_the_template_writes(encoder_of):
    turns = [answer("Hi."), user("a"), user("b"), answer("c"), answer("d")]
    text = "".join(
        f"<|im_start|>{t['role']}\n"
        + (
            f"[[{t['content']}<|im_end|>]]"
            if t["role"] == "assistant"
            else f"{t['content']}<|im_end|>"
        )
        + "\n"
        for t in turns
    )
    assert marked(encoder_of("qwen3_vl"), {"messages": turns}) == text
    turns = [{"role": "developer", "content": "S"}, *turns]
    assert "<|im_start|>developer\nS<|im_end|>" in marked(
        encoder_of("qwen2_5_vl"), {"messages": turns}
    )


@pytest.mark.parametrize("typed", CONTROL)
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5_think"])
def test_control_tokens_typed_anywhere_in_tools_stay_text(encoder_of, name, typed):
    """With the token in its strings and keys, whole or completed by what the template writes, a row has as many
    control tokens as with another word there."""
    encoder = encoder_of(name)
    (number,) = encoder.tokenizer.convert_tokens_to_ids([typed])

    def count(word):
        cut = word[:-1]  # `<parameter=` + word + `>`
        arguments = {word: word, cut: [word, {word: word}], f"a{cut}": 1}
        calls = [{"name": word, "arguments": arguments}, {"name": cut, "arguments": {}}]
        if name == "qwen3_vl":
            calls.append({"name": "f", "arguments": word})
        row = {
            "messages": [user(word), answer(word, *calls), result(word), answer("Done.")],
            "tools": [{"name": word, word: [word, {word: word}]}],
        }
        sample = encoded(encoder, row)
        return [int((ids == number).sum()) for ids in (sample.input_ids, sample.labels)]

    assert count(typed) == count("<|other_one|>")


def test_other_special_tokens_become_ids(encoder_of):
    encoder = encoder_of("qwen3_vl")
    said = "<|box_start|>(1,2)<|box_end|> <|dose|> <|im_end|> and <|box_start|"
    row = {
        "messages": [user(said), answer(said, {"name": "f", "arguments": {"<|dose|>": said}})],
        "tools": [{"name": "<|dose|>"}],
    }
    tokenizer = encoder.tokenizer
    numbers = tokenizer.convert_tokens_to_ids(
        ["<|box_start|>", "<|box_end|>", "<|dose|>", "<|im_end|>"]
    )
    ids = encoded(encoder, row).input_ids.tolist()
    assert [ids.count(number) for number in numbers] == [3, 3, 5, 3]
    strict = encoded(encoder_of("qwen3_vl", typed_tokens="text"), row)
    assert [strict.input_ids.tolist().count(number) for number in numbers] == [0, 0, 0, 3]
    assert tokenizer.decode(strict.input_ids) == tokenizer.decode(ids)
    assert encoder.settings().items() ^ encoder_of("qwen3_vl", typed_tokens="text").settings().items() == {
        ("typed_tokens", "'ids'"), ("typed_tokens", "'text'"),
    }  # fmt: skip
    with pytest.raises(ValueError, match="typed_tokens must be 'ids' or 'text', got 'no'"):
        encoder_of("qwen3_vl", typed_tokens="no")


def test_a_single_word_token_inside_a_word_of_a_call(encoder_of):
    encoder = encoder_of("qwen3_vl")
    call = {"name": "f", "arguments": {"box": "cropsolo solo", "<|wide|>": " <|wide|> "}}
    row = {"messages": [user(), answer(None, call)], "tools": [{"name": "solos"}]}
    assert encoded(encoder, row).input_ids.tolist() == stock_ids(encoder.tokenizer, row)


def test_documents_and_typed_tokens(encoder_of, base):
    """A document has no template, but turn tokens are control tokens in it, too."""
    encoder = encoder_of("qwen3_vl", stage="pretrain")
    base.chat_template = None
    text = "a" + " " * 50_000 + "<|im_start|> \n <|wide|> \n<|dose|>"
    (sample,) = encoder.encode(encoder.read([{"text": text}]))
    stays = encoder.tokenizer(
        "a" + " " * 50_000 + "<|im_start|>", split_special_tokens=True, add_special_tokens=False
    ).input_ids
    names = ["<|wide|>", "<|dose|>", "<|endoftext|>"]
    assert sample.input_ids.tolist() == stays + base.convert_tokens_to_ids(names)


def test_a_prompt_with_tools_is_stocks(encoder_of):
    encoder = encoder_of("qwen3_vl")
    messages = [user(), answer(None, CALL), result("one")]
    prompt = render_prompt(messages, encoder, tools=[TOOL])
    text = encoder.tokenizer.apply_chat_template(
        messages, tools=[TOOL], tokenize=False, add_generation_prompt=True
    )
    assert prompt.input_ids.tolist() == encoder.tokenizer(text).input_ids
    with pytest.raises(ValueError, match="the last turn must be the user's or a tool's"):
        render_prompt(messages[:2], encoder)

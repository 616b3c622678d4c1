"""Mixtures of streams: shares of tokens, passes of each source, resuming, bad rows, what is refused."""

import copy
import itertools
import json
import random
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from builders import QUIET, SMALL_SPEC, encoded, small_config, tiny_config, tiny_model
from PIL import Image
from test_stream import delivered, pieces_of, sharegpt
from test_stream import encoder as encoder  # a fixture
from transformers import Trainer, TrainingArguments

from mmpack import PackStream, Skip, assemble
from mmpack.hf import PackCollator, PackingCallback, patch_model
from mmpack.types import ImageRef

CONFIG = tiny_config(100, vision=SMALL_SPEC)


def texts(count, mean, kind, seed=0):
    """Samples of about `mean` tokens; the first says their kind, the second their number."""
    rng = np.random.default_rng(seed)
    return [
        replace(encoded(SMALL_SPEC, kind, n % 80, *[2] * rng.integers(1, 2 * mean - 4)), row=n)
        for n in range(count)
    ]


def sources(counts=(400, 90, 7)):
    """Short and long texts, and a few images."""
    images = [encoded(SMALL_SPEC, 7, n, (4, 4), *[4] * (3 + n)) for n in range(counts[2])]
    return {
        "short": (texts(counts[0], 10, 5), 0.5),
        "long": (texts(counts[1], 40, 6, 1), 0.3),
        "images": (images, 0.2),
    }


def tokens_of(item):
    found = Counter()
    for sample in item:
        found[sample.source.partition("::")[0]] += sample.num_tokens
    return found


def test_each_source_has_its_share_of_the_tokens():
    """To one longest row of what was read; of packs, up to what waits in the buffer."""
    stream = PackStream(sources(), None, 256, CONFIG, buffer=50)
    packs = list(itertools.islice(stream, 200))
    shares = {"short": 0.5, "long": 0.3, "images": 0.2}
    for pack in packs[:: len(packs) // 20]:
        drawn = json.loads(pack.resume)["drawn"]
        for (name, share), tokens in zip(shares.items(), drawn):
            assert abs(tokens - share * sum(drawn)) <= 80, name
    tokens = np.array([[tokens_of(pack)[name] for name in shares] for pack in packs])
    assert tokens.sum() > 0.99 * 256 * len(packs)
    windows = np.array([tokens[n : n + 100].sum(axis=0) for n in range(len(packs) - 99)])
    off = np.abs(windows / windows.sum(axis=1, keepdims=True) - [*shares.values()]).max()
    print(f"any 100 packs: shares off by {off:.4f}")
    assert off <= 0.02 + 80 / 256 / 100


def test_a_source_that_ends_begins_again_and_samples_come_equally_often():
    stream = PackStream(sources((60, 9, 3)), None, 128, CONFIG, buffer=20)
    seen = defaultdict(Counter)
    for pack in itertools.islice(stream, 100):
        for sample in pack:
            seen[sample.source][int(sample.input_ids[1]), len(sample.input_ids)] += 1
    assert {name.partition("::")[0] for name in seen} == {"short", "long", "images"}
    for counts in seen.values():
        assert max(counts.values()) - min(counts.values()) <= 21  # the buffer holds some


@pytest.mark.parametrize(
    "case", [*range(8), *(pytest.param(n, marks=pytest.mark.slow) for n in range(8, 300))]
)
def test_a_mixture_continues_identically_from_any_point(case):
    """Sources smaller than the buffer too, so that it holds samples of several passes."""
    rng = random.Random(case)
    counts = (rng.randint(2, 40), rng.randint(2, 12), rng.randint(2, 7))
    workers, rank = rng.choice([0, 1, 2]), rng.choice([0, 1])
    counts = tuple(max(n, 4 * max(1, workers)) for n in counts)
    buffer, total = rng.choice([1, 5, 30]), 16
    bad = encoded(SMALL_SPEC, 1, 2, [4] * 90)
    bad.labels[:40] = -100

    def make():
        mixture = sources(counts)
        mixture["short"][0].insert(1, bad)
        stream = PackStream(
            mixture, None, 64, rng.choice([CONFIG]), buffer=buffer, on_overflow="split",
            on_error=Skip(1),
        )  # fmt: skip
        return stream.shard(rank, 2)

    def train(stream, count):
        packs = []
        for pack in itertools.islice(delivered(stream, workers), count):
            stream.consume(pack.resume)
            packs.append(pack)
        return pieces_of(packs)

    first = make()
    whole = train(first, total)
    after = rng.randint(1, total - 1)
    stopped = make()
    assert train(stopped, after) == whole[:after]
    second = make()
    second.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert train(second, total - after) == whole[after:]
    assert second.state_dict() == first.state_dict()
    assert second.num_bad_rows == first.num_bad_rows


def test_a_state_stays_as_it_was_when_a_stream_continues_from_it():
    """The one that was given, and that of the stream: both continue with the same packs again."""
    first = PackStream(sources((40, 9, 4)), None, 80, CONFIG, buffer=9)
    for pack in itertools.islice(first, 5):
        first.consume(pack.resume)
    state = first.state_dict()
    before = copy.deepcopy(state)
    second = PackStream(sources((40, 9, 4)), None, 80, CONFIG, buffer=9)
    second.load_state_dict(state)
    for stream in (first, second):
        packs = [pieces_of(itertools.islice(stream, 20)) for _ in range(2)]
        assert packs[0] == packs[1]
        assert state == before
        assert stream.state_dict() == before


def test_conversations_and_documents_have_encoders_of_their_own(encoder):
    rows = {
        "chat": ([sharegpt(n, False) for n in range(20)], 2),
        "docs": ([{"text": "q w a " * (1 + n)} for n in range(10)] + [{"text": 5}], 1),
    }
    pretrain = replace(encoder, stage="pretrain")
    bad_rows = []
    stream = PackStream(rows, {"chat": encoder, "docs": pretrain}, 100, on_error=bad_rows)
    packs = list(itertools.islice(stream, 30))
    names = Counter(sample.source for pack in packs for sample in pack)
    assert set(names) == {"chat::the stream", "docs::the stream"}
    assert bad_rows[0].source == "docs::the stream"
    assert bad_rows[0].row == 10
    drawn = json.loads(packs[-1].resume)["drawn"]
    assert drawn[0] / sum(drawn) == pytest.approx(2 / 3, abs=0.01)


def train(folder, resume=None, shares=(0.5, 0.3, 0.2)):
    mixture = {name: (one, w) for (name, (one, _)), w in zip(sources((40, 9, 4)).items(), shares)}
    mixture["images"] = (texts(6, 6, 8), mixture["images"][1])
    stream = PackStream(mixture, None, 80, CONFIG, buffer=9)
    model = patch_model(tiny_model(small_config()))
    seen = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    options = {"save_strategy": "steps", "save_steps": 7, "max_steps": 16, "learning_rate": 1e-2}
    settings = {**QUIET, **options, "accelerator_config": {"dispatch_batches": False}}
    trainer = Trainer(model, TrainingArguments(str(folder), **settings), PackCollator(), stream)
    PackingCallback(stream).attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return seen, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path):
    order, losses = train(tmp_path)
    rest, again = train(tmp_path, str(tmp_path / "checkpoint-7"))
    assert rest == order[7:]
    assert again == losses
    with pytest.raises(
        ValueError, match="from another stream: mixture was .*'short', 0.5.* and is"
    ):
        train(tmp_path, str(tmp_path / "checkpoint-7"), (0.6, 0.3, 0.1))


def test_mixtures_that_cannot_be_are_refused(encoder):
    few = texts(3, 10, 5)
    with pytest.raises(ValueError, match="a mixture needs at least one source"):
        PackStream({}, None, 64)
    with pytest.raises(ValueError, match="the weight of 'a' is 0, not a positive number"):
        PackStream({"a": (few, 0)}, None, 64)
    with pytest.raises(ValueError, match="a text without ::, .* got 'a::b'"):
        PackStream({"a::b": (few, 1)}, None, 64)
    with pytest.raises(ValueError, match="the source 'b' of the mixture has no encoder; pass enc"):
        PackStream({"a": ([], 1), "b": ([], 1)}, {"a": encoder}, 64)
    other = replace(encoder, vision=replace(encoder.vision, max_pixels=28 * 28 * 4))
    with pytest.raises(
        ValueError,
        match=r"'a' and 'b' .* not packed alike, they differ in the spec's max_pixels \d+ and 3136",
    ):
        PackStream({"a": ([], 1), "b": ([], 1)}, {"a": encoder, "b": other}, 64)
    with pytest.raises(ValueError, match="must be .source, weight., got a list"):
        PackStream({"a": few}, None, 64)
    with pytest.raises(ValueError, match="an encoder for 'b', which is no source of the mixture"):
        PackStream({"a": ([], 1)}, {"a": encoder, "b": encoder}, 64)
    with pytest.raises(ValueError, match="names 'c', but the data's sources are 'a', 'b'"):
        PackStream({"a": (few, 1), "b": (few, 1)}, None, 64).source_weights = {"c": 2}
    with pytest.raises(
        ValueError, match="source 'b' of the mixture is an iterator, which has ended"
    ):
        list(itertools.islice(PackStream({"a": (few, 1), "b": (iter(few), 1)}, None, 64), 5))
    with pytest.raises(
        ValueError, match="the source 'b' of the mixture gives this worker no samples"
    ):
        list(itertools.islice(PackStream({"a": (few, 1), "b": ([], 1)}, None, 64), 5))


def test_rows_of_a_streams_source_open_no_files_of_another(encoder, tmp_path):
    for name in ("own", "other"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (56, 56)).save(tmp_path / name / f"{name}.png")
    encoders = {name: replace(encoder, media_dir=tmp_path / name) for name in ("own", "other")}
    rows = [{**sharegpt(0, True), "images": [f"{name}.png"]} for name in ("own", "other")]
    link = tmp_path / "own" / "link.png"
    link.symlink_to(tmp_path / "own" / "own.png")
    rows[0]["images"] = ["link.png"]
    stream = PackStream({"own": (rows[:1], 1), "other": (rows[1:], 1)}, encoders, 200)
    assert stream.media_folders == [str(tmp_path / "own"), str(tmp_path / "other")]
    pack = next(iter(stream))
    assemble(pack)
    link.unlink()
    link.symlink_to(tmp_path / "other" / "other.png")
    with pytest.raises(ValueError, match="row 0 of own::the stream: .* is outside .*own"):
        assemble(pack)


def test_broken_images_are_listed_once_in_each_pass_of_their_source(tmp_path):
    """By a run that was stopped as by one that was not; a row that is in two packs is one line."""
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")

    def broken(count, bad):
        one = encoded(SMALL_SPEC, 1, 2, (2, 2), [3] * 9)
        for row in range(count):
            file = str(tmp_path / ("gone.png" if row in bad else "a.png"))
            yield replace(one, media=(ImageRef(file, size=(28, 28)),), source="rows.json", row=row)

    def make(file):
        rows = {"a": ([*broken(5, {2}), *broken(3, {2})], 2), "b": (list(broken(3, {0, 1})), 1)}
        stream = PackStream(rows, None, 32, buffer=4)
        stream.on_bad_image, stream.max_bad, stream.bad_rows_file = "drop", 1, tmp_path / file
        return stream

    def train(stream, count):
        for item in itertools.islice(stream, count):
            stream.consume(PackCollator()([item])["mmpack"]["resume"])
        return stream

    whole = train(make("whole"), 30)
    state = None
    for count in (7, 1, 12, 10):
        stream = make("stopped")
        if state is not None:
            stream.load_state_dict(json.loads(json.dumps(state)))
        state = train(stream, count).state_dict()
    assert state == whole.state_dict()
    lines, again = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("whole", "stopped")
    )
    assert lines == again
    keys = [(line["source"], line["row"], line["pass"]) for line in lines]
    assert len(set(keys)) == len(keys)
    assert max(key[2] for key in keys if key[0] == "a::rows.json") > 2
    rows = {("a::rows.json", 2), ("b::rows.json", 0), ("b::rows.json", 1)}
    assert set(keys) >= {(*row, one) for row in rows for one in range(2)}


def test_encoders_that_differ_in_on_error_do_not_say_what_the_stream_does(encoder):
    rows = {"a": ([sharegpt(0, False)], 1), "b": ([sharegpt(1, False)], 1)}
    bad_rows = []
    for one, other in (("raise", "skip"), ("skip", bad_rows), (bad_rows, []), (Skip(1), Skip(1))):
        encoders = {"a": replace(encoder, on_error=one), "b": replace(encoder, on_error=other)}
        with pytest.raises(ValueError, match=r"encoders of 'a' and 'b' .* pass on_error=\.\.\."):
            PackStream(rows, encoders, 64)
        assert PackStream(rows, encoders, 64, on_error="raise").on_error == "raise"
        encoders["b"] = replace(encoders["b"], on_error=one)
        made = PackStream(rows, encoders, 64)
        assert made.on_error is one or isinstance(made.on_error, Skip)


def test_a_state_of_another_stream_is_refused():
    few = texts(5, 10, 5)

    def state_of(source):
        stream = PackStream(source, None, 64)
        for pack in itertools.islice(stream, 2):
            stream.consume(pack.resume)
        return json.loads(json.dumps(stream.state_dict()))

    mixture = {"a": (few, 2), "b": (few, 1)}
    turned = {"b": (few, 1), "a": (few, 2)}
    for source, other in itertools.permutations((mixture, turned, few, {"a": (few, 1)}), 2):
        with pytest.raises(ValueError, match="from another stream: mixture was .* and is"):
            PackStream(other, None, 64).load_state_dict(state_of(source))
    for parts in (
        [],
        ["images"],
        ["consumed", "0", "sources"],
        ["consumed", "0", "sources", 0, "rows"],
    ):
        state = state_of(mixture)
        place = state
        for part in parts[:-1]:
            place = place[part]
        if parts:
            del place[parts[-1]]
        else:
            state = {"rank": 0, "packs": 3}
        stream = PackStream(mixture, None, 64)
        with pytest.raises(
            ValueError, match="state .* another version of mmpack, or no .*: it lacks"
        ):
            stream.load_state_dict(state)
        assert not stream.state_dict()["consumed"]

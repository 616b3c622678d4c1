"""Packs of a stream: every sample once, full, alike in cost, and the same again after a restart."""

import copy
import itertools
import json
import types
from dataclasses import replace

import numpy as np
import pytest
from builders import SMALL_SPEC, encoded, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

import mmpack.packing.stream
from mmpack import Encoder, PackStream, VisionSpec, assemble
from mmpack.hf import PackCollator
from mmpack.packing.cost import sample_flops
from mmpack.packing.pack_stats import rank_imbalance
from mmpack.packing.stream_select import hashed, select

CONFIG = tiny_config(100, vision=SMALL_SPEC)


def numbered(count, seed=0, longest=30):
    """Samples of 3 to `longest` tokens, a third with an image; the first two tokens are their number."""
    rng = np.random.default_rng(seed)
    made = []
    for n in range(count):
        image = [(2, 4)] if n % 3 == 0 else []
        made.append(
            encoded(SMALL_SPEC, n // 80, n % 80, 1, *[2] * rng.integers(0, longest - 7), *image)
        )
    return made


def numbers_in(item):
    return [int(80 * sample.input_ids[0] + sample.input_ids[1]) for sample in item]


def tokens_in(item):
    return sum(sample.num_tokens for sample in item)


def as_worker(stream, worker, workers):
    """What a DataLoader's worker iterates, given its copy."""
    info = types.SimpleNamespace(id=worker, num_workers=workers)
    packs = iter(stream)
    while True:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mmpack.packing.stream, "get_worker_info", lambda: info)
            pack = next(packs, None)
        if pack is None:
            return
        yield pack


def delivered(stream, workers):
    """Packs in a DataLoader's order: workers take turns, those that are through are left out."""
    if not workers:
        yield from stream
        return
    copies = [copy.copy(stream) for _ in range(workers)]
    for other in copies:
        other._consumed = dict(stream._consumed)
    alive = [as_worker(other, worker, workers) for worker, other in enumerate(copies)]
    while alive:
        for packs in list(alive):
            pack = next(packs, None)
            if pack is None:
                alive.remove(packs)
            else:
                yield pack


def test_every_sample_is_in_one_pack_and_packs_are_full():
    samples = numbered(400)
    packs = list(PackStream(samples, None, 128, CONFIG, buffer=60))
    assert sorted(sum(map(numbers_in, packs), [])) == list(range(400))
    sizes = [tokens_in(pack) for pack in packs]
    assert max(sizes) <= 128
    assert np.mean(sizes[:-5]) > 0.99 * 128
    assert PackStream(samples, None, 128).capacity == 128
    with pytest.raises(ValueError, match="must be positive, got 0, None and 200"):
        PackStream(samples, None, 0)
    with pytest.raises(ValueError, match="got 'stop'"):
        PackStream(samples, None, 8, on_overflow="stop")


def test_no_sample_waits_longer_than_the_buffer_and_one_comes_in_as_one_goes_out():
    read = []

    def source():
        for number, sample in enumerate(numbered(600)):
            read.append(number)
            yield sample

    entered = {}
    out = 0
    for count, pack in enumerate(PackStream(source, None, 128, CONFIG, buffer=40)):
        # what is in the buffer and the rest of the chunk that was encoded with it
        assert len(read) <= min(600, out + 40 + 16)
        out += len(pack)
        for number in range(len(entered), len(read)):
            entered[number] = count
        for number in numbers_in(pack):
            assert count - entered[number] <= 40


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_choice_fits_and_has_the_oldest(data):
    count = data.draw(st.integers(1, 30))
    column = st.lists(st.integers(0, 50), min_size=count, max_size=count)
    tokens, cost, patches = (np.array(data.draw(column), dtype=np.int64) for _ in range(3))
    keys = hashed(range(count), data.draw(st.integers(0, 2**64 - 1)))
    limits = (data.draw(st.integers(50, 300)), data.draw(st.integers(50, 300)))
    target, price = data.draw(st.integers(0, 1000)), data.draw(st.integers(0, 20))
    chosen = select(tokens, cost, patches, limits=limits, target=target, price=price, keys=keys)
    assert chosen == sorted(set(chosen))
    assert chosen[0] == 0
    assert tokens[chosen].sum() <= limits[0]
    assert patches[chosen].sum() <= limits[1]


def test_the_hash_is_splitmix64():
    """The same packs on every machine: two values of Vigna's own generator."""
    state = [(n * 0x9E3779B97F4A7C15) % 2**64 for n in (1, 2)]
    assert hashed([1, 2], 0).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4], state


def test_packs_of_ranks_cost_the_same():
    """Text and images alternating every hundred rows, as files one after the other have them."""
    rng = np.random.default_rng(0)
    samples = []
    for n in range(2000):
        image = [(4, 8)] * (2 if n // 100 % 2 else 0)
        samples.append(encoded(SMALL_SPEC, 1, *[2] * rng.integers(3, 60), *image))
    ranks = []
    for rank in range(4):
        packs = list(PackStream(samples, None, 512, CONFIG, buffer=200).shard(rank, 4))
        ranks.append([flops(pack) for pack in packs])
    steps = min(map(len, ranks)) - 8
    costs = np.array([rank[:steps] for rank in ranks])
    assert (costs.max(axis=0) / costs.mean(axis=0)).mean() < 1.08
    unbalanced = [
        list(PackStream(samples, None, 512, buffer=1).shard(rank, 4)) for rank in range(4)
    ]
    costs = np.array([[flops(pack) for pack in packs[:steps]] for packs in unbalanced])
    assert (costs.max(axis=0) / costs.mean(axis=0)).mean() > 1.2
    assert rank_imbalance(costs.ravel(), 4) > 1.2


def flops(item):
    pack = assemble(item, pixels=False)
    tokens = np.diff(pack.cu_seqlens)
    supervised = np.diff(np.searchsorted(pack.supervised_index, pack.cu_seqlens))
    last = pack.feature_token[(pack.grid_thw.prod(axis=1) // 4).cumsum() - 1]  # token of each image
    images = np.searchsorted(last, pack.cu_seqlens)
    return int(sample_flops(CONFIG, tokens, supervised, pack.grid_thw, images).sum())


def pieces_of(packs):
    return [[sample.input_ids.tolist() for sample in pack] for pack in packs]


def resumed(make, workers, after, total):
    """Packs after a stop: `after` are consumed, some more were made ahead."""
    stream = make()
    for pack in itertools.islice(delivered(stream, workers), after):
        stream.consume(pack.resume)
    state = json.loads(json.dumps(stream.state_dict()))
    other = make()
    other.load_state_dict(state)
    return pieces_of(itertools.islice(delivered(other, workers), total))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_stream_continues_identically_from_any_point(data):
    """Two ranks, up to two workers each, stopped anywhere, over two passes."""
    continue_anywhere(data)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(data=st.data())
def test_a_stream_continues_identically_from_many_points(data):
    continue_anywhere(data)


def continue_anywhere(data):
    samples = numbered(data.draw(st.integers(0, 30)), data.draw(st.integers(0, 9)))
    rank, workers = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 2))
    buffer, seed = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 3))
    config, endless = data.draw(st.sampled_from([None, CONFIG])), data.draw(st.booleans())
    way = data.draw(st.sampled_from(["drop", "truncate", "split"]))

    def make():
        stream = PackStream(samples, None, 24, config, buffer=buffer, on_overflow=way, seed=seed)
        stream.endless = endless
        return stream.shard(rank, 2)

    total = 14
    whole = pieces_of(itertools.islice(delivered(make(), workers), total))
    after = data.draw(st.integers(0, len(whole)))
    assert resumed(make, workers, after, total - after) == whole[after:]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("num_shards", [1, 4])
def test_a_datasets_stream_continues_in_a_dataloader(tmp_path, encoder, workers, num_shards):
    """Real workers, prefetching; rows with images; files read by the workers that own them."""
    datasets = pytest.importorskip("datasets")
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    rows = [sharegpt(n, has_image=n % 3 == 0) for n in range(300)]
    for shard in range(num_shards):
        part = rows[shard::num_shards]
        (tmp_path / f"{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))

    def make():
        files = [str(tmp_path / f"{shard}.jsonl") for shard in range(num_shards)]
        features = datasets.Features(
            conversations=[{"from": datasets.Value("string"), "value": datasets.Value("string")}],
            images=datasets.List(datasets.Value("string")),
        )
        source = datasets.load_dataset(
            "json", data_files=files, split="train", streaming=True, features=features,
            cache_dir=str(tmp_path / "cache"),
        )  # fmt: skip
        stream = PackStream(source, replace(encoder, media_dir=tmp_path), 200, buffer=10)
        return DataLoader(stream, batch_size=1, num_workers=workers, collate_fn=PackCollator())

    whole = [(b["input_ids"].tolist(), b["mmpack"]["resume"]) for b in make()]
    turn = encoder.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert sum(ids[0].count(turn) for ids, _ in whole) == 3 * 300  # system, user, assistant
    assert {json.loads(resume)["worker"] for _, resume in whole} == set(range(max(1, workers)))
    for after in (1, len(whole) // 2, len(whole) - 1):
        first, second = make(), make()
        for _, resume in whole[:after]:
            first.dataset.consume(resume)
        second.dataset.load_state_dict(first.dataset.state_dict())
        if after > 60:
            places = first.dataset.state_dict()["consumed"].values()
            assert any(place["sources"][0]["source"] for place in places)
        assert [b["input_ids"].tolist() for b in second] == [ids for ids, _ in whole[after:]]


def test_rows_among_encoded_samples_are_not_lost_when_a_stream_continues(encoder):
    rows = [sharegpt(n, False) for n in range(24)]
    samples = list(encoder.encode(encoder.read(rows)))
    source = [samples[n] if n % 2 else row for n, row in enumerate(rows)]
    whole = [[s.input_ids.tolist() for s in p] for p in PackStream(source, encoder, 64, buffer=3)]
    first, second = (PackStream(source, encoder, 64, buffer=3) for _ in range(2))
    first.consume(list(itertools.islice(first, 2))[-1].resume)
    second.load_state_dict(first.state_dict())
    assert whole[2:] == [[s.input_ids.tolist() for s in p] for p in second]
    assert sorted(sum(whole, [])) == sorted(s.input_ids.tolist() for s in samples)


def test_bad_rows_are_skipped_and_the_rows_after_them_keep_their_numbers(encoder, caplog):
    """One that cannot be read, one that cannot be encoded, one of two samples, documents."""
    picture = Image.new("RGB", (900, 3))
    narrow = {**sharegpt(2, has_image=True), "images": [picture]}
    rows = [sharegpt(0, False), {"text": "q"}, narrow, [sharegpt(3, False)] * 2, sharegpt(4, False)]
    with pytest.raises(ValueError, match="row 1 of the stream: .*'conversations'"):
        list(PackStream(rows, encoder, 200))
    skipping = replace(encoder, on_error="skip")
    packs = list(PackStream(rows, skipping, 200, buffer=1))
    told = [message.partition(": ")[0] for message in caplog.messages]
    assert told == ["left out row 1 of the stream", "left out row 2 of the stream"]
    entered = [json.loads(pack.resume)["sources"][0]["next"][0] for pack in packs]
    assert entered == [3, 3, 4, 5]  # the row that comes next: a buffer of one is filled at once
    (pack,) = PackStream([{"text": "q w"}], replace(encoder, stage="pretrain"), 200)
    assert "".join(encoder.tokenizer.decode(assemble(pack).input_ids).split()) == "qw<|endoftext|>"


TEXTS = ["q w a"] * 3


@pytest.fixture(scope="module")
def encoder():
    from mmpack.cli.demo import _tokenizer

    tokenizer = _tokenizer(TEXTS)
    ids = [tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in SPECIAL]
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    spec = VisionSpec(min_pixels=28 * 28, max_pixels=28 * 28 * 16, **dict(zip(names, ids)))
    return Encoder(tokenizer, spec)


SPECIAL = ("image_pad", "video_pad", "vision_start", "vision_end")


def sharegpt(number, has_image):
    return {
        "conversations": [
            {"from": "human", "value": "<image>" * has_image + "q" + " w" * (number % 17)},
            {"from": "gpt", "value": "a" + " w" * (number % 11)},
        ],
        "images": ["a.png"] * has_image,
    }

"""Every kind of source, with workers and ranks: each row is in one pack, or the source is refused."""

import collections
import itertools
import json
import os
import re
import types

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmpack import Encoder, PackStream, VisionSpec
from mmpack.cli.demo import _tokenizer
from mmpack.packing.stream_source import SourceRows

datasets = pytest.importorskip("datasets")
split_dataset_by_node = pytest.importorskip("datasets.distributed").split_dataset_by_node

COUNT = 60
SPECIAL = ("image_pad", "video_pad", "vision_start", "vision_end")
NAMES = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def row(number):
    """A row, which says its number."""
    return {"conversations": turns(number)}


def turns(number):
    return [{"from": "human", "value": f"#{number}#"}, {"from": "gpt", "value": "a"}]


@pytest.fixture(scope="module")
def encoder():
    tokenizer = _tokenizer(["0 1 2 3"])
    ids = [tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in SPECIAL]
    spec = VisionSpec(min_pixels=784, max_pixels=7840, **dict(zip(NAMES, ids)))
    return Encoder(tokenizer, spec)


class Plain(IterableDataset):
    """Every worker reads all."""

    def __iter__(self):
        yield from map(row, range(COUNT))


class Splitting(IterableDataset):
    """The recipe of torch's documentation: a worker reads its part."""

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        yield from map(row, range(worker, COUNT, workers))


def asking_late():
    """Asks before every row, by a name it imported, in a generator that another one reads."""

    def inner():
        for number in range(COUNT):
            info = get_worker_info()
            if info is None or number % info.num_workers == info.id:
                yield number

    for number in inner():
        yield row(number)


class Tars(IterableDataset):
    """WebDataset's way: stages take files from each other, each asks environment and torch late."""

    def __init__(self, splits_ranks=False, files=4):
        self.splits_ranks, self.files = splits_ranks, files

    def split_by_node(self, files):
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        elif torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            rank, world = 0, 1
        yield from itertools.islice(files, rank, None, world)

    def split_by_worker(self, files):
        info = torch.utils.data.get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        yield from itertools.islice(files, worker, None, workers)

    def __iter__(self):
        files = iter(range(self.files))
        if self.splits_ranks:
            files = self.split_by_node(files)
        for file in self.split_by_worker(files):
            yield from map(row, range(file, COUNT, self.files))


def hugging_face(num_shards, shuffled=False):
    rows = datasets.Dataset.from_list([row(number) for number in range(COUNT)])
    stream = rows.to_iterable_dataset(num_shards=num_shards)
    return stream.shuffle(seed=1, buffer_size=10) if shuffled else stream


def around(stream):
    """A generator around a stream of `datasets`, as one that changes rows is written."""
    for item in stream:
        yield {"conversations": item["conversations"]}


SOURCES = {
    "list": lambda: list(map(row, range(COUNT))),
    "function": lambda: lambda: map(row, range(COUNT)),
    "iterator": lambda: (row(number) for number in range(COUNT)),
    "plain": Plain,
    "splitting": Splitting,
    "asking late": lambda: asking_late,
    "map-style datasets": lambda: datasets.Dataset.from_list(list(map(row, range(COUNT)))),
    "datasets of a shard": lambda: hugging_face(1),
    "datasets of 3 shards": lambda: hugging_face(3),
    "datasets of 8 shards": lambda: hugging_face(8),
    "datasets, shuffled": lambda: hugging_face(8, shuffled=True),
    "around datasets": lambda: lambda: around(hugging_face(8, shuffled=True)),
    "around datasets of a shard": lambda: around(hugging_face(1)),
    "WebDataset": Tars,
    "a function of WebDataset": lambda: lambda: Tars(files=3),
    "datasets, taken": lambda: hugging_face(8, shuffled=True).take(20),
    "datasets, skipped": lambda: hugging_face(8).skip(20),
    "datasets by indices": lambda: hugging_face(8).filter(by_index, with_indices=True),
    "datasets, interleaved": lambda: datasets.interleave_datasets(
        [hugging_face(8), hugging_face(4).filter(is_odd)], probabilities=[0.5, 0.5], seed=1
    ),
}


def by_index(row, index):
    return index % 3 == 0


def is_odd(row):
    return number_of(row) % 2 == 1


def number_of(row):
    return int(row["conversations"][0]["value"].strip("#"))


def packs_of(make, encoder, workers, ranks=1):
    """(row numbers, resume) of the packs of all ranks, one rank after the other."""
    tokenizer = encoder.tokenizer

    def collate(pack):
        text = "".join(tokenizer.decode(sample.input_ids) for sample in pack)
        return re.findall("#([0-9]+)#", text), pack.resume

    for rank in range(ranks):
        stream = PackStream(make(), encoder, 100, buffer=7).shard(rank, ranks)
        loader = DataLoader(stream, None, num_workers=workers, collate_fn=collate)
        for numbers, resume in loader:
            stream.consume(resume)
            yield [int(number) for number in numbers], json.loads(resume)


def counted(packs):
    return collections.Counter(number for numbers, _ in packs for number in numbers)


ALIKE = {"function", "iterator", "plain", "map-style datasets", "datasets of 3 shards"}
ALIKE |= {"around datasets of a shard", "a function of WebDataset"}  # to others: tried with -m slow
MATRIX = [
    pytest.param(
        *case, marks=() if case[1:] == (2, 2) and case[0] not in ALIKE else pytest.mark.slow
    )
    for case in itertools.product(SOURCES, (0, 1, 2, 4), (1, 2))
]


@pytest.mark.parametrize(("kind", "workers", "ranks"), MATRIX)
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_every_row_of_every_kind_of_source_once(kind, workers, ranks, encoder):
    source = SOURCES[kind]()
    rows = source() if callable(source) else source
    expected = collections.Counter(map(number_of, rows))
    assert kind.startswith("datasets") or expected == collections.Counter(range(COUNT))
    packs = list(packs_of(SOURCES[kind], encoder, workers, ranks))
    assert counted(packs) == expected
    assert len({resume["sources"][0]["rows"] for _, resume in packs}) == 1  # what ranks compare


def test_a_worker_is_hidden_from_its_source_alone(monkeypatch):
    """While it runs, where it fails too; what takes the rows knows its worker."""
    info = types.SimpleNamespace(id=1, num_workers=2)
    monkeypatch.setattr(torch.utils.data._utils.worker, "_worker_info", info)
    seen = []

    def source():
        for number in range(3):
            seen.append(get_worker_info())
            yield number
        raise OSError("the end of the file is missing")

    taken = []
    with pytest.raises(OSError, match="the end of the file is missing"):
        for number, row in SourceRows(source, 0, (0, 1), 1):
            assert get_worker_info() is info
            taken.append((number, row))
    assert taken == [(0, 0), (1, 1), (2, 2)]
    assert seen == [None] * 3
    assert get_worker_info() is info
    with pytest.raises(ZeroDivisionError):
        next(iter(SourceRows(lambda: 1 // 0, 0, (0, 1), 1)))
    assert get_worker_info() is info


def lines_of(file):
    for line in file:
        yield json.loads(line)


def test_workers_that_read_other_rows_are_refused(encoder, tmp_path):
    """A shuffle without a seed, and one open file that forked workers share."""

    def shuffled():
        yield from map(row, np.random.default_rng().permutation(COUNT).tolist())

    words = "worker . reads other rows of the source than worker ..*seed its shuffle"
    with pytest.raises(ValueError, match=words):
        list(packs_of(lambda: shuffled, encoder, 2))
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row(number)).ljust(127) + "\n" for number in range(400)]
    path.write_text("".join(lines))  # none is cut at the end of a buffer
    with open(path) as file, pytest.raises(ValueError, match=words):
        list(packs_of(lambda: lines_of(file), encoder, 2))
    assert counted(packs_of(lambda: shuffled, encoder, 0)) == collections.Counter(range(COUNT))


def test_what_ranks_compare_differs_where_they_read_other_rows(encoder, monkeypatch):
    """Split by the rank or shuffled without a seed. What comes of it: test_stream_trainer.py."""

    def read_first(make, rank):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        stream = PackStream(make(), encoder, 100).shard(rank, 2)
        return json.loads(next(iter(stream)).resume)["sources"][0]["rows"]

    splitting = [
        lambda: Tars(splits_ranks=True),
        lambda: hugging_face(8).shuffle(),  # files to ranks, in an order of each
        lambda: hugging_face(1).shuffle(),
    ]
    for make in splitting:
        assert read_first(make, 0) != read_first(make, 1)
    assert read_first(Tars, 0) == read_first(Tars, 1)


@pytest.mark.parametrize(
    ("workers", "num_shards"),
    [(0, 4), (2, 5), *(pytest.param(2, n, marks=pytest.mark.slow) for n in (1, 2, 4, 8))],
)
def test_a_source_split_by_node_is_split_by_it_alone(encoder, workers, num_shards):
    def part(rank):
        return split_dataset_by_node(hugging_face(num_shards), rank, 2)

    with pytest.raises(
        ValueError, match="already split for rank 1 of 2.*remove split_dataset_by_node"
    ):
        list(packs_of(lambda: part(1), encoder, workers, ranks=2))
    found = [counted(packs_of(lambda r=r: part(r), encoder, workers)) for r in range(2)]
    assert found[0] + found[1] == collections.Counter(range(COUNT))

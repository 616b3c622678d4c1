"""Packing on Ray: the same bytes as one process, whatever dies. A real Ray is slow to start: `-m slow`."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

pytest.importorskip("pyarrow")

from mmpack.cli.main import main
from mmpack.data.file_formats import Row
from mmpack.errors import Skip
from mmpack.store import build, ray_chunks
from mmpack.store.build import Indexed, index_rows
from mmpack.store.ray_chunks import RayTasks, check_ray

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs ray: pip install '.[ray]'")


@pytest.fixture
def rows(tmp_path):
    """1,500 rows, six chunks; some of them are bad."""
    Image.new("RGB", (60, 90)).save(tmp_path / "a.png")
    lines = []
    for n in range(1500):
        turns = [{"from": "human", "value": f"<image>{n}?"}, {"from": "gpt", "value": "y" * n}]
        image = "missing.png" if n % 97 == 5 else "a.png"
        lines.append(json.dumps({"conversations": turns, "images": [image]}))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    return tmp_path / "a.jsonl"


def indexed(files, encoder, on_error="raise", **where):
    """(batches, what ended it)"""
    encoder = replace(encoder, on_error=on_error)
    done = []
    try:
        for one in index_rows(list(encoder.groups(files)), encoder, **where):
            done.append(one.batch)
    except ValueError as error:
        return done, str(error)
    return done, None


# Without Ray


@pytest.mark.parametrize(
    ("address", "refused"),
    [
        ("rows.json", "takes HOST:PORT of a cluster, or auto, got rows.json; for a Ray of its own"),
        ("head:x", "takes HOST:PORT"),
        ("ray://head:10001", "ray://head:10001 is an address of Ray's client; run mmpack pack on"),
    ],
)
def test_what_is_no_address(address, refused):
    with pytest.raises(ValueError, match=refused):
        check_ray(address)


def test_ray_that_is_missing_is_named_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ray_chunks, "find_spec", lambda name: None)
    words = f"pack none.json --tokenizer none --capacity 8 --out {tmp_path}/out --ray"
    assert main(words.split()) == 1
    error = "--ray needs ray, which is not installed; pip install 'mmpack[ray]'"
    assert error in capsys.readouterr().err
    for address in ("auto", "head:6379", "10.0.0.1:6379", "[::1]:6379", "local"):
        with pytest.raises(ValueError, match="needs ray"):
            check_ray(address)
    monkeypatch.setattr(ray_chunks, "find_spec", lambda name: SimpleNamespace())
    assert main([*words.split(), "--jobs", "2"]) == 1
    assert "--jobs does not apply: Ray gives each chunk a core (--ray)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("init", "told"),
    [
        ("time.sleep(9)", "no Ray answers at head:1 within 2 s"),
        (
            "raise RuntimeError('Version mismatch: The cluster was\\n    Ray: 1')",
            r"cannot use the Ray at head:1: RuntimeError: Version mismatch: The cluster was Ray: 1; check",
        ),
        (
            "exec('try:\\n raise OSError(\"no token\")\\nexcept OSError as e:\\n raise ConnectionError(1) from e')",
            "cannot use the Ray at head:1: OSError: no token; check",
        ),
        ("os.abort()", "cannot use the Ray at head:1"),
    ],
)
def test_a_cluster_that_cannot_be_used(init, told, tmp_path, monkeypatch):
    """Ray's own wait is long and may end the process, so it is tried in another."""
    (tmp_path / "ray.py").write_text(f"import os, time\ndef init(*_, **__): {init}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(ray_chunks, "_ANSWER_S", 2.0 if "sleep" in init else 60.0)
    with pytest.raises(ValueError, match=told):
        ray_chunks._try("head:1")


class FakeRay(ModuleType):
    """A Ray that this process started before; its tasks end with `errors`, in turn."""

    def __init__(self, *errors):
        super().__init__("ray")
        base = type("RayError", (Exception,), {})
        task_error = type("RayTaskError", (base,), {"cause": ValueError("the work's own")})
        self.exceptions = SimpleNamespace(RayError=base, RayTaskError=task_error)
        self.errors, self.cancelled, self.tasks = list(errors), [], 0
        self.is_initialized = lambda: True
        self.put = lambda value: value
        self.cluster_resources = lambda: {"CPU": 3.0}
        self.cancel = self.cancelled.append

    def remote(self, **options):
        assert options == {"max_retries": 3}
        return lambda function: SimpleNamespace(remote=self._submitted)

    def _submitted(self, work, chunk):
        self.tasks += 1
        return self.tasks

    def get(self, task):
        raise getattr(self.exceptions, self.errors.pop(0))("it died\nits log")


def test_what_ends_a_task_is_told(monkeypatch):
    fake = FakeRay("RayTaskError", "RayError")
    monkeypatch.setitem(sys.modules, "ray", fake)
    with pytest.raises(ValueError, match="already uses a Ray; leave out the address head:1"):
        RayTasks(len, "head:1", 2)
    tasks = RayTasks(len, "local", 2)
    assert tasks.most() == 6
    chunk = (0, [Row("a.jsonl", number, {}) for number in (7, 8, 9)])
    for error in (
        "the work's own",
        r"Ray ended rows 7 to 9 of a.jsonl without a result, after 3 retries .*\(it died\); memory",
    ):
        with pytest.raises(ValueError, match=error):
            tasks.result(tasks.submit(chunk))
    left = tasks.submit(ValueError("torn"))
    tasks.close()  # Ray stays; only what is not finished is dropped
    assert fake.cancelled == [left]


def test_a_ray_that_does_not_start_is_told(monkeypatch):
    def init(address, **options):
        assert (address, options["num_cpus"]) == ("local", 2)
        assert options["include_dashboard"] is False
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        raise RuntimeError("no memory")

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.setitem(
        sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init)
    )
    with pytest.raises(ValueError, match="Ray did not start on this machine: no memory; its logs"):
        RayTasks(len, "local", 2)


def test_results_are_in_order_and_few_chunks_in_flight(monkeypatch):
    """The one place that hands out chunks, with workers that count."""
    seen = []

    class Workers:
        def __init__(self, work, address, cores):
            self.work, self.flying, self.closed = work, 0, False
            seen.append(self)

        def most(self):
            return 3

        def submit(self, chunk):
            self.flying += 1
            assert self.flying <= 4
            return chunk

        def result(self, chunk):
            self.flying -= 1
            return self.work(chunk)

        def close(self):
            self.closed = True

    monkeypatch.setattr(ray_chunks, "RayTasks", Workers)
    work = lambda chunk: Indexed(chunk, None)  # noqa: E731
    read = []
    chunks = (read.append(number) or number for number in range(20))
    results = build._in_order(work, chunks, None, "local")
    assert [next(results).num_rows for _ in range(10)] == list(range(10))
    assert len(read) == 13
    assert not seen[0].closed
    results.close()
    assert seen[0].closed
    assert [one.num_rows for one in build._in_order(work, iter(range(9)), None, "local")] == [
        *range(9)
    ]


# With Ray


def ray_processes(parent, title):
    """The processes whose title begins so, of the Ray that a process started."""
    found = []
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        parents[int(folder.name)] = int(status[1]), words
    for process, (raylet, words) in parents.items():
        if words.startswith(title) and parents.get(raylet, (0, ""))[0] == parent:
            found.append(process)
    return found


class Killer(threading.Thread):
    """Kills up to `most` of this process's Ray workers while they work on a chunk."""

    def __init__(self, most):
        super().__init__(daemon=True)
        self.most, self.killed, self.done = most, 0, threading.Event()

    def run(self):
        while self.killed < self.most and not self.done.wait(0.02):
            for process in ray_processes(os.getpid(), "ray::chunk_of_rows")[:1]:
                os.kill(process, signal.SIGKILL)
                self.killed += 1


@pytest.fixture
def killer():
    made = []

    def start(most) -> Callable[[], int]:
        made.append(Killer(most))
        made[0].start()
        return lambda: made[0].killed

    yield start
    for one in made:
        one.done.set()
        one.join()


@needs_ray
@pytest.mark.slow
def test_the_same_bytes_as_one_process(rows, shared, tmp_path, capsys, monkeypatch):
    import ray

    monkeypatch.chdir(tmp_path)  # relative paths, in workers too
    monkeypatch.setattr(build, "_num_cores", lambda: 2)
    words = ["pack", "a.jsonl", "--tokenizer", str(shared / "tokenizer" / "qwen2_vl"), "--json"]
    words += ["--on-error", "skip", "--capacity", "4096", "--out"]
    assert main([*words, "one", "--jobs", "1"]) == 0
    assert main([*words, "two", "--ray"]) == 0
    one, two = map(json.loads, capsys.readouterr().out.splitlines())
    assert {**one, "seconds": 0} == {**two, "seconds": 0}
    assert one["bad_rows"] == 17
    assert not ray.is_initialized()
    assert os.environ.pop("RAY_USAGE_STATS_ENABLED") == "0"
    names = sorted(path.name for path in Path("one").iterdir())
    assert names == sorted(path.name for path in Path("two").iterdir())
    for name in set(names) - {"mmpack.json"}:  # which says when
        assert (Path("one") / name).read_bytes() == (Path("two") / name).read_bytes()


@needs_ray
@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(rows, encoder, killer):
    expected, _ = indexed(rows, encoder, [], jobs=1)
    killed = killer(2)
    assert indexed(rows, encoder, [], ray="local", jobs=2) == (expected, None)
    assert killed() == 2


@needs_ray
@pytest.mark.slow
def test_rows_whose_workers_always_die_are_named(rows, encoder, killer):
    killed = killer(1000)
    done, error = indexed(rows, encoder, [], ray="local", jobs=1)
    assert done == []
    assert error.startswith("Ray ended rows 0 to 255 of a.jsonl without a result, after 3 retries")
    assert killed() >= 4


@needs_ray
@pytest.mark.slow
def test_errors_are_those_of_one_process(rows, encoder, tmp_path):
    """Of a row, of too many, of a file that ends early, and of a bug; a Ray that was there stays."""
    import ray

    broken = tmp_path / "broken.json"
    broken.write_text("[")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        for files, on_error in (
            (rows, lambda: "raise"), (rows, lambda: Skip(0.001, [])), ([rows, broken, rows], list),
        ):  # fmt: skip
            alone = indexed(files, encoder, on_error(), jobs=1)
            assert alone[1] is not None
            assert indexed(files, encoder, on_error(), ray="local") == alone
        wrong = replace(encoder, on_error=[], vision=None)
        with pytest.raises(AttributeError, match="NoneType"):
            list(index_rows(list(encoder.groups(rows)), wrong, ray="local"))
        assert ray.is_initialized()
        with pytest.raises(ValueError, match="already uses a Ray"):
            list(index_rows(list(encoder.groups(rows)), encoder, ray="auto"))
    finally:
        ray.shutdown()


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_a_signal_leaves(number, rows, shared, tmp_path):
    """Ctrl-C reaches all processes of a terminal; a kill reaches one."""
    words = [sys.executable, "-m", "mmpack", "pack", str(rows), "--ray", "--on-error", "skip"]
    words += ["--tokenizer", str(shared / "tokenizer" / "qwen2_vl"), "--capacity", "4096"]
    words += ["--out", str(tmp_path / "out")]
    hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    options = {
        "stderr": subprocess.PIPE,
        "text": True,
        "preexec_fn": hear,
        "start_new_session": True,
    }
    with subprocess.Popen(words, **options) as process:
        workers: list[int] = []
        while not workers and process.poll() is None:
            time.sleep(0.05)
            workers = ray_processes(process.pid, "ray::chunk_of_rows")
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        error = process.communicate(timeout=60)[1]
    assert workers
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert error.endswith("mmpack: interrupted\n")
        assert not list(tmp_path.glob("out*"))
    until = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < until
        time.sleep(0.1)


@needs_ray
@pytest.mark.slow
def test_a_cluster_by_its_address(rows, shared, tmp_path):
    """A cluster that another process started, which stays."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    head = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--port", "6398"]
    head += ["--num-cpus", "2", "--include-dashboard=false", "--block"]
    words = [sys.executable, "-m", "mmpack", "pack", str(rows), "--on-error", "skip", "--json"]
    words += ["--tokenizer", str(shared / "tokenizer" / "qwen2_vl"), "--capacity", "4096"]
    with subprocess.Popen(head, env=environment, stdout=subprocess.DEVNULL) as cluster:
        try:
            outcomes = []
            for name, where in (("one", ["--jobs", "1"]), ("two", ["--ray", "127.0.0.1:6398"])):
                out = tmp_path / name
                run = [*words, "--out", str(out), *where]
                done = subprocess.run(run, env=environment, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                outcomes.append((out / "samples.arrow").read_bytes())
            assert outcomes[0] == outcomes[1]
            assert cluster.poll() is None
        finally:
            cluster.terminate()

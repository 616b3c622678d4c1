"""Names of models: local paths, and repositories of a hub on the loopback."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

from mmpack import Encoder
from mmpack.data.model_folder import local_path, pinned
from mmpack.hf.loading import load_model
from mmpack.store.manifest import read_manifest

OLD, NEW = "a" * 40, "b" * 40
UNREACHABLE = "http://127.0.0.1:9"  # discard: nobody listens


class Hub(ThreadingHTTPServer):
    """The endpoints of a hub that huggingface_hub uses. `repos`: files by repository and commit."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.branch, self.asked = {}, OLD, []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def downloaded(self):
        return {
            path.rpartition("/")[2]
            for verb, path in self.asked
            if verb == "GET" and "/resolve/" in path
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        if path == "/the branch moves":
            hub.branch = NEW
            return self.answer(200, b"", {})
        hub.asked.append((self.command, path))
        match = re.fullmatch(r"(?:/api/models)?/(\w+/\w+)/(\w+)/(\w+)(?:/(.+))?", path)
        if not match:
            return self.answer(404, b"", {})
        repo, what, revision, name = match.groups()
        if repo == "owner/gated" and what == "resolve":
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if repo not in hub.repos:
            return self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        commit = hub.branch if revision == "main" else revision
        files = hub.repos[repo].get(commit)
        if files is None:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if what == "resolve":
            content = files[name]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hash((path, content)):x}"'}
            return self.answer(200, content, headers)
        if what == "revision":
            siblings = [{"rfilename": name, "size": len(files[name])} for name in files]
            found = {"id": repo, "sha": commit, "siblings": siblings}
        else:
            assert what == "tree"
            found = [
                {"type": "file", "path": name, "size": len(files[name]), "oid": f"{n:040x}"}
                for n, name in enumerate(files)
            ]
        return self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def answer(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def python(tmp_path):
    """Runs a module or code in a process of its own, whose hub and cache are ours."""

    def run(hub_url, *words, **environment):
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = {"HF_ENDPOINT": hub_url, "HF_HOME": str(tmp_path / "hf"), **environment}
        return subprocess.run(
            [sys.executable, *map(str, words)],
            env={**clean, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "no_proxy": "*", **environment},
            cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    return run


RESOLVE = """
import json, sys
from mmpack import Encoder
from mmpack.data.model_folder import local_path
weights, *names = sys.argv[1:]
for name in names:
    try:
        print(json.dumps(str(local_path(name, weights=weights == "weights"))))
    except ValueError as error:
        print(json.dumps({"error": str(error)}))
"""
MODEL = {
    name: name.encode()
    for name in (
        "config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "preprocessor_config.json",
        "processor_config.json", "video_preprocessor_config.json", "model.safetensors.index.json",
        "model-1.safetensors", "pytorch_model.bin", "training.pt", "modeling.py", "README.md",
        "onnx/config.json", "data.pkl",
    )
}  # fmt: skip
SETTINGS = {
    name for name in MODEL if name.endswith((".json", ".txt", ".jinja")) and "/" not in name
}


def resolved(python, hub_url, *names, weights=False, **environment):
    """What each name became, and what was logged."""
    kind = "weights" if weights else "settings"
    ran = python(hub_url, "-c", RESOLVE, kind, *names, **environment)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()], ran.stderr


def test_only_settings_and_safetensors_are_downloaded(hub, python):
    hub.repos["owner/model"] = {OLD: MODEL}
    (path, again), said = resolved(python, hub.url, "owner/model", "hf:owner/model@main")
    assert path == again and path.endswith(OLD)
    assert {*os.listdir(path)} == hub.downloaded() == SETTINGS
    assert said.count("\n") == 1  # before it is downloaded
    assert f"downloading 8 files (0.0 MB) of owner/model, commit {OLD}, from {hub.url}" in said
    hub.asked.clear()
    (path,), said = resolved(python, hub.url, "owner/model", weights=True)
    assert hub.downloaded() == {"model-1.safetensors"}
    assert {*os.listdir(path)} == SETTINGS | {"model-1.safetensors"}
    (path,), said = resolved(python, hub.url, "owner/model", weights=True)
    assert said == f"owner/model is commit {OLD}\n"


def test_a_branch_moves_and_a_commit_stays(hub, python):
    hub.repos["owner/model"] = {OLD: MODEL, NEW: {"config.json": b"new"}}
    resolved(python, hub.url, "owner/model")
    hub.branch = NEW
    (branch, commit), said = resolved(python, hub.url, "owner/model", f"hf:owner/model@{OLD}")
    assert branch.endswith(NEW) and commit.endswith(OLD)
    assert (
        said.count("\n") == 1
        and f"downloading 1 file (0.0 MB) of owner/model, commit {NEW}" in said
    )


def test_without_a_network_the_cache_is_used(hub, python):
    hub.repos["owner/model"] = {OLD: MODEL}
    resolved(python, hub.url, "owner/model")
    hub.asked.clear()
    for url, environment in ((hub.url, {"HF_HUB_OFFLINE": "1"}), (UNREACHABLE, {})):
        (path, other), said = resolved(python, url, "owner/model", "owner/other", **environment)
        assert path.endswith(OLD) and said.startswith(
            f"owner/model is commit {OLD} in the Hugging Face"
        )
        assert other["error"].startswith(
            "owner/other: there is no such folder here, nor at revision main in the Hugging Face cache, "
            f"and {url} does not give it: "
        )
        assert "\n" not in other["error"]
        assert "offline mode" in other["error"] or url == UNREACHABLE
    assert hub.asked == []


def test_what_a_hub_refuses_is_one_sentence(hub, python):
    hub.repos["owner/model"] = {OLD: MODEL}
    hub.repos["owner/gated"] = {OLD: MODEL}
    names = ["owner/nothing", "owner/gated", "hf:owner/model@v9"]
    errors, said = resolved(python, hub.url, *names)
    assert [one["error"].replace(hub.url, "HUB") for one in errors] == [
        "owner/nothing: there is no such folder here, and no such model at HUB; if it is private, run: "
        "hf auth login",
        "owner/gated is gated; accept its terms at HUB/owner/gated and run: hf auth login",
        "owner/model has no revision v9 at HUB",
    ]
    assert said.count("\n") == 1 and "of owner/gated" in said


@pytest.mark.parametrize(
    "name",
    ["nowhere", "./owner/model", "/owner/model", "~owner/model", "~/model", "a/b/c", "here/model",
     "owner/model@v1", "hf:model", "https://127.0.0.1/x", "", "owner/mo del"],
)  # fmt: skip
def test_names_that_are_no_hubs_are_refused_at_once(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(
        ValueError, match="no such file or folder; a Hugging Face model is owner/name or hf:"
    ):
        local_path(name)


def test_a_local_path_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert str(local_path("owner/model")) == pinned("owner/model") == "owner/model"
    assert pinned("./owner/model/") == "./owner/model/"


def test_a_recorded_name_is_looked_up_in_the_cache_alone(monkeypatch, tmp_path):
    for name in ("owner/model", "hf:owner/model", "hf:owner/model@main"):
        with pytest.raises(ValueError, match="there is no such file or folder$"):
            local_path(name, download=False)
    with pytest.raises(ValueError, match=f"hf download owner/model --revision {OLD} --include"):
        local_path(f"hf:owner/model@{OLD}", download=False)


def test_a_model_is_loaded_with_its_weights(small_set, monkeypatch):
    asked = []

    def snapshot(repo, revision, weights):
        asked.append((repo, revision, weights))
        return small_set  # with config.json, without weights

    monkeypatch.setattr("mmpack.data.model_folder._snapshot", snapshot)
    assert load_model(None, "hf:owner/model@v1", seed=0).config.model_type == "qwen2_vl"
    with pytest.raises(OSError, match="model.safetensors"):
        load_model("owner/model", None, seed=0)
    assert asked == [("owner/model", "v1", False), ("owner/model", "main", True)]


# In one process, as importing transformers takes longest: packed, inspected offline, and packed again when the
# branch has moved.
PACK_AND_INSPECT = """
import os, sys, urllib.request
from mmpack.cli.main import main
from mmpack.data.model_folder import _snapshot
from huggingface_hub import constants
def next_one():
    for file in (sys.stdout, sys.stderr):
        print("NEXT", file=file, flush=True)
assert main(sys.argv[1:]) == 0
next_one()
constants.HF_HUB_OFFLINE = True
assert main(["inspect", "packed"]) == 0
constants.HF_HUB_OFFLINE = False
next_one()
_snapshot.cache_clear()  # a branch is one commit in a process
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/the%20branch%20moves").close()
assert main(sys.argv[1:]) == 1
"""


def test_pack_records_the_commit(hub, python, small_set, tmp_path):
    """The settings of a Hub model are its folder's, and a branch that moved is not the same tokenizer."""
    folder = small_set / "tokenizer"
    model = {file.name: file.read_bytes() for file in folder.iterdir()}
    model["config.json"] = (small_set / "config.json").read_bytes()
    video = json.loads(model["preprocessor_config.json"]) | {"fps": 1.0, "max_frames": 12}
    model["video_preprocessor_config.json"] = json.dumps(video).encode()
    hub.repos["owner/model"] = {OLD: model, NEW: model | {"README.md": b"new"}}
    pack = ["pack", small_set / "train.json", "--tokenizer", "owner/model"]
    pack += ["--config", "owner/model", "--capacity", 2048, "--out", "packed"]

    ran = python(hub.url, "-c", PACK_AND_INSPECT, *pack)
    assert ran.returncode == 0, ran.stderr
    packed, inspected, moved = ran.stderr.split("NEXT\n")
    assert packed.count("downloading") == 1 and f"of owner/model, commit {OLD}" in packed
    manifest = read_manifest(tmp_path / "packed")
    pin = f"hf:owner/model@{OLD}"
    assert manifest.about.tokenizer == manifest.about.planning.config == pin
    (tmp_path / "folder").mkdir()
    for name, content in model.items():
        (tmp_path / "folder" / name).write_bytes(content)
    assert manifest.vision == Encoder.from_folder(tmp_path / "folder").vision
    assert manifest.vision.video.fps == 1.0 and manifest.vision.video.max_frames == 12

    assert "[[" in ran.stdout.split("NEXT\n")[1] and inspected == ""
    assert "config and the tokenizer's commit changed since" in moved

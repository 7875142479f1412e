"""Models by folder, run folder, package or hub id, their weights, and hubs that fail."""

import hashlib
import http.server
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from model_files import (
    edit_tensors,
    names,
    refused,
    save_as_pickle,
    save_as_shards,
    save_small_model,
    use_model,
)
from safetensors.torch import load_file, save, save_file

from bert import BertModel
from engine.checkpoint import write_json
from engine.hub import EMBEDDED, read_weights, resolve_model, shard_names
from tokenizer import BertTokenizer

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------------------- names


def test_a_folder_stands_for_itself_and_a_run_folder_for_its_best_model(tiny, tmp_path):
    assert resolve_model(tiny) == resolve_model(str(tiny)) == tiny
    run = tmp_path / "run"
    shutil.copytree(tiny, run / "best")
    (run / "log.jsonl").touch()
    assert resolve_model(run) == run / "best"
    BertModel.from_pretrained(run)
    shutil.rmtree(run / "best")
    refused(lambda: resolve_model(run), run, "without best/")
    (tiny / "best").mkdir()
    assert resolve_model(tiny) == tiny  # a model folder, whatever is beside the model
    (tiny / "best").rmdir()


def test_the_embedded_model_is_found_without_importing_its_package():
    for name, (package, _) in EMBEDDED.items():
        assert {"config.json", "model.safetensors", "vocab.txt"} <= set(names(resolve_model(name)))
        assert package not in sys.modules


def test_an_embedded_model_without_its_package_names_the_package(monkeypatch):
    monkeypatch.setitem(EMBEDDED, "ghost", ("no_such_package_of_ours", "model"))
    refused(lambda: resolve_model("ghost"), "--model ghost", "no_such_package_of_ours", "setup.sh")


def test_a_file_is_no_model(tiny):
    refused(lambda: resolve_model(tiny / "config.json"), tiny / "config.json", "give the folder")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("./no/such/folder", "no such folder"),
        ("../x", "no such folder"),
        ("~/models", "no such folder"),
        ("/no/such", "no such folder"),
        ("runs/typo", "no such folder"),
        ("a b", "valid hub id"),
        ("a/b/c/d", "valid hub id"),
        ("--x--", "valid hub id"),
        ("C:\\models", "valid hub id"),
        ("n" * 300, "valid hub id"),
    ],
)
def test_a_name_that_cannot_exist_is_refused_without_network(use_hub, name, part):
    with hub({}) as server:
        use_hub(server.endpoint)
        refused(lambda: resolve_model(name), "--model", part)
    assert server.requests == []


# ---------------------------------------------------------------------------- a hub of our own

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Files = dict[str, bytes]


class Handler(http.server.BaseHTTPRequestHandler):
    """Just enough of the hub: what a repository contains, and `/{id}/resolve/main/{file}`."""

    def reply(self) -> None:
        """The answer, or 404 with the hub's own word for what does not exist."""
        self.server.requests.append((self.command, self.path))
        listing = re.match(r"/api/models/([^?]*?)(/tree/\w+|/revision/\w+|)(\?|$)", self.path)
        download = re.match(r"/(.*)/resolve/\w+/(.*)", self.path)
        found = listing or download
        repo, name = found.group(1, 2) if found else ("", "")
        files = self.server.repos.get(repo)
        if files is None or not (listing or name in files):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if files is None else "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if download:
            data = files[name]
        elif name.startswith("/tree"):
            listed = [{"type": "file", "path": n, "oid": "0", "size": 1} for n in files]
            data = json.dumps(listed).encode()
        else:
            siblings = [{"rfilename": n} for n in files]
            data = json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            half = self.server.breaks_off and name == "model.safetensors"
            self.wfile.write(data[: len(data) // 3] if half else data)

    do_GET = do_HEAD = reply

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def hub(repos: dict[str, Files], breaks_off: bool = False) -> Iterator[http.server.HTTPServer]:
    """A hub with `repos` (id -> files); its transfers of weights may break off half-way."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repos, server.breaks_off, server.requests = repos, breaks_off, []
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def downloads(server: http.server.HTTPServer) -> set[str]:
    """The names of all files that were downloaded, or would have been had they existed."""
    gets = [path for command, path in server.requests if command == "GET" and "/resolve/" in path]
    return {path.rpartition("/resolve/")[2].partition("/")[2] for path in gets}


TINY = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 9,
}
# What real repositories contain as well, and nobody asks for.
UNWANTED = ["README.md", "tf_model.h5", "modeling_evil.py", "onnx/model.onnx", ".gitattributes"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##b", "c", ".", "!"]


def hub_files(folder: Path, shards: bool = False) -> tuple[Files, dict[str, torch.Tensor]]:
    """A small BERT as transformers writes it, file name -> bytes; and its weights."""
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**TINY))
    model.save_pretrained(folder, max_shard_size="1KB" if shards else "1GB")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {**files, **dict.fromkeys(UNWANTED, b"unwanted")}, model.state_dict()


CHILD = """
import sys
from pathlib import Path
from bert import BertModel
from engine.errors import UserError
from tokenizer import BertTokenizer
for name in sys.argv[2:]:
    try:
        tokenizer = BertTokenizer.from_pretrained(name)
        BertModel.from_pretrained(name).save_pretrained(Path(sys.argv[1]) / name)
    except UserError as error:
        print(name, "UserError", error)
    else:
        print(name, "loaded", tokenizer("ab c!")["input_ids"])
"""


def load_in_a_process(folder: Path, *ids: str, **environment: str) -> list[str]:
    """Load each id in a fresh process, save it as folder/id; a line about each, in order."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    own = {
        "PYTHONIOENCODING": "utf-8",
        "NO_PROXY": "127.0.0.1",
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), *ids],
        cwd=ROOT,
        env={**inherited, **own, **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(ids)
    return lines


def with_trained_pooler(files: Files) -> tuple[Files, dict[str, torch.Tensor]]:
    """As sentence-transformers leaves a pooler that it has trained; and that pooler."""
    width = TINY["hidden_size"]
    pooler = {"linear.weight": torch.eye(width), "linear.bias": torch.ones(width)}
    dense = {"in_features": width, "out_features": width, "bias": True}
    dense["activation_function"] = "torch.nn.modules.activation.Tanh"
    return {
        **files,
        "modules.json": b"[]",
        "1_Pooling/config.json": b'{"pooling_mode_cls_token": true}',
        "2_Dense/config.json": json.dumps(dense).encode(),
        "2_Dense/model.safetensors": save(pooler),
    }, pooler


def test_hub_models_are_downloaded_once_and_then_load_offline(tmp_path):
    """From a hub on this machine, then with the hub gone and in offline mode."""
    files, weights = hub_files(tmp_path / "tiny")
    sharded, _ = hub_files(tmp_path / "sharded", shards=True)
    assert sum(name.endswith(".safetensors") for name in sharded) > 1
    trained, pooler = with_trained_pooler(files)
    repos = {"org/sharded": sharded, "org/trained": trained}
    repos["org/tiny"] = {**files, "pytorch_model.bin": b"unwanted"}
    repos["org/broken"] = {**files, "config.json": b"{"}

    def assert_loaded(lines: list[str]) -> None:
        for line, name in zip(lines, ("org/tiny", "org/sharded"), strict=True):
            assert line == f"{name} loaded [2, 5, 7, 8, 10, 3]"
            loaded = load_file(tmp_path / name / "model.safetensors")
            assert loaded.keys() == weights.keys()
            assert all(torch.equal(loaded[key], tensor) for key, tensor in weights.items())
            (tmp_path / name / "model.safetensors").unlink()

    ids = ("org/tiny", "org/sharded", "org/absent")
    with hub(repos) as server:
        *good, absent, with_pooler, broken = load_in_a_process(
            tmp_path, *ids, "org/trained", "org/broken", HF_ENDPOINT=server.endpoint
        )
    assert_loaded(good)
    assert "--model org/absent: no folder of that name, and the hub has no such" in absent
    assert "config.json: damaged" in broken
    assert with_pooler.startswith("org/trained loaded")
    loaded = load_file(tmp_path / "org/trained" / "model.safetensors")
    assert torch.equal(loaded["pooler.dense.weight"], pooler["linear.weight"])
    assert torch.equal(loaded["pooler.dense.bias"], pooler["linear.bias"])
    assert "model.safetensors" in downloads(server)
    assert not downloads(server) & {*UNWANTED, "pytorch_model.bin"}

    offline = {"HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "1"}
    *good, absent, plain = load_in_a_process(tmp_path, *ids, "no-such-model", **offline)
    assert_loaded(good)
    for line, name in ((absent, "org/absent"), (plain, "no-such-model")):
        assert f"--model {name}" in line
        assert "offline mode" in line
        assert "all-MiniLM-L6-v2" in line


@pytest.fixture
def use_hub(tmp_path, monkeypatch) -> Callable[[str], None]:
    """`use_hub(endpoint)` points this process's hub library there, its cache empty."""

    def point(endpoint: str) -> None:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        values = {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
        }
        for name, value in values.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)

    return point


def test_a_download_that_keeps_breaking_off_is_refused(tmp_path, use_hub, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the library waits between tries
    files, _ = hub_files(tmp_path / "tiny")
    with hub({"org/tiny": files}, breaks_off=True) as server:
        use_hub(server.endpoint)
        refused(lambda: resolve_model("org/tiny"), "--model org/tiny")
    assert "model.safetensors" in downloads(server)


def test_an_unreachable_hub_is_refused_with_the_model_that_needs_none(use_hub):
    with hub({}) as server:
        use_hub(server.endpoint)
    refused(lambda: resolve_model("org/tiny"), "--model org/tiny", "all-MiniLM-L6-v2")


def test_the_network_is_not_asked_if_only_local_files_are_wanted(use_hub):
    with hub({}) as server:
        use_hub(server.endpoint)
        for load in (BertModel.from_pretrained, BertTokenizer.from_pretrained):
            refused(lambda load=load: load("org/tiny", local_files_only=True), "not in the cache")
    assert server.requests == []


def test_an_incomplete_hub_model_is_refused(tmp_path, use_hub):
    """A shard that the index lists, the tokenizer, config.json, or all weights."""
    files, _ = hub_files(tmp_path / "tiny")
    sharded, _ = hub_files(tmp_path / "sharded", shards=True)
    del sharded[next(name for name in sharded if name.endswith(".safetensors"))]
    repos = {
        "org/no-shard": sharded,
        "org/no-tokenizer": {name: files[name] for name in files if name != "vocab.txt"},
        "org/no-config": {name: files[name] for name in files if name != "config.json"},
        "org/no-weights": {name: files[name] for name in files if ".safetensors" not in name},
    }
    with hub(repos) as server:
        use_hub(server.endpoint)
        for name in repos:
            refused(lambda name=name: resolve_model(name), f"--model {name}", "lacks")


def test_a_tokenizer_alone_downloads_no_weights_and_loads_again_without_network(tmp_path, use_hub):
    files, _ = hub_files(tmp_path / "tiny")
    with hub({"org/tiny": files}) as server:
        use_hub(server.endpoint)
        assert BertTokenizer.from_pretrained("org/tiny")("ab")["input_ids"] == [2, 5, 7, 3]
        assert names(resolve_model("org/tiny", weights=False)) == ["config.json", "vocab.txt"]
    assert not any("safetensors" in path for path in downloads(server))
    BertTokenizer.from_pretrained("org/tiny")  # the server is gone
    refused(lambda: BertModel.from_pretrained("org/tiny"), "--model org/tiny", "cannot be reached")


TRICKS = ["..", "../evil", "../../../evil", "org/..", "org/../..", "org/../../evil", "/evil/evil"]
TRICKS += ["./org/../evil", "~/evil", "org\\..\\evil", "%2e%2e/evil", "org/%2e%2e%2fevil"]
TRICKS += ["org/a\0b", "file:///etc/passwd", "org/evil?x=/../y", "org/evil#", "", ".", "org/", "/"]


def test_hub_ids_with_path_tricks_leave_no_trace(tmp_path, use_hub, monkeypatch):
    """Neither asked of the hub nor written anywhere, in the cache or out of it."""
    files, _ = hub_files(tmp_path / "tiny")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with hub(dict.fromkeys(TRICKS, files)) as server:
        use_hub(server.endpoint)
        before = sorted(tmp_path.rglob("*"))
        for name in TRICKS:
            refused(lambda name=name: BertModel.from_pretrained(name))
        assert sorted(tmp_path.rglob("*")) == before
        assert not downloads(server)


# ---------------------------------------------------------------------------- shards

TENSORS = {"a": torch.arange(600.0), "b": torch.ones(3, 4)}
OUTSIDE = ["../x.bin", "a/x.bin", "/etc/passwd", "..", ".", "", "a\\x.bin", "..\\x.bin", ".hidden"]


@pytest.mark.parametrize("name", [*OUTSIDE, "ABSOLUTE"])
def test_a_shard_outside_the_folder_is_not_read(tmp_path, name):
    """Even where the file exists and is good."""
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    torch.save(TENSORS, tmp_path / "x.bin")
    for place in (folder / "a" / "x.bin", folder / ".hidden"):
        shutil.copy(tmp_path / "x.bin", place)
    name = str(tmp_path / "x.bin") if name == "ABSOLUTE" else name
    index = folder / "pytorch_model.bin.index.json"
    write_json(index, {"weight_map": dict.fromkeys(TENSORS, name)})
    for read in (lambda: shard_names(index), lambda: read_weights(folder)):
        refused(read, index, repr(name))


@pytest.mark.parametrize("trick", ["../../../../evil.bin", "/tmp/evil.bin", "a/../../evil.bin"])
def test_a_hub_cannot_make_us_write_outside_the_cache(tmp_path, use_hub, trick):
    """Neither by an index nor by its list of files."""
    files, _ = hub_files(tmp_path / "tiny")
    del files["model.safetensors"]
    index = json.dumps({"weight_map": {"pooler.dense.bias": trick}}).encode()
    files["pytorch_model.bin.index.json"] = index
    listed = {f"pytorch_model-{trick}": b"evil", f"1_Pooling/{trick}": b"evil"}
    with hub({"org/a": {**files, trick: b"evil"}, "org/b": {**files, **listed}}) as server:
        use_hub(server.endpoint)
        refused(lambda: BertModel.from_pretrained("org/a"), "index.json", trick)
        assert not any("evil.bin" in name for name in downloads(server))
        refused(lambda: BertModel.from_pretrained("org/b"))
    evil = set(tmp_path.rglob("*evil.bin"))
    assert evil <= set((tmp_path / "cache").rglob("*"))
    assert not Path("/tmp/evil.bin").exists()


def test_shards_and_their_index_must_agree(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for content in ({}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}):
        write_json(index, content)
        refused(lambda: read_weights(tmp_path), index, "index of weight files")
    write_json(index, {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})
    save_file({"a": TENSORS["a"]}, tmp_path / "1.safetensors")
    refused(lambda: read_weights(tmp_path), tmp_path / "2.safetensors", "no such file")
    save_file({"c": TENSORS["b"]}, tmp_path / "2.safetensors")
    refused(lambda: read_weights(tmp_path), index, "lists b")
    save_file(TENSORS, tmp_path / "2.safetensors")
    refused(lambda: read_weights(tmp_path), tmp_path / "2.safetensors", "a is in another shard")
    save_file({"b": TENSORS["b"]}, tmp_path / "2.safetensors")
    tensors, source = read_weights(tmp_path)
    assert source == index
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_safetensors_are_preferred_over_pickles(tmp_path):
    refused(lambda: read_weights(tmp_path), tmp_path, "no weights", "model.safetensors")
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    tensors, source = read_weights(tmp_path)
    assert source == tmp_path / "model.safetensors"
    assert torch.equal(tensors["a"], TENSORS["a"])


# ---------------------------------------------------------------------------- weights


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A trained model to be broken."""
    return save_small_model(tiny, tmp_path / "model")


WEIGHT = "encoder.layer.0.output.dense.weight"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin", "shards", "heads"])
def test_weights_that_are_not_finite_in_float32_are_named(folder, value, kind):
    file, weight = folder / "model.safetensors", WEIGHT
    if kind == "heads":
        file, weight = folder / "heads.safetensors", "sts.dense.weight"
    changed = load_file(file)[weight].double()
    changed[0, 3] = value
    edit_tensors(file, **{weight: changed})
    source = {"pytorch_model.bin": save_as_pickle, "shards": save_as_shards}.get(kind)
    refused(lambda: use_model(folder), source(folder) if source else file, weight, "NaN or infin")


@pytest.mark.parametrize("name", ["model", "heads"])
def test_weights_that_are_no_floating_point_numbers_are_named(folder, name):
    file = folder / f"{name}.safetensors"
    weight = {"model": WEIGHT, "heads": "sst.dense.bias"}[name]
    original = load_file(file)[weight]
    for dtype in (torch.int64, torch.bool, torch.complex64):
        edit_tensors(file, **{weight: original.to(dtype)})
        refused(lambda: use_model(folder), file, weight, dtype)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):  # which load, as float32
        edit_tensors(file, **{weight: original.to(dtype)})
        use_model(folder)

"""Models by folder, run folder, package or hub id, their weights, and hubs that fail."""

import hashlib
import http.server
import json
import math
import re
import shutil
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from model_files import (
    SIZES,
    edit_tensors,
    names,
    refused,
    save_as_pickle,
    save_as_shards,
    save_small_model,
    use_model,
)
from safetensors.torch import load_file, save, save_file

from bert import BertModel, hub_name
from engine.checkpoint import write_json
from engine.hub import BUNDLED, read_weights, resolve_model, shard_names
from tokenizer import BertTokenizer

# ---------------------------------------------------------------------------- names


def test_a_folder_stands_for_itself_and_a_run_folder_for_its_best_model(tiny, tmp_path):
    model, run = shutil.copytree(tiny, tmp_path / "model"), tmp_path / "run"
    (model / "best").mkdir()
    assert resolve_model(model) == resolve_model(str(model)) == model  # whatever is beside it
    refused(lambda: resolve_model(tiny / "config.json"), tiny / "config.json", "give the folder")
    shutil.copytree(tiny, run / "best")
    (run / "log.jsonl").touch()
    assert resolve_model(run) == run / "best"
    BertModel.from_pretrained(run)
    shutil.rmtree(run / "best")
    refused(lambda: resolve_model(run), run, "without best/")


def test_the_embedded_model_is_found_without_importing_its_package(monkeypatch):
    for name, (package, _) in BUNDLED.items():
        assert {"config.json", "model.safetensors", "vocab.txt"} <= set(names(resolve_model(name)))
        assert package not in sys.modules
    monkeypatch.setitem(BUNDLED, "ghost", ("no_such_package_of_ours", "model"))
    refused(lambda: resolve_model("ghost"), "--model ghost", "no_such_package_of_ours", "setup.sh")


IMPOSSIBLE = {
    "no such folder": ["./no/such/folder", "../x", "~/models", "/no/such", "runs/typo"],
    "valid hub id": ["a b", "a/b/c/d", "--x--", "C:\\models", "n" * 300],
}


def test_a_name_that_cannot_exist_is_refused_without_network(use_hub):
    with use_hub({}) as server:
        for reason, impossible in IMPOSSIBLE.items():
            for name in impossible:
                refused(lambda name=name: resolve_model(name), "--model", reason)
    assert server.requests == []


# ---------------------------------------------------------------------------- a hub of our own

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.BaseHTTPRequestHandler):
    """Just enough of the hub: what a repository contains, and `/{id}/resolve/main/{file}`."""

    def reply(self):
        """The answer, or 404 with the hub's own word for what does not exist."""
        self.server.requests.append((self.command, self.path))
        listing = re.match(r"/api/models/([^?]*?)(/tree/\w+|/revision/\w+|)(\?|$)", self.path)
        download = re.match(r"/(.*)/resolve/\w+/(.*)", self.path)
        found = listing or download
        repo, name = found.group(1, 2) if found else ("", "")
        files = self.server.repos.get(repo)
        if files is None or not (listing or name in files):
            error = "RepoNotFound" if files is None else "EntryNotFound"
            return self.send(404, b"", {"X-Error-Code": error})
        if download:
            data = files[name]
        elif name.startswith("/tree"):
            entries = [{"type": "file", "path": name, "oid": "0", "size": 1} for name in files]
            data = json.dumps(entries).encode()
        else:
            siblings = [{"rfilename": name} for name in files]
            data = json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        self.send(200, data, headers, half=name in self.server.breaks_off)

    def send(self, code, data, headers, half=False):
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 3] if half else data)

    do_GET = do_HEAD = reply

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def use_hub(tmp_path, monkeypatch):
    """`use_hub(repos)`: a hub with these repositories (id -> file name -> bytes), its cache empty.

    Transfers of the files named in `breaks_off` end half-way.
    """

    @contextmanager
    def use(repos, breaks_off=()):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.repos, server.breaks_off, server.requests = repos, breaks_off, []
        endpoint = f"http://127.0.0.1:{server.server_port}"
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        values = {"ENDPOINT": endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template}
        values |= {"HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "cache")}
        for name, value in values.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
            server.server_close()

    return use


def downloads(server):
    """The names of all files that were downloaded, or would have been had they existed."""
    gets = [path for command, path in server.requests if command == "GET" and "/resolve/" in path]
    return {path.rpartition("/resolve/")[2].partition("/")[2] for path in gets}


# What real repositories contain as well, and nobody asks for.
UNWANTED = ["README.md", "tf_model.h5", "modeling_evil.py", "onnx/model.onnx", ".gitattributes"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##b", "c", ".", "!"]


def hub_files(folder, shards=False):
    """A small BERT as transformers writes it, file name -> bytes; and its weights."""
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(VOCABULARY), **SIZES)
    model = transformers.BertModel(config)
    model.save_pretrained(folder, max_shard_size="1KB" if shards else "1GB")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {**files, **dict.fromkeys(UNWANTED, b"unwanted")}, model.state_dict()


@pytest.fixture
def files(tmp_path):
    return hub_files(tmp_path / "tiny")[0]


def without(files, part):
    return {name: content for name, content in files.items() if part not in name}


def test_hub_models_are_downloaded_once_and_then_load_offline(
    tmp_path, files, use_hub, monkeypatch
):
    """A pooler that sentence-transformers has trained is a module of its own."""
    sharded, weights = hub_files(tmp_path / "sharded", shards=True)
    assert sum(name.endswith(".safetensors") for name in sharded) > 1
    pooler = {"linear.weight": torch.eye(8), "linear.bias": torch.ones(8)}
    dense = {"in_features": 8, "out_features": 8, "bias": True}
    dense["activation_function"] = "torch.nn.modules.activation.Tanh"
    trained = {
        "modules.json": b"[]",
        "1_Pooling/config.json": b'{"pooling_mode_cls_token": true}',
        "2_Dense/config.json": json.dumps(dense).encode(),
        "2_Dense/model.safetensors": save(pooler),
    }
    repos = {"org/tiny": {**files, "pytorch_model.bin": b"unwanted"}, "org/sharded": sharded}
    repos |= {"org/trained": {**files, **trained}, "org/broken": {**files, "config.json": b"{"}}

    def load_all():
        for name in ("org/tiny", "org/sharded", "org/trained"):
            ids = BertTokenizer.from_pretrained(name)("ab c!")["input_ids"]
            assert ids == [2, 5, 7, 8, 10, 3]
            state = BertModel.from_pretrained(name).named_parameters()
            found = {hub_name(name): parameter.detach() for name, parameter in state}
            expected = dict(weights)
            if name == "org/trained":
                expected |= {f"pooler.dense.{n.split('.')[1]}": pooler[n] for n in pooler}
            torch.testing.assert_close(found, expected, rtol=0, atol=0)

    with use_hub(repos) as server:
        load_all()
        requests = len(server.requests)
        load_all()
        assert len(server.requests) == requests
        refused(lambda: resolve_model("org/absent"), "--model org/absent", "the hub has no such")
        refused(lambda: BertModel.from_pretrained("org/broken"), "config.json: damaged")
    assert "model.safetensors" in downloads(server)
    assert not downloads(server) & {*UNWANTED, "pytorch_model.bin"}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    load_all()
    for name in ("org/absent", "no-such-model"):
        expected = (f"--model {name}", "offline mode", "all-MiniLM-L6-v2")
        refused(lambda name=name: resolve_model(name), *expected)


def test_a_download_that_keeps_breaking_off_is_refused(files, use_hub, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the library waits between tries
    with use_hub({"org/tiny": files}, breaks_off=["model.safetensors"]) as server:
        refused(lambda: resolve_model("org/tiny"), "--model org/tiny")
    assert "model.safetensors" in downloads(server)


def test_an_unreachable_hub_is_refused_with_the_model_that_needs_none(use_hub):
    with use_hub({}) as server:
        for load in (BertModel.from_pretrained, BertTokenizer.from_pretrained):
            refused(lambda load=load: load("org/tiny", local_files_only=True), "not in the cache")
    assert server.requests == []
    refused(lambda: resolve_model("org/tiny"), "--model org/tiny", "all-MiniLM-L6-v2")


def test_an_incomplete_hub_model_is_refused(tmp_path, files, use_hub):
    """A shard that the index lists, the tokenizer, config.json, or all weights."""
    sharded, _ = hub_files(tmp_path / "sharded", shards=True)
    repos = {"org/no-shard": without(sharded, "00001-of")}
    for part in ("vocab.txt", "config.json", ".safetensors"):
        repos[f"org/no-{part.lstrip('.')}"] = without(files, part)
    with use_hub(repos):
        for name in repos:
            refused(lambda name=name: resolve_model(name), f"--model {name}", "lacks")


def test_a_tokenizer_alone_downloads_no_weights_and_loads_again_without_network(files, use_hub):
    with use_hub({"org/tiny": files}) as server:
        assert BertTokenizer.from_pretrained("org/tiny")("ab")["input_ids"] == [2, 5, 7, 3]
        assert names(resolve_model("org/tiny", weights=False)) == ["config.json", "vocab.txt"]
    assert not any("safetensors" in path for path in downloads(server))
    BertTokenizer.from_pretrained("org/tiny")  # the server is gone
    refused(lambda: BertModel.from_pretrained("org/tiny"), "--model org/tiny", "cannot be reached")


TRICKS = ["..", "../evil", "../../../evil", "org/..", "org/../..", "org/../../evil", "/evil/evil"]
TRICKS += ["./org/../evil", "~/evil", "org\\..\\evil", "%2e%2e/evil", "org/%2e%2e%2fevil"]
TRICKS += ["org/a\0b", "file:///etc/passwd", "org/evil?x=/../y", "org/evil#", "", ".", "org/", "/"]


def test_hub_ids_with_path_tricks_leave_no_trace(tmp_path, files, use_hub, monkeypatch):
    """Neither downloaded from the hub nor written anywhere, in the cache or out of it."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with use_hub(dict.fromkeys(TRICKS, files)) as server:
        before = sorted(tmp_path.rglob("*"))
        for name in TRICKS:
            refused(lambda name=name: BertModel.from_pretrained(name))
        assert sorted(tmp_path.rglob("*")) == before
        assert not downloads(server)


# ---------------------------------------------------------------------------- shards

TENSORS = {"a": torch.arange(600.0), "b": torch.ones(3, 4)}
OUTSIDE = ["../x.bin", "a/x.bin", "/etc/passwd", "..", ".", "", "a\\x.bin", "..\\x.bin", ".hidden"]


def test_a_shard_outside_the_folder_is_not_read(tmp_path):
    """Even where the file exists and is good."""
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    torch.save(TENSORS, tmp_path / "x.bin")
    for place in ("a/x.bin", ".hidden"):
        shutil.copy(tmp_path / "x.bin", folder / place)
    index = folder / "pytorch_model.bin.index.json"
    for name in (*OUTSIDE, str(tmp_path / "x.bin")):
        write_json(index, {"weight_map": dict.fromkeys(TENSORS, name)})
        for read in (lambda: shard_names(index), lambda: read_weights(folder)):
            refused(read, index, repr(name))


@pytest.mark.parametrize("trick", ["../../../../evil.bin", "/tmp/evil.bin", "a/../../evil.bin"])
def test_a_hub_cannot_make_us_write_outside_the_cache(tmp_path, files, use_hub, trick):
    """Neither by an index nor by its list of files."""
    files = without(files, "model.safetensors")
    index = json.dumps({"weight_map": {"pooler.dense.bias": trick}}).encode()
    files["pytorch_model.bin.index.json"] = index
    listed = {f"pytorch_model-{trick}": b"evil", f"1_Pooling/{trick}": b"evil"}
    with use_hub({"org/a": {**files, trick: b"evil"}, "org/b": {**files, **listed}}) as server:
        refused(lambda: BertModel.from_pretrained("org/a"), "index.json", trick)
        assert not any("evil.bin" in name for name in downloads(server))
        refused(lambda: BertModel.from_pretrained("org/b"))
    assert set(tmp_path.rglob("*evil.bin")) <= set((tmp_path / "cache").rglob("*"))
    assert not Path("/tmp/evil.bin").exists()


def test_shards_and_their_index_must_agree(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    one, two = (tmp_path / f"{number}.safetensors" for number in (1, 2))
    for content in ({}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}):
        write_json(index, content)
        refused(lambda: read_weights(tmp_path), index, "index of weight files")
    write_json(index, {"weight_map": {"a": one.name, "b": two.name}})
    save_file({"a": TENSORS["a"]}, one)
    refused(lambda: read_weights(tmp_path), two, "no such file")
    save_file({"c": TENSORS["b"]}, two)
    refused(lambda: read_weights(tmp_path), index, "lists b")
    save_file(TENSORS, two)
    refused(lambda: read_weights(tmp_path), two, "a is in another shard")
    save_file({"b": TENSORS["b"]}, two)
    tensors, source = read_weights(tmp_path)
    assert source == index
    torch.testing.assert_close(tensors, TENSORS, rtol=0, atol=0)


def test_safetensors_are_preferred_over_pickles(tmp_path):
    refused(lambda: read_weights(tmp_path), tmp_path, "no weights", "model.safetensors")
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    assert read_weights(tmp_path)[1] == tmp_path / "model.safetensors"


# ---------------------------------------------------------------------------- weights


@pytest.mark.parametrize("kind", ["model", "pickle", "shards", "heads"])
def test_weights_that_are_not_finite_floating_point_numbers_are_named(tiny, tmp_path, kind):
    """1e300 is infinite in float32; other floating-point types load."""
    name, weight = "model.safetensors", "encoder.layer.0.output.dense.weight"
    if kind == "heads":
        name, weight = "heads.safetensors", "sts.dense.weight"
    good = load_file(save_small_model(tiny, tmp_path / "good") / name)[weight]
    dtypes = (torch.int64, torch.bool, torch.complex64)
    changes = [(good.to(dtype), dtype) for dtype in dtypes]
    for value in (math.nan, -math.inf, 1e300):
        changes.append((good.double(), "NaN or infin"))
        changes[-1][0][0, 3] = value
    for number, (changed, expected) in enumerate(changes):
        folder = save_small_model(tiny, tmp_path / str(number))
        edit_tensors(folder / name, **{weight: changed})
        source = {"pickle": save_as_pickle, "shards": save_as_shards}.get(kind)
        file = source(folder) if source else folder / name
        refused(lambda folder=folder: use_model(folder), file, weight, expected)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        edit_tensors(tmp_path / "good" / name, **{weight: good.to(dtype)})
        use_model(tmp_path / "good")

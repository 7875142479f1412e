"""Models by folder, run folder, package or hub id, their weights, and hubs that fail."""

import hashlib
import http.server
import io
import json
import math
import re
import shutil
import sys
import threading
import time
from contextlib import contextmanager

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
    save_small_model,
    use_model,
)
from safetensors.torch import load, load_file, save, save_file

from bert import BertModel, hub_name
from hub.models import BUNDLED, read_weights, resolve_model
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


def test_a_name_that_cannot_exist_is_refused_without_network(use_hub):
    with use_hub({}) as server:
        for name in ("./no/such/folder", "../no/such/folder", "~/models", "/no/such", "runs/typo"):
            refused(lambda name=name: resolve_model(name), "--model", "no such folder")
        for name in ("a b", "a/b/c/d", "--x--", "C:\\models", "n" * 300):
            refused(lambda name=name: resolve_model(name), "--model", "valid hub id")
    assert server.requests == []


# ---------------------------------------------------------------------------- a hub of our own

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.BaseHTTPRequestHandler):
    """Just enough of the hub: `/{id}/resolve/main/{file}`."""

    def reply(self):
        """The file, or 404 with the hub's own word for what does not exist."""
        self.server.requests.append((self.command, self.path))
        request = re.match(r"/(.*)/resolve/\w+/(.*)", self.path)
        repo, name = request.group(1, 2) if request else ("", "")
        files, data = self.server.repos.get(repo), b""
        headers = {"X-Error-Code": "RepoNotFound"} if files is None else {"X-Repo-Commit": COMMIT}
        if files is not None and name not in files:
            headers["X-Error-Code"] = "EntryNotFound"
        elif files is not None:
            data = files[name]
        self.send_response(404 if "X-Error-Code" in headers else 200)
        headers |= {"ETag": hashlib.sha256(data).hexdigest(), "Content-Length": len(data)}
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 3] if name in self.server.breaks_off else data)

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
VOCABULARY = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n##b\nc\n.\n!\n"


@pytest.fixture
def files(tmp_path):
    """A small BERT as transformers writes it, file name -> bytes."""
    folder, config = tmp_path / "tiny", transformers.BertConfig(vocab_size=11, **SIZES)
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text(VOCABULARY, encoding="utf-8")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {**files, **dict.fromkeys(UNWANTED, b"unwanted")}


def modules_json(*kinds):
    """As sentence-transformers writes it for a model of these modules."""
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense"}
    modules = [
        {"path": paths[kind], "type": f"sentence_transformers.models.{kind}"} for kind in kinds
    ]
    return json.dumps(modules).encode()


def test_hub_models_are_downloaded_once_and_then_load_offline(files, use_hub, monkeypatch):
    """A pooler that sentence-transformers has trained is a module of its own."""
    pooler = {"linear.weight": torch.eye(8), "linear.bias": torch.ones(8)}
    dense = {"in_features": 8, "out_features": 8, "bias": True}
    dense["activation_function"] = "torch.nn.modules.activation.Tanh"
    trained = {
        "modules.json": modules_json("Transformer", "Pooling", "Dense"),
        "1_Pooling/config.json": b'{"pooling_mode_cls_token": true}',
        "2_Dense/config.json": json.dumps(dense).encode(),
        "2_Dense/model.safetensors": save(pooler),
    }
    pickle = io.BytesIO()  # as sentence-transformers wrote it before version 2.3
    torch.save(pooler, pickle)
    older = {name: trained[name] for name in trained if "safetensors" not in name}
    older["2_Dense/pytorch_model.bin"] = pickle.getvalue()
    left_over = {**trained, "modules.json": modules_json("Transformer", "Pooling")}
    repos = {"org/tiny": {**files, "pytorch_model.bin": b"unwanted"}}
    repos |= {"org/trained": {**files, **trained}, "org/older": {**files, **older}}
    repos |= {"org/left-over": {**files, **left_over}}
    repos |= {"org/broken": {**files, "config.json": b"{"}}
    expected = {"org/tiny": load(files["model.safetensors"])}
    changed = {f"pooler.{name.replace('linear', 'dense')}": pooler[name] for name in pooler}
    expected["org/trained"] = expected["org/older"] = {**expected["org/tiny"], **changed}
    expected["org/left-over"] = expected["org/tiny"]  # modules.json decides, not the folders

    def load_all():
        for name, weights in expected.items():
            ids = BertTokenizer.from_pretrained(name)("ab c!")["input_ids"]
            assert ids == [2, 5, 7, 8, 10, 3]
            parameters = BertModel.from_pretrained(name).named_parameters()
            loaded = {hub_name(name): parameter.detach() for name, parameter in parameters}
            torch.testing.assert_close(loaded, weights, rtol=0, atol=0)

    with use_hub(repos) as server:
        load_all()
        requests = len(server.requests)
        load_all()
        assert len(server.requests) == requests
        refused(lambda: resolve_model("org/absent"), "--model org/absent", "no such public model")
        refused(lambda: BertModel.from_pretrained("org/broken"), "config.json: damaged")
    assert "model.safetensors" in downloads(server)
    assert not downloads(server) & {*UNWANTED, "pytorch_model.bin"}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    load_all()
    refused(lambda: resolve_model("absent"), "--model absent", "offline mode", "all-MiniLM-L6-v2")


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


def test_an_incomplete_hub_model_is_refused(files, use_hub):
    lacking = ("vocab.txt", "config.json", "model.safetensors")
    repos = {f"org/{name}": {n: files[n] for n in files if n != name} for name in lacking}
    with use_hub(repos):
        for name in repos:
            refused(lambda name=name: resolve_model(name), f"--model {name}", "lacks")


def test_a_tokenizer_alone_downloads_no_weights_and_loads_again_without_network(files, use_hub):
    with use_hub({"org/tiny": files}) as server:
        assert BertTokenizer.from_pretrained("org/tiny")("ab")["input_ids"] == [2, 5, 7, 3]
        assert names(resolve_model("org/tiny", weights=False)) == ["config.json", "vocab.txt"]
    assert not any("safetensors" in path for path in downloads(server))
    BertTokenizer.from_pretrained("org/tiny")  # the server is gone
    refused(lambda: BertModel.from_pretrained("org/tiny"), "--model org/tiny", "not from the hub")


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


def test_a_hub_cannot_make_us_write_outside_the_cache(tmp_path, files, use_hub):
    folder = "../" * 5 + "evil"
    module = {"type": "Dense", "path": folder}
    evil = {"modules.json": json.dumps([module]).encode(), f"{folder}/config.json": b"evil"}
    with use_hub({"org/evil": {**files, **evil}}):
        refused(lambda: BertModel.from_pretrained("org/evil"), "--model org/evil")
    assert not list(tmp_path.rglob("evil"))


def test_a_cache_that_other_software_filled_is_completed(files, use_hub, capsys):
    module = {**files, "sentence_bert_config.json": b'{"max_seq_length": 7}'}
    with use_hub({"org/tiny": module}) as server:
        for name in ("config.json", "vocab.txt", "model.safetensors"):
            huggingface_hub.hf_hub_download("org/tiny", name)
        offline = BertTokenizer.from_pretrained("org/tiny", local_files_only=True)
        assert "cached by other software" in capsys.readouterr().err
        assert offline.max_length > 7
        assert BertTokenizer.from_pretrained("org/tiny").max_length == 7
        requests = len(server.requests)
        assert BertTokenizer.from_pretrained("org/tiny").max_length == 7
        assert len(server.requests) == requests  # what the hub lacks is remembered too


# ---------------------------------------------------------------------------- weights


def test_safetensors_are_preferred_over_pickles(tmp_path):
    refused(lambda: read_weights(tmp_path), tmp_path, "no weights", "model.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    assert read_weights(tmp_path)[1] == tmp_path / "model.safetensors"


@pytest.mark.parametrize("kind", ["model", "pickle", "heads"])
def test_weights_that_are_not_finite_floating_point_numbers_are_named(tiny, tmp_path, kind):
    """1e300 is infinite in float32; other floating-point types load."""
    name, weight = "model.safetensors", "encoder.layer.0.output.dense.weight"
    if kind == "heads":
        name, weight = "heads.safetensors", "sts.dense.weight"
    good = load_file(save_small_model(tiny, tmp_path / "good") / name)[weight]
    changes = [(good.to(dtype), dtype) for dtype in (torch.int64, torch.bool, torch.complex64)]
    for value in (math.nan, -math.inf, 1e300):
        changes.append((good.double(), "NaN or infin"))
        changes[-1][0][0, 3] = value
    for number, (changed, expected) in enumerate(changes):
        folder = save_small_model(tiny, tmp_path / str(number))
        edit_tensors(folder / name, **{weight: changed})
        file = save_as_pickle(folder) if kind == "pickle" else folder / name
        refused(lambda folder=folder: use_model(folder), file, weight, expected)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        edit_tensors(tmp_path / "good" / name, **{weight: good.to(dtype)})
        use_model(tmp_path / "good")

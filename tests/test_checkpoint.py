"""Files: whole or not at all, nothing executes, every refusal one line; the hub; run folders."""

import hashlib
import http.server
import json
import os
import pickle
import shlex
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from bert import BertConfig, BertModel
from checkpoint import (
    EMBEDDED,
    Run,
    UserError,
    model_folder,
    read_json,
    read_tensors,
    read_weights,
    shard_names,
    whole_file,
    whole_folder,
    write_json,
    write_tensors,
    write_text,
)

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 9,
}


def names(folder):
    """Every file and folder directly inside, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


def one_line(caught, *parts):
    """The error is one line that holds every part; the message."""
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


# ------------------------------------------------------------------ whole files and folders


class Interrupted(BaseException):
    """Stands for Ctrl-C: not an Exception."""


def test_whole_file_appears_at_the_end(tmp_path):
    """While the block runs the old content is there; after it, the new and nothing else."""
    file = tmp_path / "deep" / "er" / "notes.txt"
    with whole_file(file) as draft:
        draft.write_text("first", encoding="utf-8")
        assert not file.exists()
    with whole_file(file) as draft:
        draft.write_text("second", encoding="utf-8")
        assert file.read_text(encoding="utf-8") == "first"
    assert file.read_text(encoding="utf-8") == "second"
    assert names(file.parent) == ["notes.txt"]


@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
@pytest.mark.parametrize("old", ["old", None])
def test_whole_file_keeps_the_old_content_when_the_block_raises(tmp_path, error, old):
    """And leaves no stray file, whether or not there was one before."""
    file = tmp_path / "notes.txt"
    if old is not None:
        file.write_text(old, encoding="utf-8")
    with pytest.raises(error), whole_file(file) as draft:
        draft.write_text("half of the n", encoding="utf-8")
        raise error
    if old is None:
        assert names(tmp_path) == []
    else:
        assert names(tmp_path) == ["notes.txt"]
        assert file.read_text(encoding="utf-8") == old


def test_whole_folder_replaces_the_old_one(tmp_path):
    """Files of the old folder don't survive in the new."""
    folder = tmp_path / "deep" / "best"
    for number in (1, 2):
        with whole_folder(folder) as draft:
            (draft / f"{number}.txt").write_text("x", encoding="utf-8")
            assert folder.exists() == (number == 2)
        assert names(folder) == [f"{number}.txt"]
    assert names(folder.parent) == ["best"]


@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
@pytest.mark.parametrize("old", [True, False])
def test_whole_folder_keeps_the_old_one_when_the_block_raises(tmp_path, error, old):
    """And leaves no stray folder."""
    folder = tmp_path / "best"
    if old:
        folder.mkdir()
        (folder / "old.txt").write_text("old", encoding="utf-8")
    with pytest.raises(error), whole_folder(folder) as draft:
        (draft / "new.txt").write_text("new", encoding="utf-8")
        raise error
    assert names(tmp_path) == (["best"] if old else [])
    if old:
        assert names(folder) == ["old.txt"]


def test_whole_folder_survives_a_failed_rename(tmp_path, monkeypatch):
    """The old folder comes back when the new one cannot take its place."""
    folder = tmp_path / "best"
    folder.mkdir()
    (folder / "old.txt").write_text("old", encoding="utf-8")
    rename, calls = os.replace, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no space left")
        rename(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="no space"), whole_folder(folder) as draft:
        (draft / "new.txt").write_text("new", encoding="utf-8")
    assert names(tmp_path) == ["best"]
    assert names(folder) == ["old.txt"]


@settings(deadline=None, max_examples=10, derandomize=True)
@given(st.dictionaries(st.text(), st.one_of(st.integers(), st.text(), st.none()), max_size=4))
def test_json_comes_back_as_it_was(tmp_path_factory, value):
    """Any text; one newline at the end; UTF-8."""
    file = tmp_path_factory.getbasetemp() / "value.json"
    write_json(file, value)
    assert read_json(file) == value
    assert file.read_bytes().decode("utf-8").endswith("}\n")


def test_text_keeps_its_newlines(tmp_path):
    """Bytes as given, on every platform."""
    write_text(tmp_path / "text", "a\nb\r\né")
    assert (tmp_path / "text").read_bytes() == b"a\nb\r\n\xc3\xa9"


def test_write_tensors_gives_the_same_bytes_for_the_same_tensors(tmp_path):
    """Order of the dict, memory layout and requires_grad leave no trace; no stray file."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 3, generator=generator), torch.randn(4, generator=generator)
    write_tensors(tmp_path / "1", {"a": a, "b": b})
    other = torch.nn.Parameter(a.t().contiguous().t())
    assert not other.is_contiguous()
    write_tensors(tmp_path / "2", {"b": b.clone(), "a": other})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    loaded = load_file(tmp_path / "1")
    assert torch.equal(loaded["a"], a)
    assert torch.equal(loaded["b"], b)
    write_tensors(tmp_path / "2", {"a": a + 1, "b": b})
    assert (tmp_path / "1").read_bytes() != (tmp_path / "2").read_bytes()
    assert names(tmp_path) == ["1", "2"]


def test_write_tensors_keeps_dtypes(tmp_path):
    """Whole numbers and half precision as they are."""
    tensors = {
        str(dtype): torch.tensor([1, 2, 3], dtype=dtype)
        for dtype in (torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.bool)
    }
    write_tensors(tmp_path / "t.safetensors", tensors)
    loaded = read_tensors(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


# ------------------------------------------------------------------ reading tensors


TENSORS = {"a": torch.arange(600.0), "b": torch.ones(3, 4)}


def whole_bytes(folder, name):
    """The bytes of a good file of that kind."""
    file = folder / f"good-{name}"
    if name.endswith(".safetensors"):
        save_file(TENSORS, file)
    else:
        torch.save(TENSORS, file)
    return file.read_bytes()


DAMAGE = {
    "empty": lambda data: b"",
    "one byte": lambda data: data[:1],
    "truncated at a tenth": lambda data: data[: len(data) // 10],
    "truncated in the middle": lambda data: data[: len(data) // 2],
    "last byte missing": lambda data: data[:-1],
    "garbage": lambda data: bytes(range(256)) * 8,
    "text": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
    "web page": lambda data: b"<!doctype html>\n<html>\n<body>Not found</body>\n</html>\n",
}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weight_file_is_refused(tmp_path, name, damage):
    """Whatever happened to it: a UserError of one line with the file's name."""
    file = tmp_path / name
    data = whole_bytes(tmp_path, name)
    file.write_bytes(data)
    assert read_tensors(file).keys() == TENSORS.keys()
    file.write_bytes(DAMAGE[damage](data))
    with pytest.raises(UserError) as caught:
        read_tensors(file)
    one_line(caught, file)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.sampled_from(["model.safetensors", "pytorch_model.bin"]), st.floats(0, 1), st.binary())
def test_no_cut_or_tail_crashes_the_reader(tmp_path_factory, name, cut, tail):
    """Anything appended to any prefix either loads as named tensors or is a UserError."""
    folder = tmp_path_factory.getbasetemp()
    data = whole_bytes(folder, name)
    file = folder / name
    file.write_bytes(data[: int(cut * len(data))] + tail)
    try:
        loaded = read_tensors(file)
    except UserError as error:
        assert str(file) in str(error)
        assert "\n" not in str(error)
    else:
        assert all(isinstance(tensor, torch.Tensor) for tensor in loaded.values())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_absent_weight_file_is_refused(tmp_path, name):
    """An index may promise a shard that was never fetched."""
    with pytest.raises(UserError) as caught:
        read_tensors(tmp_path / name)
    one_line(caught, tmp_path / name, "missing")


@pytest.mark.parametrize("value", [[torch.ones(2)], {"a": 1}, {1: torch.ones(2)}, torch.ones(2)])
def test_bin_of_something_else_is_refused(tmp_path, value):
    """Harmless, but not named tensors."""
    file = tmp_path / "pytorch_model.bin"
    torch.save(value, file)
    with pytest.raises(UserError) as caught:
        read_tensors(file)
    one_line(caught, file, "named tensors")


class Trap:
    """Unpickled by a careless loader, it creates a file."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


def trapped(kind, trap):
    """The bytes of a `.bin` file that holds the trap, in each format that torch.load reads."""
    if kind == "plain pickle":
        return lambda file: file.write_bytes(pickle.dumps({"a": trap}, protocol=2))
    zipped = kind == "zip"
    content = {"a": torch.ones(2), "b": trap}
    return lambda file: torch.save(content, file, _use_new_zipfile_serialization=zipped)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain pickle"])
def test_malicious_pickle_does_not_execute(tmp_path, kind):
    """In pytorch_model.bin and in a shard; the trap itself is shown to work first."""
    target = tmp_path / "executed"
    plant = trapped(kind, Trap(target))
    proof = tmp_path / "proof.bin"
    plant(proof)
    if kind == "plain pickle":
        pickle.loads(proof.read_bytes())["a"].close()
    else:
        torch.load(proof, weights_only=False)["b"].close()
    assert target.exists()
    target.unlink()

    folder = tmp_path / "single"
    BertModel(BertConfig(**TINY)).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    plant(folder / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        BertModel.from_pretrained(folder)
    one_line(caught, folder / "pytorch_model.bin")
    assert not target.exists()

    (folder / "pytorch_model.bin").unlink()
    plant(folder / "shard-1.bin")
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": {"a": "shard-1.bin"}})
    with pytest.raises(UserError) as caught:
        BertModel.from_pretrained(folder)
    one_line(caught, folder / "shard-1.bin")
    assert not target.exists()


OUTSIDE = ["../x.bin", "a/x.bin", "/etc/passwd", "..", ".", "", "a\\x.bin", "..\\x.bin"]


@pytest.mark.parametrize("name", [*OUTSIDE, "ABSOLUTE"])
def test_shard_outside_the_folder_is_refused(tmp_path, name):
    """Even where the file is there and good."""
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    for place in (tmp_path / "x.bin", folder / "a" / "x.bin"):
        torch.save(TENSORS, place)
    name = str(tmp_path / "x.bin") if name == "ABSOLUTE" else name
    index = folder / "pytorch_model.bin.index.json"
    write_json(index, {"weight_map": dict.fromkeys(TENSORS, name)})
    for read in (lambda: shard_names(index), lambda: read_weights(folder)):
        with pytest.raises(UserError) as caught:
            read()
        one_line(caught, index, repr(name))


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_index_without_a_map_is_refused(tmp_path, content):
    """One line with the index's name."""
    index = tmp_path / "model.safetensors.index.json"
    write_json(index, content)
    with pytest.raises(UserError) as caught:
        read_weights(tmp_path)
    one_line(caught, index, "weight_map")


def test_index_that_promises_too_much_is_refused(tmp_path):
    """A tensor in the index and in no shard, by its name."""
    save_file(TENSORS, tmp_path / "s.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    write_json(index, {"weight_map": dict.fromkeys([*TENSORS, "gone"], "s.safetensors")})
    with pytest.raises(UserError) as caught:
        read_weights(tmp_path)
    one_line(caught, index, "gone")


def test_safetensors_is_preferred_over_pickle(tmp_path):
    """Where a folder holds both, the one that cannot hurt is read."""
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    tensors, source = read_weights(tmp_path)
    assert source == tmp_path / "model.safetensors"
    assert torch.equal(tensors["a"], TENSORS["a"])


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "missing"),
        (b"", "not valid JSON"),
        (b'{"a": 1,\n "b":\n}', "not valid JSON"),
        (b'{"a": "\xff"}', "not a text file in UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "a JSON list"),
        (b'"text"', "a JSON str"),
        (b"null", "a JSON NoneType"),
    ],
)
def test_read_json_refuses_what_is_no_object(tmp_path, content, part):
    """Missing, damaged, or another type: one line with the file's name."""
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(file)
    one_line(caught, file, part)


def test_read_json_of_a_folder_is_refused(tmp_path):
    """A folder in a file's place."""
    with pytest.raises(UserError) as caught:
        read_json(tmp_path)
    one_line(caught, tmp_path)


# ------------------------------------------------------------------ model folders and the hub


def test_folder_and_embedded_model_are_found(tmp_path):
    """A folder is itself; the embedded model is a folder with a model in it."""
    assert model_folder(tmp_path) == tmp_path
    assert model_folder(str(tmp_path)) == tmp_path
    for name in EMBEDDED:
        assert {"config.json", "model.safetensors", "vocab.txt"} <= set(names(model_folder(name)))


def test_embedded_model_whose_package_is_missing(monkeypatch):
    """The message names the package and how to get it."""
    monkeypatch.setitem(EMBEDDED, "ghost", ("no_such_package_of_ours", "model"))
    with pytest.raises(UserError) as caught:
        model_folder("ghost")
    one_line(caught, "ghost", "no_such_package_of_ours", "setup.sh")


def test_a_file_is_no_model_folder(tmp_path):
    """Pointing at config.json itself is a common slip."""
    file = tmp_path / "config.json"
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        model_folder(file)
    one_line(caught, file, "folder")


@pytest.mark.parametrize(
    "name", ["a b", "a/b/c/d", "--x--", "./no/such/folder", "C:\\models", "n" * 300]
)
def test_impossible_name_is_refused(name):
    """Neither a folder nor anything that a hub could hold; no network is asked."""
    with pytest.raises(UserError) as caught:
        model_folder(name, local_files_only=True)
    one_line(caught, "--model")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """Just enough of the hub: HEAD and GET of `/{org}/{repo}/resolve/main/{file}`."""

    protocol_version = "HTTP/1.1"

    def reply(self, body):
        """The file, or 404 with the hub's own word for what is absent."""
        self.server.asked.append((self.command, self.path))
        repo, _, name = self.path.lstrip("/").partition("/resolve/main/")
        files = self.server.repos.get(repo)
        if files is None or name not in files:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if files is None else "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = files[name]
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body and repo in self.server.cut and name == "model.safetensors":
            self.wfile.write(data[: len(data) // 3])
            self.close_connection = True
        elif body:
            self.wfile.write(data)

    def do_HEAD(self):
        self.reply(body=False)

    def do_GET(self):
        self.reply(body=True)

    def log_message(self, *arguments):
        """Quiet."""


@contextmanager
def hub(repos, cut=()):
    """A hub with `repos` (id -> files); of those in `cut`, the weights break off half-way."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.cut, server.asked = repos, cut, []
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def saved_files(folder, shards=False):
    """A tiny BERT as transformers writes it, file name -> bytes, and its weights."""
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**TINY))
    model.save_pretrained(folder, max_shard_size="1KB" if shards else "1GB")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##b", "c", ".", "!"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return {path.name: path.read_bytes() for path in folder.iterdir()}, model.state_dict()


CHILD = """
import sys
from bert import BertModel
from checkpoint import UserError, write_tensors
from pathlib import Path
from tokenizer import BertTokenizer
for name in sys.argv[2:]:
    try:
        tokenizer = BertTokenizer.from_pretrained(name)
        model = BertModel.from_pretrained(name)
    except UserError as error:
        print(name, "UserError", error)
    else:
        write_tensors(Path(sys.argv[1]) / (name.replace("/", "-") + ".out"), model.state_dict())
        print(name, "loaded", tokenizer("ab c!")["input_ids"])
"""


def load_in_a_process(tmp_path, *ids, **environment):
    """Load each id by our own code in a fresh process; what it said of each, in order."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), *ids],
        cwd=ROOT,
        env={
            **inherited,
            "PYTHONIOENCODING": "utf-8",
            "NO_PROXY": "127.0.0.1",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **environment,
        },
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert [line.split()[0] for line in said] == list(ids)
    return said


def test_hub_ids_load_are_cached_and_work_offline(tmp_path):
    """By id from a hub on this machine, then with the hub gone; absent models are UserErrors."""
    files, weights = saved_files(tmp_path / "tiny")
    sharded, _ = saved_files(tmp_path / "sharded", shards=True)
    assert sum(name.endswith(".safetensors") for name in sharded) > 1
    broken = {**files, "config.json": b"{"}
    width = TINY["hidden_size"]
    dense = {"linear.weight": torch.eye(width), "linear.bias": torch.ones(width)}
    settings = {"in_features": width, "out_features": width, "bias": True}
    settings["activation_function"] = "torch.nn.modules.activation.Tanh"
    trained = {  # as sentence-transformers leaves a pooler
        **files,
        "modules.json": b"[]",
        "1_Pooling/config.json": b'{"pooling_mode_cls_token": true}',
        "2_Dense/config.json": json.dumps(settings).encode(),
        "2_Dense/model.safetensors": save(dense),
    }
    good = [f"org/{name} loaded [2, 5, 7, 8, 10, 3]" for name in ("tiny", "sharded")]

    def assert_loaded():
        for name in ("tiny", "sharded"):
            loaded = load_file(tmp_path / f"org-{name}.out")
            mine = BertModel(BertConfig(**TINY))
            mine.load_state_dict(loaded)
            mine.save_pretrained(tmp_path / "again")
            again = load_file(tmp_path / "again" / "model.safetensors")
            assert again.keys() == weights.keys()
            assert all(torch.equal(again[key], tensor) for key, tensor in weights.items())
            (tmp_path / f"org-{name}.out").unlink()

    repos = {"org/sharded": sharded, "org/broken": broken, "org/trained": trained}
    with hub({"org/tiny": files, **repos}) as server:
        with_pooler, tiny, shards, bad, absent = load_in_a_process(
            tmp_path,
            "org/trained",
            "org/tiny",
            "org/sharded",
            "org/broken",
            "org/absent",
            HF_ENDPOINT=server.endpoint,
        )
    assert [tiny, shards] == good
    assert_loaded()
    assert with_pooler.startswith("org/trained loaded")
    pooler = load_file(tmp_path / "org-trained.out")
    assert torch.equal(pooler["pooler.weight"], dense["linear.weight"])
    assert torch.equal(pooler["pooler.bias"], dense["linear.bias"])
    assert bad.startswith("org/broken UserError")
    assert "config.json" in bad
    assert absent.startswith("org/absent UserError --model org/absent:")
    assert "no such" in absent
    asked = {path for command, path in server.asked if command == "GET"}
    assert "/org/tiny/resolve/main/model.safetensors" in asked
    assert not any(path.endswith((".bin", ".py", ".md")) for path in asked)

    tiny, shards, absent, bare = load_in_a_process(
        tmp_path,
        "org/tiny",
        "org/sharded",
        "org/absent",
        "no-such-model",
        HF_ENDPOINT=server.endpoint,
        HF_HUB_OFFLINE="1",
    )
    assert [tiny, shards] == good
    assert_loaded()
    for line, name in ((absent, "org/absent"), (bare, "no-such-model")):
        assert line.startswith(f"{name} UserError --model {name}:")
        assert "all-MiniLM-L6-v2" in line


@pytest.fixture
def local_hub(tmp_path, monkeypatch):
    """`local_hub(endpoint)` points this process's hub library there, its cache empty."""

    def point(endpoint):
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

    return point


def test_broken_download_is_a_user_error(tmp_path, local_hub, monkeypatch):
    """The connection breaks half-way, again and again: one line, no traceback."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the library waits between tries
    files, _ = saved_files(tmp_path / "tiny")
    with hub({"org/tiny": files}, cut=["org/tiny"]) as server:
        local_hub(server.endpoint)
        with pytest.raises(UserError) as caught:
            model_folder("org/tiny")
        one_line(caught, "--model org/tiny")
    assert ("GET", "/org/tiny/resolve/main/model.safetensors") in server.asked


def test_unreachable_hub_is_a_user_error(local_hub):
    """Nobody answers: one line that names the model to use instead."""
    with hub({}) as server:
        local_hub(server.endpoint)
    with pytest.raises(UserError) as caught:
        model_folder("org/tiny")
    one_line(caught, "--model org/tiny", "all-MiniLM-L6-v2")


def test_missing_shard_on_the_hub_is_a_user_error(tmp_path, local_hub):
    """An index whose shard the repository lacks."""
    files, _ = saved_files(tmp_path / "tiny", shards=True)
    shard = next(name for name in sorted(files) if name.endswith(".safetensors"))
    del files[shard]
    with hub({"org/tiny": files}) as server:
        local_hub(server.endpoint)
        with pytest.raises(UserError) as caught:
            model_folder("org/tiny")
    one_line(caught, "--model org/tiny", "weights")


def test_tokenizer_fetches_no_weights(tmp_path, local_hub):
    """`weights=False` leaves the large files on the hub."""
    files, _ = saved_files(tmp_path / "tiny")
    with hub({"org/tiny": files}) as server:
        local_hub(server.endpoint)
        folder = model_folder("org/tiny", weights=False)
    assert names(folder) == ["config.json", "vocab.txt"]
    assert not any(path.endswith(".safetensors") for _, path in server.asked)


# ------------------------------------------------------------------ run folders


def log_lines(folder):
    """The parsed lines of log.jsonl."""
    text = (folder / "log.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text[:-1].split("\n")]


def test_run_records_itself(tmp_path, monkeypatch):
    """config.json first, a line a log call and at once, result.json last."""
    monkeypatch.setattr(sys, "argv", ["classifier.py", "--lr", "1e-5", "--note", "two words"])
    folder = tmp_path / "runs" / "one"
    run = Run.begin(folder, {"lr": 1e-5, "note": "día"}, parameters=12)
    config = read_json(folder / "config.json")
    assert config["arguments"] == {"lr": 1e-5, "note": "día"}
    assert config["parameters"] == 12
    assert shlex.split(config["command"])[1:] == sys.argv
    assert config["versions"]["torch"] == torch.__version__
    assert config["versions"]["numpy"] == np.__version__
    assert config["hardware"]["threads"] == torch.get_num_threads()
    assert {"machine", "system", "cpu", "gpu"} <= config["hardware"].keys()
    assert config["python"] == sys.version.split()[0]
    assert {"commit", "uncommitted_changes", "started"} <= config.keys()

    run.log("train", 1, loss=0.5, rows=8)
    assert log_lines(folder) == [{"kind": "train", "step": 1, "loss": 0.5, "rows": 8}]
    run.log("dev", 2, accuracy=0.25, note="line\nbreak “é”")
    assert not (folder / "result.json").exists()
    run.finish({"accuracy": 0.25})
    assert log_lines(folder)[1:] == [
        {"kind": "dev", "step": 2, "accuracy": 0.25, "note": "line\nbreak “é”"}
    ]
    assert read_json(folder / "result.json") == {"accuracy": 0.25}


def test_used_run_folder_is_refused_and_untouched(tmp_path):
    """Even a single file in it, even a hidden one; an empty folder is fine."""
    used = tmp_path / "used"
    used.mkdir()
    (used / ".hidden").write_text("mine", encoding="utf-8")
    a_file = tmp_path / "file"
    a_file.write_text("mine", encoding="utf-8")
    for path in (used, a_file):
        with pytest.raises(UserError) as caught:
            Run.begin(path, {})
        one_line(caught, path, "--run_dir", "in use")
    assert names(used) == [".hidden"]
    empty = tmp_path / "empty"
    empty.mkdir()
    Run.begin(empty, {}).close()
    with pytest.raises(UserError):
        Run.begin(empty, {})


def test_run_folder_that_cannot_be_made_is_refused(tmp_path):
    """Below a file, where no folder can be."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    path = tmp_path / "file" / "run"
    with pytest.raises(UserError) as caught:
        Run.begin(path, {})
    one_line(caught, path, "--run_dir")

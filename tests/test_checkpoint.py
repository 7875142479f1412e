"""Files: written whole or not at all, refused if damaged, never executed."""

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import (
    TEXTS,
    edit_json,
    edit_tensors,
    names,
    refused,
    save_as_pickle,
    save_as_shards,
    save_small_model,
    use_model,
    within,
    within_memory,
)
from safetensors.torch import load_file, save_file

from engine.checkpoint import (
    atomic_file,
    atomic_folder,
    check_new_file,
    read_json,
    read_state,
    read_tensors,
    read_text,
    restore_folder,
    write_json,
    write_state,
    write_tensors,
    write_text,
)
from engine.errors import UserError
from engine.hub import TOKENIZER_FILES
from tokenizer import BertTokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="module")
def no_sync():
    """Waiting for the disk, a thousand times over, would take most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


# ---------------------------------------------------------------------------- atomic writing


class Interrupted(BaseException):
    """Stands for Ctrl-C: not an Exception."""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_appears_when_it_is_complete(tmp_path):
    file = tmp_path / "new" / "folders" / "notes.txt"
    for text, before in (("first", None), ("second", "first")):
        with atomic_file(file) as draft:
            write(draft, text)
            assert (file.read_text(encoding="utf-8") if before else file.exists()) == (
                before or False
            )
        assert file.read_text(encoding="utf-8") == text
    assert names(file.parent) == ["notes.txt"]


def test_a_folder_replaces_the_old_one_with_all_its_files(tmp_path):
    folder = tmp_path / "new" / "best"
    for number in (1, 2):
        with atomic_folder(folder) as draft:
            write(draft / f"{number}.txt", "x")
            assert folder.exists() == (number == 2)
        assert names(folder) == [f"{number}.txt"]
    assert names(folder.parent) == ["best"]


@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
@pytest.mark.parametrize("existed", [True, False])
def test_what_fails_half_way_leaves_everything_as_it_was(tmp_path, error, existed):
    file, folder = tmp_path / "notes.txt", tmp_path / "best"
    if existed:
        write(file, "old")
        folder.mkdir()
        write(folder / "old.txt", "old")
    with pytest.raises(error), atomic_file(file) as draft:
        write(draft, "half of the n")
        raise error
    with pytest.raises(error), atomic_folder(folder) as draft:
        write(draft / "new.txt", "new")
        raise error
    assert names(tmp_path) == (["best", "notes.txt"] if existed else [])
    if existed:
        assert file.read_text(encoding="utf-8") == "old"
        assert names(folder) == ["old.txt"]


def test_the_old_folder_returns_if_the_new_one_cannot_be_renamed(tmp_path, monkeypatch):
    folder = tmp_path / "best"
    folder.mkdir()
    write(folder / "old.txt", "old")
    rename, calls = os.replace, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no space left")
        rename(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="no space"), atomic_folder(folder) as draft:
        write(draft / "new.txt", "new")
    assert names(tmp_path) == ["best"]
    assert names(folder) == ["old.txt"]


@pytest.mark.parametrize(("killed_at", "left"), [(1, "old.txt"), (2, "old.txt"), (9, "new.txt")])
def test_after_a_kill_the_folder_is_restored_to_the_old_or_the_new_one(tmp_path, killed_at, left):
    """In a process that ends without warning at the first or the second of two renames."""
    folder = tmp_path / "best"
    folder.mkdir()
    write(folder / "old.txt", "old")
    child = os.fork()
    if child == 0:
        rename, calls = os.replace, []
        os.replace = lambda *paths: (
            os._exit(9) if calls.append(paths) or len(calls) == killed_at else rename(*paths)
        )
        with atomic_folder(folder) as draft:
            write(draft / "new.txt", "new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if killed_at == 9 else 9)
    restore_folder(folder)
    assert names(folder) == [left]
    assert not list(tmp_path.glob("*.old"))


def test_only_new_files_in_writable_folders_may_be_named_as_output(tmp_path):
    check_new_file(tmp_path / "a" / "b" / "new.csv")
    assert names(tmp_path) == []  # checking creates nothing
    mine = write(tmp_path / "mine.csv", "precious")
    refused(lambda: check_new_file(mine), mine, "not overwritten")
    refused(lambda: check_new_file(mine / "x.csv"), mine)
    refused(lambda: check_new_file(tmp_path / ("n" * 300)), "File name too long")


# ---------------------------------------------------------------------------- round trips

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@settings(max_examples=30)
@given(value=st.dictionaries(st.text(max_size=5), json_values, max_size=4), text=st.text())
def test_json_and_text_come_back_as_they_were(tmp_path_factory, value, text):
    file = tmp_path_factory.getbasetemp() / "value.json"
    write_json(file, value)
    assert read_json(file) == value == json.loads(file.read_bytes())
    assert file.read_bytes().endswith(b"}\n")
    write_text(file, text)
    assert read_text(file) == text
    assert file.read_bytes() == text.encode()  # line endings too


def test_equal_tensors_make_equal_files(tmp_path):
    """The order of the dict, memory layout and requires_grad leave no trace; NaN is a number."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 3, generator=generator), torch.randn(4, generator=generator)
    write_tensors(tmp_path / "1", {"a": a, "b": b})
    transposed = torch.nn.Parameter(a.t().contiguous().t())
    assert not transposed.is_contiguous()
    write_tensors(tmp_path / "2", {"b": b.clone(), "a": transposed})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    write_tensors(tmp_path / "2", {"a": a + 1, "b": b})
    assert (tmp_path / "1").read_bytes() != (tmp_path / "2").read_bytes()
    assert names(tmp_path) == ["1", "2"]
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "1").stat().st_mode == plain.stat().st_mode  # others may read it as well


def test_tensors_keep_their_dtypes_and_values(tmp_path):
    dtypes = (torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.bool)
    tensors = {str(dtype): torch.tensor([1, 2, 3], dtype=dtype) for dtype in dtypes}
    tensors["scalar"] = torch.tensor(0.5)
    tensors["empty"] = torch.zeros(0, 3)
    write_tensors(tmp_path / "t.safetensors", tensors)
    for loaded in (read_tensors(tmp_path / "t.safetensors"), load_file(tmp_path / "t.safetensors")):
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


STATE = {"a": torch.arange(12.0).view(3, 4), "step": torch.tensor(7)}
FACTS = {"stage": None, "log": 1234, "best": {"score": 0.5, "summary": "é"}}


def test_a_training_state_comes_back_as_it_was_or_is_refused(tmp_path):
    file = tmp_path / "state.safetensors"
    write_state(file, STATE, FACTS)
    tensors, facts = read_state(file)
    assert facts == FACTS
    assert tensors.keys() == STATE.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in STATE.items())
    write_tensors(file, STATE)
    refused(lambda: read_state(file), file, "training state")
    save_file(STATE, file, {"facts": json.dumps(FACTS), "checksum": "00000000"})
    refused(lambda: read_state(file), file, "checksum")


def test_no_bit_of_a_training_state_changes_unnoticed(tmp_path):
    """A bit of every byte of the file is flipped: what is still read is what was written."""
    file = tmp_path / "state.safetensors"
    write_state(file, STATE, FACTS)
    good = file.read_bytes()
    unnoticed = 0
    for place in range(len(good)):
        damaged = bytearray(good)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            tensors, facts = read_state(file)
        except UserError as error:
            assert str(file) in str(error)
        else:
            unnoticed += 1
            assert facts == FACTS
            assert all(torch.equal(tensors[name], tensor) for name, tensor in STATE.items())
    assert unnoticed < 30  # in the header: in white space, or in a name that nothing reads


# ---------------------------------------------------------------------------- damaged files


def test_what_is_no_json_object_is_refused(tmp_path):
    file = tmp_path / "config.json"
    refused(lambda: read_json(file), file, "no such file")
    refused(lambda: read_json(tmp_path), tmp_path, "a folder")
    deep = b"[" * 100_000
    for content in (b"", b'{"a": 1,\n "b":\n}', b'{"a": "\xff"}', deep, b"[1]", b'"a"', b"null"):
        file.write_bytes(content)
        refused(lambda: read_json(file), file, "not a JSON object")


def loads_or_is_refused(load: Callable[[], object], path: Path) -> bool:
    """Whether it loads; the only other outcome is a UserError of one line that names the path."""
    try:
        with within(30), within_memory(1500):
            load()
    except UserError as error:
        assert str(error).isprintable()
        assert str(path) in str(error)
        return False
    return True


def pickled(value: object) -> bytes:
    out = BytesIO()
    torch.save(value, out)
    return out.getvalue()


@pytest.mark.parametrize(
    "value",
    [
        [torch.ones(2)],
        {"a": 1},
        {1: torch.ones(2)},
        torch.ones(2),
        {"a": torch.ones(2, 2).to_sparse()},
        {"a": torch.ones(1).expand(10**6, 10**6)},  # 4 bytes that claim 4 terabytes
        dict.fromkeys(map(str, range(100)), torch.ones(10**4)),
    ],
    ids=["list", "number", "nameless", "tensor", "sparse", "repeated numbers", "repeated tensors"],
)
def test_a_pickle_of_anything_but_named_tensors_is_refused(tmp_path, value):
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(pickled(value))
    refused(lambda: read_tensors(file), file)


def test_tied_weights_are_loaded(tmp_path):
    """The decoder of a pre-trained BERT is its word embedding: one tensor under two names."""
    weight = torch.randn(50, 40)
    file = tmp_path / "m.bin"
    file.write_bytes(pickled({"a": weight, "b": weight, "c": torch.nn.Parameter(weight[:9])}))
    assert torch.equal(read_tensors(file)["b"], weight)


# ---------------------------------------------------------------------------- model folders

# A file -> what makes a folder in which it is read from one that save_pretrained wrote.
MODEL_FILES = {
    "config.json": lambda folder: None,
    "tokenizer_config.json": lambda folder: None,
    "tokenizer.json": lambda folder: None,
    "vocab.txt": lambda folder: (folder / "tokenizer.json").unlink(),
    "heads.json": lambda folder: None,
    "heads.safetensors": lambda folder: None,
    "model.safetensors": lambda folder: None,
    "pytorch_model.bin": save_as_pickle,
    "legacy/pytorch_model.bin": lambda folder: save_as_pickle(folder, zipped=False),
    "model.safetensors.index.json": save_as_shards,
    "pytorch_model.bin.index.json": lambda folder: save_as_shards(folder, "pytorch_model.bin"),
}
JSON_FILES = [name for name in MODEL_FILES if name.endswith(".json")]


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory) -> Path:
    return save_small_model(tiny, tmp_path_factory.mktemp("saved") / "best")


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A model folder to be broken."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture(scope="module")
def model_files(saved, tmp_path_factory) -> dict[str, Path]:
    """Each file of `MODEL_FILES`, in a folder of its own that loads."""
    files = {}
    for name, prepare in MODEL_FILES.items():
        copy = shutil.copytree(saved, tmp_path_factory.mktemp("files") / "model")
        prepare(copy)
        files[name] = copy / Path(name).name
        use_model(copy)
    return files


def use_tokenizer(folder: Path) -> None:
    """Load the tokenizer alone, and use it."""
    tokenizer = BertTokenizer.from_pretrained(folder)
    for pairs in (None, TEXTS):
        lengths = map(len, tokenizer(TEXTS, pairs, truncation=True)["input_ids"])
        assert max(lengths) <= tokenizer.max_length


def loads_with(file: Path, content: bytes) -> bool:
    """Whether the folder of `file` loads with this content in its place."""
    before = file.read_bytes()
    file.write_bytes(content)
    use = use_tokenizer if file.name in TOKENIZER_FILES else use_model
    try:
        return loads_or_is_refused(lambda: use(file.parent), file.parent)
    finally:
        file.write_bytes(before)


USUAL_DAMAGE = [
    b"",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
    b"<!doctype html>\n<html>\n<body>Not found</body>\n</html>\n",
    pickle.dumps({}),
    bytes(range(256)) * 8,
]


@pytest.mark.parametrize("name", MODEL_FILES)
@settings(max_examples=12)
@given(content=st.binary(max_size=100) | st.sampled_from(USUAL_DAMAGE))
def test_any_bytes_in_place_of_a_model_file_are_refused(model_files, name, content):
    assert not loads_with(model_files[name], content)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "insert", "delete", "repeat", "cut"]),
        # At the ends, too: that is where headers, pickles and directories are.
        st.floats(0, 1) | st.floats(0, 0.05) | st.floats(0.95, 1),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)


def mutate(data: bytes, edits: list[tuple[str, float, int]]) -> bytes:
    """Flip a bit, set, insert, delete or repeat bytes, cut the end off: at these places."""
    changed = bytearray(data)
    for kind, where, number in edits:
        place = int(where * len(changed))
        if kind == "flip" and place < len(changed):
            changed[place] ^= 1 << number % 8
        elif kind == "set":
            changed[place : place + 1] = bytes([number])
        elif kind == "insert":
            changed[place:place] = bytes([number]) * (1 + number % 9)
        elif kind == "delete":
            del changed[place : place + 1 + number % 40]
        elif kind == "repeat":
            changed[place:place] = changed[place : place + 1 + number % 40]
        elif kind == "cut":
            del changed[place:]
    return bytes(changed)


@pytest.mark.parametrize("name", MODEL_FILES)
@settings(max_examples=20)
@given(edits=EDITS)
def test_a_damaged_model_file_loads_or_is_refused(model_files, name, edits):
    loads_with(model_files[name], mutate(model_files[name].read_bytes(), edits))


ODD = [None, True, -1, 0, 1, 2, 10**8, 2**31, 2**64, 10**400, 0.5, 1e300, math.inf, math.nan, ""]
ODD += ["a", "[PAD]", "$A", "a:0", "\0", "\u200b", "\ud800", "\n", "../a", [], {}, [[]], {"": {}}]
ODD += ["BPE", "Replace", "cosine", "linear", "joint", "mean", "gelu_new"]
odd_values = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def graft(tree: object, picks: list[int], new: object) -> object:
    """A copy of a JSON value with `new` somewhere inside it: at each level, a pick of the keys."""
    if not picks or not isinstance(tree, dict | list) or not tree:
        return new
    tree = tree.copy()
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    key = keys[picks[0] % len(keys)]
    tree[key] = graft(tree[key], picks[1:], new)
    return tree


@pytest.mark.parametrize("name", JSON_FILES)
@settings(max_examples=30)
@given(picks=st.lists(st.integers(0, 200), min_size=1, max_size=4), new=odd_values)
def test_an_odd_value_in_a_json_file_loads_or_is_refused(model_files, name, picks, new):
    tree = graft(read_json(model_files[name]), picks, new)
    loads_with(model_files[name], json.dumps(tree).encode())


@pytest.mark.parametrize("name", MODEL_FILES)
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_pipe_or_folder_in_place_of_a_model_file_is_refused_at_once(model_files, name, kind):
    file = model_files[name]
    before = file.read_bytes()
    file.unlink()
    file.mkdir() if kind == "folder" else os.mkfifo(file)
    try:
        refused(lambda: use_model(file.parent), file.parent)
    finally:
        file.rmdir() if kind == "folder" else file.unlink()
        file.write_bytes(before)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 10**8),
        ("hidden_size", 10**30),
        ("num_hidden_layers", 10**8),
        ("vocab_size", 10**8),
        ("vocab_size", 2**62),
        ("intermediate_size", 10**8),
        ("max_position_embeddings", 10**8),
        ("type_vocab_size", 10**30),
        ("layer_norm_eps", 10**400),
        ("layer_norm_eps", math.nan),
        ("initializer_range", math.inf),
        ("hidden_dropout_prob", 10**400),
        ("hidden_dropout_prob", 1.5),
        ("hidden_act", "\x1b[2J\n" * 10**5),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_config_with_absurd_numbers_is_refused(folder, key, value):
    edit_json(folder / "config.json", **{key: value})
    with within_memory(400):
        refused(lambda: use_model(folder), folder)


def test_a_name_in_a_file_cannot_break_the_line_of_a_message(folder):
    name = "bad\nname\x1b[31m\u202e" + "x" * 5000
    edit_tensors(folder / "model.safetensors", **{name: torch.ones(1)})
    file = folder / "model.safetensors"
    refused(lambda: use_model(folder), file, "bad\\nname\\x1b[31m\\u202exx", "not a weight")
    assert str(UserError("café 中\ud800")) == "café 中\\ud800"


# ---------------------------------------------------------------------------- nothing executes


class Call:
    """Pickled, it is a call of this function with these arguments."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def pickle_bombs(target: Path) -> dict[str, bytes]:
    """Pickles that create a file when they are loaded, each by another instruction."""
    text = f"touch {target}".encode()
    return {
        "GLOBAL, REDUCE": b"cos\nsystem\n(S'" + text + b"'\ntR.",
        "STACK_GLOBAL": pickle.dumps(Call(os.system, text.decode()), protocol=4),
        "INST": b"(S'" + text + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + text + b"'\no.",
        "in a dict": pickle.dumps({"a": Call(os.system, text.decode())}, protocol=2),
    }


def in_zip(content: bytes) -> bytes:
    """A pickle as today's torch.save stores it."""
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/version", "3\n")
    return archive.getvalue()


def in_legacy_format(content: bytes) -> bytes:
    """A pickle as torch.save stored it before version 1.6."""
    header = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION]
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    return b"".join(
        [*(pickle.dumps(part, 2) for part in [*header, machine]), content, pickle.dumps([], 2)]
    )


FORMATS = {"plain": bytes, "zip": in_zip, "legacy": in_legacy_format}
PLACES = ["shard.bin", "shard.safetensors", *MODEL_FILES]
PLACES.remove("legacy/pytorch_model.bin")


@pytest.mark.parametrize("bomb", pickle_bombs(Path()))
@pytest.mark.parametrize("form", FORMATS)
def test_a_pickle_that_runs_a_command_is_never_executed(folder, tmp_path, bomb, form):
    """Wherever it is planted in a model folder; it is shown to work first."""
    target = tmp_path / "executed"
    content = FORMATS[form](pickle_bombs(target)[bomb])
    (tmp_path / "bomb.bin").write_bytes(content)
    with suppress(Exception):
        torch.load(tmp_path / "bomb.bin", weights_only=False)
    target.unlink()
    for number, place in enumerate(PLACES):
        copy = shutil.copytree(folder, tmp_path / str(number))
        if place.startswith(("pytorch", "shard", "model.safetensors.")):
            (copy / "model.safetensors").unlink()
        if place == "vocab.txt":
            (copy / "tokenizer.json").unlink()
        if place.startswith("shard"):
            whole = "pytorch_model.bin" if place.endswith(".bin") else "model.safetensors"
            write_json(copy / f"{whole}.index.json", {"weight_map": {"a": place}})
        (copy / place).write_bytes(content)
        refused(lambda copy=copy: use_model(copy), copy / place)
    refused(lambda: read_state(tmp_path / "bomb.bin"), "bomb.bin")
    assert not target.exists()


PLANTS = ["modeling_evil", "tokenization_evil", "configuration_evil", "conftest", "sitecustomize"]
PLANTS += ["usercustomize", "torch", "numpy", "json", "tokenizers", "bert", "engine", "__init__"]


def test_nothing_in_a_model_folder_is_imported(tiny, data, tmp_path):
    """Even by a whole run that is started inside it; the plants are shown to work first."""
    model = shutil.copytree(tiny, tmp_path / "model")
    target = tmp_path / "executed"
    for name in PLANTS:
        write(model / f"{name}.py", f"open({str(target)!r}, 'w').close()\n")
    subprocess.run([sys.executable, "-c", "import modeling_evil"], cwd=model, check=True)
    target.unlink()
    auto = {"AutoModel": "modeling_evil.Model", "AutoConfig": "configuration_evil.Config"}
    edit_json(model / "config.json", auto_map=auto, architectures=["Evil"], trust_remote_code=True)
    tokenizers = {"AutoTokenizer": ["tokenization_evil.T", "tokenization_evil.F"]}
    edit_json(model / "tokenizer_config.json", auto_map=tokenizers, trust_remote_code=True)
    flags = ["--epochs", "1", "--limit", "4", "--precision", "fp32", "--model", "."]
    flags += ["--data_dir", str(data), "--run_dir", str(tmp_path / "run")]
    command = [sys.executable, str(ROOT / "classifier.py"), *flags]
    done = subprocess.run(command, cwd=model, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()
    assert not target.exists()

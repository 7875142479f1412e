"""Files: written whole or not at all, refused if damaged, never executed."""

import errno
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from conftest import quick_run
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import (
    edit_json,
    names,
    refused,
    save_as_pickle,
    save_small_model,
    use_model,
    within,
)
from safetensors.torch import load_file

from engine.checkpoint import (
    atomic_file,
    atomic_folder,
    check_new_file,
    check_weight,
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

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="module")
def no_sync():
    """Waiting for the disk, a thousand times over, would take most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


# ---------------------------------------------------------------------------- atomic writing


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_or_folder_appears_when_it_is_complete(tmp_path):
    file, folder = tmp_path / "new" / "folders" / "notes.txt", tmp_path / "newer" / "best"
    for number in (1, 2):
        with atomic_file(file) as draft, atomic_folder(folder) as drafts:
            write(draft, str(number))
            write(drafts / f"{number}.txt", "x")
            assert file.exists() == folder.exists() == (number == 2)
            if number == 2:
                assert (file.read_text("utf-8"), names(folder)) == ("1", ["1.txt"])
        assert (file.read_text("utf-8"), names(folder)) == (str(number), [f"{number}.txt"])
    assert names(file.parent) + names(folder.parent) == ["notes.txt", "best"]


@pytest.mark.parametrize("existed", [True, False])
def test_an_interruption_leaves_everything_as_it_was(tmp_path, existed):
    file, folder = tmp_path / "notes.txt", tmp_path / "best"
    if existed:
        write(file, "old")
        write(folder / "old.txt", "old")
    with pytest.raises(KeyboardInterrupt), atomic_file(file) as draft, atomic_folder(folder) as new:
        write(draft, "half of the n")
        write(new / "new.txt", "new")
        raise KeyboardInterrupt
    assert names(tmp_path) == (["best", "notes.txt"] if existed else [])
    assert not existed or (file.read_text("utf-8"), names(folder)) == ("old", ["old.txt"])


@pytest.fixture
def best(tmp_path):
    return write(tmp_path / "best" / "old.txt", "old").parent


def replace_folder(folder):
    with atomic_folder(folder) as draft:
        write(draft / "new.txt", "new")


def test_the_old_folder_returns_if_the_new_one_cannot_be_renamed(best, monkeypatch):
    rename = Mock(wraps=os.replace, side_effect=[DEFAULT, OSError("no space left"), DEFAULT])
    monkeypatch.setattr(os, "replace", rename)
    with pytest.raises(OSError, match="no space"):
        replace_folder(best)
    assert names(best.parent) + names(best) == ["best", "old.txt"]


@pytest.mark.parametrize(("killed_at", "left"), [(1, "old.txt"), (2, "old.txt"), (9, "new.txt")])
def test_after_a_kill_the_folder_is_restored_to_the_old_or_the_new_one(best, killed_at, left):
    """In a process that ends without warning at the first or the second of two renames."""
    child = os.fork()
    if child == 0:
        try:
            os.replace = rename = Mock(wraps=os.replace)
            rename.side_effect = lambda *_: (
                os._exit(9) if rename.call_count == killed_at else DEFAULT
            )
            replace_folder(best)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if killed_at == 9 else 9)
    restore_folder(best)
    assert names(best) == [left]
    assert not list(best.parent.glob("*.old"))


def test_only_new_files_in_writable_folders_may_be_named_as_output(tmp_path):
    check_new_file(tmp_path / "a" / "b" / "new.csv")
    assert names(tmp_path) == []  # checking creates nothing
    mine = write(tmp_path / "mine.csv", "precious")
    refused(lambda: check_new_file(mine), mine, "not overwritten")
    refused(lambda: check_new_file(mine / "x.csv"), mine)
    refused(lambda: check_new_file(tmp_path / ("n" * 300)), "File name too long")


# ---------------------------------------------------------------------------- round trips


def trees(leaves):
    """JSON values of these leaves."""
    keys = st.text(max_size=3)
    return st.recursive(leaves, lambda t: st.lists(t) | st.dictionaries(keys, t), max_leaves=5)


numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=30)
@given(st.dictionaries(st.text(), trees(numbers | st.sampled_from([None, True, ""]))), st.text())
def test_json_and_text_come_back_as_they_were(tmp_path_factory, value, text):
    file = tmp_path_factory.getbasetemp() / "value.json"
    write_json(file, value)
    assert read_json(file) == value == json.loads(file.read_bytes())
    assert file.read_bytes().endswith(b"}\n")
    write_text(file, text)
    assert read_text(file) == text
    assert file.read_bytes() == text.encode()  # line endings too


assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


def test_equal_tensors_make_equal_files(tmp_path):
    """The order of the dict, memory layout and requires_grad leave no trace."""
    a, b, file, plain = torch.randn(5, 3), torch.randn(4), tmp_path / "file", tmp_path / "plain"
    transposed = torch.nn.Parameter(a.t().contiguous().t())
    contents = []
    for tensors in ({"a": a, "b": b}, {"b": b.clone(), "a": transposed}, {"a": a + 1, "b": b}):
        write_tensors(file, tensors)
        contents.append(file.read_bytes())
    assert contents[0] == contents[1] != contents[2]
    plain.touch()
    assert file.stat().st_mode == plain.stat().st_mode  # others may read it too


def test_a_state_is_copied_from_its_device_once(tmp_path):
    copies = []

    class OnDevice(torch.Tensor):
        """A tensor elsewhere, which counts how often it comes to the CPU."""

        def cpu(self):
            copies.append(self)
            return self.as_subclass(torch.Tensor).clone()

    write_state(tmp_path / "state.safetensors", {"w": torch.ones(3).as_subclass(OnDevice)}, {})
    assert len(copies) == 1
    assert read_state(tmp_path / "state.safetensors")[0]["w"].tolist() == [1, 1, 1]


def test_no_bit_of_a_training_state_changes_unnoticed(tmp_path):
    """A bit of every byte of the file is flipped: what is still read is what was written."""
    file = tmp_path / "state.safetensors"
    tensors = {"half": torch.arange(3, dtype=torch.bfloat16), "step": torch.tensor(7)}
    tensors |= {"mask": torch.tensor([True]), "empty": torch.zeros(0, 3, dtype=torch.float64)}
    facts = {"stage": None, "log": 1234, "best": {"score": 0.5, "summary": "é"}}
    write_tensors(file, tensors)
    assert_equal(load_file(file), tensors)
    refused(lambda: read_state(file), file, "training state")
    write_state(file, tensors, facts)
    good, unnoticed = file.read_bytes(), 0
    for place in [None, *range(len(good))]:
        damaged = bytearray(good)
        if place is not None:
            damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            read, read_facts = read_state(file)
        except UserError as error:
            assert place is not None and str(file) in str(error)
        else:
            unnoticed += 1
            assert_equal(read, tensors)
            assert read_facts == facts
    assert unnoticed < 30  # in the header: in white space, or in a name that nothing reads


# ---------------------------------------------------------------------------- damaged files


def test_anything_but_a_json_object_is_refused(tmp_path):
    file = tmp_path / "config.json"
    refused(lambda: read_json(file), file, "no such file")
    refused(lambda: read_json(tmp_path), tmp_path, "Is a directory")
    refused(lambda: read_tensors(tmp_path), tmp_path, "Is a directory")
    deep = b"[" * 100_000
    for content in (b"", b'{"a": 1,\n "b":\n}', b'{"a": "\xff"}', deep, b"[1]", b"null"):
        file.write_bytes(content)
        refused(lambda: read_json(file), file, "not a JSON object")


def test_a_file_system_without_permissions_will_do(tmp_path, monkeypatch):
    """SMB, exFAT, S3: chmod fails there, for reasons that are no error of ours."""
    for code in (errno.EPERM, errno.ENOTSUP):
        monkeypatch.setattr(os, "chmod", Mock(side_effect=OSError(code, "no chmod")))
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
        assert torch.equal(read_tensors(tmp_path / "a.safetensors")["a"], torch.ones(2))
        assert os.chmod.called


def test_a_file_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("é" * 127)  # 254 bytes of 255
    write_text(path, "x")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["x"]


def test_a_pickle_may_hold_named_tensors_only(tmp_path):
    """Two names for one tensor are usual: the decoder of a pre-trained BERT is its embedding."""
    file, weight = tmp_path / "pytorch_model.bin", torch.randn(50, 40)
    torch.save({"a": weight, "b": weight, "c": torch.nn.Parameter(weight[:9])}, file)
    assert_equal(read_tensors(file)["b"], weight)
    for content in (weight, {"a": 1}, {1: weight}):
        torch.save(content, file)
        refused(lambda: read_tensors(file), file)
    torch.save({"a": weight.to_sparse()}, file)
    refused(lambda: check_weight("a", read_tensors(file)["a"], file), file)


# ---------------------------------------------------------------------------- model folders

# A file -> what makes a folder in which it is read from one that save_pretrained wrote.
AS_SAVED = ["config.json", "tokenizer.json", "tokenizer_config.json", "heads.json"]
MODEL_FILES = {
    **dict.fromkeys([*AS_SAVED, "heads.safetensors", "model.safetensors"], lambda folder: None),
    "vocab.txt": lambda folder: (folder / "tokenizer.json").unlink(),
    "pytorch_model.bin": save_as_pickle,
    "legacy/pytorch_model.bin": partial(save_as_pickle, zipped=False),
}
EACH_FILE = pytest.mark.parametrize("name", MODEL_FILES)


@pytest.fixture(scope="module")
def model_files(tiny, tmp_path_factory):
    """Each file of `MODEL_FILES`, in a folder of its own that loads."""
    files = {}
    for name, prepare in MODEL_FILES.items():
        folder = save_small_model(tiny, tmp_path_factory.mktemp("files") / "model")
        prepare(folder)
        files[name] = folder / Path(name).name
        use_model(folder)
    return files


def load_with(file, content):
    """Load and run the model with another content of a file; returns the line of a refusal."""
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        with within(30, mebibytes=1500):
            use_model(file.parent)
    except UserError as error:
        assert str(error).isprintable() and str(file.parent) in str(error)
        return str(error)
    finally:
        file.write_bytes(before)
    return ""


USUAL_DAMAGE = [b"", pickle.dumps({}), bytes(range(256)) * 8, b"<!doctype html>\n<html>\n"]
USUAL_DAMAGE += [b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"]


@EACH_FILE
@settings(max_examples=12)
@given(content=st.binary(max_size=100) | st.sampled_from(USUAL_DAMAGE))
def test_any_bytes_in_place_of_a_model_file_are_refused(model_files, name, content):
    assert str(model_files[name]) in load_with(model_files[name], content)


# Where, how many bytes, and what takes their place; at the ends are headers and directories.
EDIT = st.tuples(
    st.floats(0, 1) | st.floats(0, 0.05) | st.floats(0.95, 1),
    st.sampled_from([0, 1, 4, 40, 10**9]),
    st.binary(max_size=4),
)


@EACH_FILE
@settings(max_examples=30)
@given(edits=st.lists(EDIT, min_size=1, max_size=4))
def test_a_damaged_model_file_loads_or_is_refused(model_files, name, edits):
    content = model_files[name].read_bytes()
    for where, length, new in edits:
        place = int(where * len(content))
        content = content[:place] + new + content[place + length :]
    load_with(model_files[name], content)


ODD = [None, True, -1, 0, 1, 2, 10**8, 2**31, 2**64, 10**400, 0.5, 1e300, math.inf, math.nan, ""]
ODD += ["a", "[PAD]", "$A", "a:0", "\0", "\u200b", "\ud800", "\n", "../a", [], {}, [[]], {"": {}}]
ODD += ["BPE", "Replace", "cosine", "linear", "joint", "mean", "gelu_new"]
ODD_VALUES = trees(st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=3))


def graft(tree, picks, new):
    """A JSON value with `new` somewhere inside it: at each level, a pick of the keys."""
    if not picks or not isinstance(tree, dict | list) or not tree:
        return new
    key = (list(tree) if isinstance(tree, dict) else range(len(tree)))[picks[0] % len(tree)]
    tree[key] = graft(tree[key], picks[1:], new)
    return tree


@pytest.mark.parametrize("name", AS_SAVED)
@settings(max_examples=30)
@given(picks=st.lists(st.integers(0, 200), min_size=1, max_size=4), new=ODD_VALUES)
def test_an_odd_value_in_a_json_file_loads_or_is_refused(model_files, name, picks, new):
    tree = graft(read_json(model_files[name]), picks, new)
    load_with(model_files[name], json.dumps(tree).encode())


def test_a_config_with_absurd_numbers_is_refused_in_little_memory(tiny, tmp_path):
    folder = save_small_model(tiny, tmp_path / "model")
    config = read_json(folder / "config.json")
    absurd = [(key, 10**8) for key in config if type(config[key]) is int]
    absurd += [("hidden_size", 10**30), ("vocab_size", 2**62), ("type_vocab_size", 10**30)]
    absurd += [("layer_norm_eps", 10**400), ("hidden_act", "\x1b[2J\n" * 10**5)]
    for key, value in absurd:
        write_json(folder / "config.json", {**config, key: value})
        refused(lambda: use_model(folder), folder, mebibytes=400)


# ---------------------------------------------------------------------------- nothing executes


class Bomb(str):
    """Unpickled by a careless loader, it makes a folder of this name."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


FORMATS = {
    "plain": lambda value, path: path.write_bytes(pickle.dumps(value)),
    "of torch.save": torch.save,
    "of torch.save before 1.6": partial(torch.save, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("save", FORMATS.values(), ids=FORMATS)
def test_a_pickle_that_calls_a_function_is_never_executed(model_files, tmp_path, save):
    """Wherever it is planted in a model folder; it is shown to work first."""
    target, bomb = tmp_path / "executed", tmp_path / "bomb.bin"
    save({"a": Bomb(target)}, bomb)
    with suppress(Exception):
        torch.load(bomb, weights_only=False)
    target.rmdir()
    refused(lambda: read_state(bomb), bomb)
    for number, file in enumerate(model_files.values()):
        folder = shutil.copytree(file.parent, tmp_path / str(number))
        shutil.copy(bomb, folder / file.name)
        refused(lambda folder=folder: use_model(folder), folder / file.name)
    assert not target.exists()


PLANTS = ["modeling_evil", "tokenization_evil", "configuration_evil", "sitecustomize", "torch"]
PLANTS += ["usercustomize", "conftest", "json", "tokenizers", "bert", "engine", "hub", "__init__"]


def test_nothing_in_a_model_folder_is_imported(tiny, data, tmp_path):
    """Even by a whole run that is started inside it; the plants are shown to work first."""
    model, target = shutil.copytree(tiny, tmp_path / "model"), tmp_path / "executed"
    for name in PLANTS:
        write(model / f"{name}.py", f"open({str(target)!r}, 'w').close()\n")
    subprocess.run([sys.executable, "-c", "import modeling_evil"], cwd=model, check=True)
    target.unlink()
    auto = {"AutoModel": "modeling_evil.Model", "AutoConfig": "configuration_evil.Config"}
    edit_json(model / "config.json", auto_map=auto, architectures=["Evil"], trust_remote_code=True)
    tokenizers = {"AutoTokenizer": ["tokenization_evil.T", "tokenization_evil.F"]}
    edit_json(model / "tokenizer_config.json", auto_map=tokenizers, trust_remote_code=True)
    flags = quick_run(".", data, tmp_path / "run", "--limit", 4)
    command = [sys.executable, ROOT / "classifier.py", *flags]
    done = subprocess.run(command, cwd=model, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    assert not target.exists()

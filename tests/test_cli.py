"""Command lines: values of flags, help, messages of one line, exit codes."""

import argparse
import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import classifier
import evaluation
import experiments.__main__
import multitask_classifier
import simcse
from engine import cli
from engine.distributed import PeerProcessDied
from engine.errors import AlreadyFinished, OutOfMemory, TrainingDiverged, UserError, reading

ROOT = Path(__file__).resolve().parent.parent
TRAINING = [classifier, multitask_classifier, simcse]
SCRIPTS = [*TRAINING, evaluation, experiments.__main__]

# ---------------------------------------------------------------------------- values of flags

bounds = st.tuples(st.integers(-5, 5), st.integers(1, 9) | st.just(math.inf))


@given(bounds, st.booleans(), st.booleans(), st.sampled_from([int, float]), st.data())
def test_a_number_is_accepted_exactly_if_it_is_in_range(limits, above, below, kind, data):
    low, high = limits[0], limits[0] + limits[1]
    near = st.sampled_from([low, high, low - 1, low + 1])
    value = data.draw(st.integers() | near if kind is int else st.floats() | near)
    inside = (low < value if above else low <= value) and value < math.inf
    inside &= value < high if below else value <= high
    parse = cli.number(kind, low, high, above=above, below=below)
    text = str(value) if kind is float or value != math.inf else "inf"
    if inside:
        assert parse(text) == value
    else:
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (cli.POSITIVE, "0", "0 is out of range; expected a number above 0 and at most 1e+06"),
        (cli.POSITIVE, "nan", "out of range"),
        (cli.POSITIVE, "1e400", "out of range"),
        (cli.POSITIVE, "fast", "'fast' is not a number"),
        (cli.NON_NEGATIVE, "-0.1", "at least 0"),
        (cli.FRACTION, "1", "1 is out of range; expected a number at least 0 and below 1"),
        (cli.POSITIVE_INT, "0", "expected a whole number at least 1"),
        (cli.POSITIVE_INT, "1.5", "'1.5' is not a whole number"),
        (cli.POSITIVE_INT, "", "'' is not a whole number"),
        (cli.COUNT, "-1", "at least 0"),
        (cli.COUNT, "1" * 5000, "is not a whole number"),
        (cli.interval, "10h", "'10h' is neither steps (500) nor minutes (10m)"),
        (cli.interval, "-1", "neither"),
        (cli.interval, "m", "neither"),
    ],
)
def test_a_refused_number_says_what_is_expected(parse, text, message):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        parse(text)
    assert message in str(caught.value)


# ---------------------------------------------------------------------------- parser and help


@pytest.fixture
def parser_of(monkeypatch):
    """`parser_of(script)`: the argument parser that its `parse_args` makes."""

    class Found(Exception):
        pass

    def find(parser, *_):
        raise Found(parser)

    def get(script) -> cli.ArgumentParser:
        with monkeypatch.context() as patch:
            patch.setattr(cli.ArgumentParser, "parse_args", find)
            with pytest.raises(Found) as found:
                script.parse_args([])
        return found.value.args[0]

    return get


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parser and those of its commands."""
    commands = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [parser, *(p for action in commands for p in action.choices.values())]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_flag_has_a_help_text(parser_of, script):
    for parser in parsers(parser_of(script)):
        assert parser.description
        for action in parser._actions:
            assert action.help, f"{parser.prog} {action.dest}"
            text = parser.format_help()
            assert not action.option_strings or action.option_strings[-1] in text
        assert re.search(r"\(default: (None|False)\)", text) is None


@pytest.mark.parametrize("script", TRAINING, ids=lambda script: script.__name__)
def test_the_flags_of_training_are_grouped(parser_of, script):
    parser = parser_of(script)
    loose = [action.dest for group in parser._action_groups[:2] for action in group._group_actions]
    assert set(loose) <= {"help", "task"}
    titles = [group.title for group in parser._action_groups[2:]]
    assert {"method", "model and data", "optimization", "hardware"} <= set(titles)
    assert len(set(titles)) == len(titles)
    for group in parser._action_groups[2:]:
        assert 1 <= len(group._group_actions) <= 10


def test_help_of_a_script_is_printed_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "classifier.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: classifier.py")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--no_such_flag"], "--no_such_flag"),
        (["--epoch", "1"], "--epoch"),  # no abbreviations: what they mean would change
        (["--epochs"], "--epochs: expected one argument"),
        (["--epochs", "0"], "argument --epochs: 0 is out of range"),
        (["--pooling", "max"], "--pooling: invalid choice"),
        (["--run_dir", "caf\udce9"], "is not UTF-8; rename it"),
    ],
)
@pytest.mark.parametrize("script", TRAINING, ids=lambda script: script.__name__)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(run_script, script, argv, message):
    code, out, err = run_script(script, *argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"{script.__name__}.py: error: ")
    assert err.endswith("(--help lists the flags)\n")
    assert message in err


def test_of_several_processes_one_reports_a_wrong_command_line(run_script, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_script(classifier, "--no_such_flag") == (2, "", "")


def test_the_default_run_folder_has_script_and_time_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = r"runs/multitask-finetune-\d{8}-\d{6}"
    flags = ["--option", "finetune"]
    assert re.fullmatch(name, str(multitask_classifier.parse_args(flags).run_dir))
    assert multitask_classifier.parse_args([*flags, "--run_dir", "x"]).run_dir == Path("x")


# ---------------------------------------------------------------------------- exit codes


def script_that_raises(error: BaseException | None) -> SimpleNamespace:
    def main(argv):
        print("result")
        if error is not None:
            raise error

    return SimpleNamespace(__name__="script", main=main)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (UserError("x.csv: no\nsuch file"), 2, "script.py: error: x.csv: no\\nsuch file\n"),
        (AlreadyFinished("run: has finished"), 0, "script.py: run: has finished\n"),
        (TrainingDiverged("loss is nan"), 1, "script.py: error: loss is nan\n"),
        (OutOfMemory("too large"), 1, "script.py: error: too large\n"),
        (PeerProcessDied("gone"), 1, "script.py: error: gone\n"),
        (OSError(28, "No space left", "a/b"), 2, "script.py: error: a/b: No space left\n"),
        (OSError(28, "No space left"), 2, "script.py: error: No space left\n"),
        (OSError("no such thing"), 2, "script.py: error: no such thing\n"),
        (KeyboardInterrupt(), 130, "interrupted; --resume continues a run that had begun\n"),
        (KeyboardInterrupt("stopped"), 130, "stopped\n"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", repr(value))[:30],
)
def test_each_error_has_its_exit_code_and_one_line(run_script, error, code, line):
    assert run_script(script_that_raises(error)) == (code, "result\n", line)


def test_a_programming_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run_script(lambda argv: 1 / 0)


@pytest.mark.parametrize("lines", [1, 10_000])
def test_a_reader_of_the_output_that_leaves_ends_the_script_quietly(lines):
    """As `| head` does: whether the output is lost at once, or at the end of the process."""
    code = "from engine.cli import run_script; run_script(lambda _: print('x\\n' * {}))"
    script = subprocess.Popen(
        [sys.executable, "-c", code.format(lines)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    script.stdout.close()
    assert script.communicate()[1] == b""
    assert script.returncode == 141


def test_a_terminal_without_unicode_gets_escapes(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit):
        cli.run_script(script_that_raises(UserError("café.csv")).main)
    sys.stderr.flush()
    assert written.getvalue() == b"script.py: error: caf\\xe9.csv\n"


# ---------------------------------------------------------------------------- messages


@given(st.text())
def test_a_message_is_one_line_of_bounded_length_that_prints(text):
    message = str(UserError(text))
    assert message.isprintable()
    if len(text) <= 1000 and text.isprintable():
        assert message == text
    assert len(str(UserError(text * 10_000))) < 11_000


def read_with(error: BaseException) -> str:
    with pytest.raises(UserError) as caught, reading(Path("x.json"), "a JSON object"):
        raise error
    assert str(caught.value).startswith("x.json: ")
    return str(caught.value)


def test_whatever_a_parser_raises_becomes_a_line_about_the_file():
    damaged = "x.json: damaged or not a JSON object ({}): fetch it again"
    assert read_with(ValueError("bad\n  value")) == damaged.format("bad value")
    for error in (KeyError("a"), TypeError("a"), struct_error := AssertionError("a")):
        assert "damaged or not a JSON object" in read_with(error)
    assert struct_error.args == ("a",)
    for kind in (RecursionError, MemoryError, OverflowError, EOFError):
        assert read_with(kind()) == damaged.format(kind.__name__)
    assert "no such file; expected a JSON object" in read_with(FileNotFoundError(2, "No", "y"))
    assert "cannot be read (Permission denied)" in read_with(PermissionError(13, os.strerror(13)))
    with pytest.raises(UserError, match="as it is"), reading(Path("x"), "a file"):
        raise UserError("as it is")
    with pytest.raises(KeyboardInterrupt), reading(Path("x"), "a file"):
        raise KeyboardInterrupt

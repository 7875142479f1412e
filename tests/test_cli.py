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
import mlm
import multitask_classifier
import simcse
from engine import cli
from engine.distributed import PeerProcessDied
from engine.errors import AlreadyFinished, OutOfMemory, TrainingDiverged, UserError, reading

ROOT = Path(__file__).resolve().parent.parent


bounds = st.tuples(st.integers(-5, 5), st.integers(1, 9) | st.just(math.inf))


@given(bounds, st.booleans(), st.booleans(), st.sampled_from([int, float]), st.data())
def test_a_number_is_accepted_exactly_if_it_is_in_range(limits, above, below, kind, data):
    low, high = limits[0], limits[0] + limits[1]
    near = st.sampled_from([low, high, low - 1, low + 1])
    value = data.draw(st.integers() | near if kind is int else st.floats() | near)
    inside = (low < value if above else low <= value) and value < math.inf
    inside &= value < high if below else value <= high
    parse = cli.number(kind, low, high, above=above, below=below)
    if inside:
        assert parse(str(value)) == value
    else:
        with pytest.raises(argparse.ArgumentTypeError):
            parse(str(value))


def make_parser(script) -> cli.ArgumentParser:
    """The argument parser that its `parse_args` makes."""
    parsers = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        stop = lambda parser, *_: sys.exit(parsers.append(parser))  # noqa: E731
        patch.setattr(cli.ArgumentParser, "parse_args", stop)
        script.parse_args([])
    return parsers[0]


SCRIPTS = [classifier, multitask_classifier, simcse, mlm, evaluation, experiments.__main__]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_help_text_and_a_place_in_a_short_group(script):
    parsers = [make_parser(script)]
    for action in parsers[0]._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    for parser in parsers:
        assert parser.description and all(action.help for action in parser._actions)
        assert all(len(group._group_actions) <= 10 for group in parser._action_groups)
        assert re.search(r"\(default: (None|False)\)", parser.format_help()) is None


def test_the_default_run_folder_has_script_and_time_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = r"runs/multitask-finetune-\d{8}-\d{6}"
    flags = ["--option", "finetune"]
    assert re.fullmatch(name, str(multitask_classifier.parse_args(flags).run_dir))
    assert multitask_classifier.parse_args([*flags, "--run_dir", "x"]).run_dir == Path("x")


def test_resume_takes_the_run_that_began_last_whatever_its_name_says(tmp_path, monkeypatch):
    """The time in the name is local: zones differ, and clocks are put back."""
    monkeypatch.chdir(tmp_path)
    for age, hour in enumerate(("02", "03", "01")):
        config = tmp_path / f"runs/multitask-finetune-20260101-{hour}0000/config.json"
        config.parent.mkdir(parents=True)
        config.write_text("{}")
        os.utime(config, (1e9 - age, 1e9 - age))
    flags = ["--option", "finetune", "--resume"]
    latest = tmp_path / "runs/multitask-finetune-20260101-020000"
    assert multitask_classifier.parse_args(flags).run_dir.absolute() == latest
    (latest / "result.json").touch()  # finished
    assert multitask_classifier.parse_args(flags).run_dir.name.endswith("030000")


def script_that_raises(error):
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
        (TrainingDiverged("loss is nan"), 3, "script.py: error: loss is nan\n"),
        (OutOfMemory("too large"), 1, "script.py: error: too large\n"),
        (PeerProcessDied("gone"), 1, "script.py: error: gone\n"),
        (OSError(28, "No space left", "a/b"), 2, "script.py: error: a/b: No space left\n"),
        (OSError("no such thing"), 2, "script.py: error: no such thing\n"),
        (KeyboardInterrupt(), 130, "interrupted; --resume continues a run that had begun\n"),
        (KeyboardInterrupt("stopped"), 130, "stopped\n"),
    ],
)
def test_each_error_has_its_exit_code_and_one_line(run_script, error, code, line):
    assert run_script(script_that_raises(error)) == (code, "result\n", line)


def test_a_programming_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run_script(lambda argv: 1 / 0)


@pytest.mark.parametrize("lines", [1, 10_000])
def test_a_reader_of_the_output_that_leaves_ends_the_script_quietly(lines):
    """As `| head` does: whether the output is lost at once, or at the end of the process."""
    code = f"from engine.cli import run_script; run_script(lambda _: print('x\\n' * {lines}))"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    script = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, **pipes)
    script.stdout.close()
    assert script.communicate()[1] == b""
    assert script.returncode == 141


@pytest.mark.parametrize(
    ("redirection", "code", "error"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("2> /dev/full", 2, ""),
        ("> /dev/full", 2, "standard output or error: No space left on device"),
    ],
)
def test_a_standard_stream_may_be_closed_or_full(redirection, code, error):
    script = "import sys; from engine.cli import run_script; sys.argv = ['a.py']\n"
    script += "run_script(lambda _: (print('x'), print('note', file=sys.stderr)))"
    command = ["bash", "-c", f'"$0" -c "$1" {redirection}', sys.executable, script]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, error in process.stderr) == (code, True)
    assert "Traceback" not in process.stderr and "Exception" not in process.stderr


def test_a_script_works_without_docstrings():
    command = [sys.executable, "-OO", "data/download.py", "--help"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    assert cli.ArgumentParser(None).format_help()  # what `__doc__` then is


def test_a_terminal_without_unicode_gets_escapes(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit):
        cli.run_script(script_that_raises(UserError("café.csv")).main)
    sys.stderr.flush()
    assert written.getvalue() == b"script.py: error: caf\\xe9.csv\n"


@given(st.text())
def test_a_message_is_one_line_of_bounded_length_that_prints(text):
    message = str(UserError(text + "\ud800"))
    assert message.isprintable() and message.endswith("\\ud800")
    if len(text) < 1000 and text.isprintable():
        assert message == text + "\\ud800"
    assert len(str(UserError(text * 10_000))) < 11_000


DAMAGED = "x.json: damaged or not a JSON object ({}): fetch it again"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("bad\n  value"), DAMAGED.format("bad value")),
        (RecursionError(), DAMAGED.format("RecursionError")),
        (FileNotFoundError(2, "No", "y"), "x.json: no such file; expected a JSON object"),
        (PermissionError(13, "denied"), "x.json: cannot be read (denied); expected a JSON object"),
        (UserError("as it is"), "as it is"),
    ],
)
def test_whatever_a_parser_raises_becomes_a_line_about_the_file(error, message):
    with pytest.raises(UserError) as caught, reading(Path("x.json"), "a JSON object"):
        raise error
    assert str(caught.value) == message
    with pytest.raises(KeyboardInterrupt), reading(Path("x"), "a file"):  # is Ctrl-C, no damage
        raise KeyboardInterrupt

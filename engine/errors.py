"""Errors that a user can act on: one line that says what was found, where, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something the user can fix; scripts print it without a traceback and exit with `exit_code`.

    Characters that do not print are escaped, so the message stays one line and cannot send control
    sequences to a terminal, whatever file contents it quotes. Very long messages are shortened.
    """

    exit_code = 2

    def __init__(self, message: str):
        if len(message) > 1000:  # a parser may quote the whole of a damaged file
            message = f"{message[:700]} ... {message[-300:]}"
        # Printable characters as they are, a tab as \t, an escape sequence as \x1b[...
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class AlreadyFinished(UserError):
    """The run is complete; there is nothing left to do."""

    exit_code = 0  # so that a script that resumes all its runs can go on


class TrainingDiverged(UserError):
    """A loss, gradient, weight or score is not finite."""

    exit_code = 3  # not 1, Python's own for a crash: a sweep records a divergence as a result


class OutOfMemory(UserError):
    """A batch did not fit into memory."""

    exit_code = 1


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a parser raises on a damaged file into one UserError that names the file.

    kind: what the file should be, with its article, such as "a JSON object".
    """
    # Parsers fail in too many ways to list; the user only needs to know which file it is.
    try:
        yield
    except UserError:  # already says more
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected {kind}") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason}); expected {kind}") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: damaged or not {kind} ({reason}): fetch it again") from None

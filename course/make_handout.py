"""Write the assignment into a new folder: this project without the solutions, and grade.py.

    python course/make_handout.py OUT

In the source, the lines from `# SOLUTION: HINT` to `# END SOLUTION` become
`raise NotImplementedError("HINT")`. Without a hint they are left out, such as code that
bypasses an exercise.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.checkpoint import atomic_folder, read_text
from engine.cli import ArgumentParser, run_script
from engine.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
# The files that a student gets, if git tracks them; markers work only in these.
PROJECT = (
    *(":(glob)*.py", "engine", "hub", "report", "data", "setup.sh"),
    *(":(glob)requirements*.txt", "LICENSE", ".gitignore"),
)
COURSE = {  # file or folder of course/ -> its name in the handout
    "assignment.md": "README.md",
    "grade.py": "grade.py",
    "checks.py": "checks.py",
    "references": "references",
}
MARKER = re.compile(r"( *)# (END )?SOLUTION(?:: (.+))?\n")


def remove_solutions(text: str, path: Path) -> str:
    """The source without the lines between markers; UserError for a marker without its partner."""
    kept: list[str] = []
    start = 0  # the line of the open marker
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        marker = MARKER.fullmatch(line)
        if marker is None:
            if re.search(r"#.*\bsolution\b", line, re.IGNORECASE):
                raise UserError(f"{path}, line {number}: {line.strip()!r} is not a marker")
            kept += [] if start else [line]
            continue
        indent, end, hint = marker.groups()
        if bool(end) != bool(start):
            raise UserError(f"{path}, line {number}: {line.strip()!r} has no partner")
        start = 0 if end else number
        if hint:
            error = f"{indent}raise NotImplementedError({json.dumps(hint)})"
            if len(error) > 100:
                error = error.replace("(", f"(\n{indent}    ", 1)[:-1] + f"\n{indent})"
            kept.append(error + "\n")
    if start:
        raise UserError(f"{path}, line {start}: `# SOLUTION` without `# END SOLUTION`")
    return "".join(kept)


def tracked_files() -> list[str]:
    """The files of `PROJECT` that git tracks, relative to the repository's folder."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--", *PROJECT]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip()
        raise UserError(f"{ROOT}: git cannot list its files ({reason}): use a clone") from None
    return listed.split("\0")[:-1]


def write_handout(folder: Path) -> None:
    """Fill an empty folder."""
    for name in tracked_files():
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
        if source.suffix == ".py":
            target.write_text(remove_solutions(read_text(source), source), encoding="utf-8")
    for name, new_name in COURSE.items():
        copy = shutil.copytree if (ROOT / "course" / name).is_dir() else shutil.copy
        copy(ROOT / "course" / name, folder / new_name)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the handout, whole or not at all."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("out", type=Path, help="new folder for the students' project")
    out: Path = parser.parse_args(argv).out
    if out.exists():
        raise UserError(f"{out}: exists and is not overwritten; name a new folder")
    with atomic_folder(out) as draft:
        write_handout(draft)
    print(f"{out}: ready to hand out; `python grade.py` in it gives 0 points")


if __name__ == "__main__":
    run_script(main)

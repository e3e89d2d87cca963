#!/usr/bin/env bash
# Make .venv: a Python 3.12+ environment with this project and its requirements. A second call takes seconds.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*" >&2; }
fail() { say "setup: $*"; exit 1; }

# Print the first interpreter that is new enough; PYTHON names an interpreter explicitly.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.12 python3 python3.13 python3.14; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python 3.12 or newer found (Megatron-Core 0.19 needs it).
  Debian 13, Ubuntu 24.04: apt install python3 python3-venv     pyenv: pyenv install 3.12
  Elsewhere: install one and name it, as in  make setup PYTHON=/opt/python3.12/bin/python3"
}

wanted=$(cat setup.py pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1)
stamp=.venv/.installed
if [ -x .venv/bin/lrpath ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi

if [ ! -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  python=$(find_python)
  say "setup: making .venv with $("$python" --version)"
  "$python" -m venv --clear .venv || fail "$python cannot make virtual environments (Debian, Ubuntu: apt install python3-venv)"
fi

say "setup: installing megatron-lrpath and what it needs (about 6 GB on disk with torch; minutes, once)"
# Modules are compiled here: if PYTHONDONTWRITEBYTECODE is set, as in many containers, each start would compile
# torch and Megatron again.
pip=(.venv/bin/python -m pip --disable-pip-version-check --quiet)
if "${pip[@]}" install uv >/dev/null 2>&1; then
  install=(.venv/bin/python -m uv pip install --quiet --compile-bytecode --python .venv/bin/python)
else
  install=("${pip[@]}" install)
fi
"${install[@]}" --constraint constraints.txt --editable '.[test]' ||
  fail "the packages could not be installed; the lines above say why (is the package registry in reach, is the disk full?)"
.venv/bin/lrpath --version >/dev/null || fail "the command lrpath does not start; remove .venv and call make setup again"
.venv/bin/python -m compileall -q megatron_lrpath tools
printf '%s' "$wanted" > "$stamp"
say "setup: done. Commands are in .venv/bin, as in  .venv/bin/lrpath --help"

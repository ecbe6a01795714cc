#!/usr/bin/env bash
# Create or update a virtual environment from the pinned requirements: setup.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
python=${PYTHON:-python3}
say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

SECONDS=0
if [ ! -x "$venv/bin/python" ]; then
    command -v "$python" >/dev/null ||
        fail "'$python' was not found. Install Python 3.11 or newer, or name one: make setup PYTHON=/path/to/python3.11"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "'$python' is $("$python" -V 2>&1); Python 3.11 or newer is needed. Name one: make setup PYTHON=python3.11"
    say "creating $venv with $("$python" -V)"
    "$python" -m venv "$venv"
fi

count=$(cat requirements/cpu.txt requirements/dev.txt | grep -c ==)
say "installing $count pinned packages into $venv (about two minutes the first time)"
export PIP_DISABLE_PIP_VERSION_CHECK=1
# --no-deps: the files hold the whole closure but for packages that must stay out (see cpu.txt).
# Bytecode is compiled afterwards, on all cores, where pip would use one.
"$venv/bin/python" -m pip install -qq --no-deps --no-compile -r requirements/cpu.txt -r requirements/dev.txt
"$venv/bin/python" -m pip install -qq --no-deps --no-build-isolation -e .
say "packages installed after ${SECONDS} s; compiling them"
# Some packages carry templates and tests in other dialects that do not compile.
"$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" || true

"$venv/bin/python" -c 'import torch' 2>"$venv/torch-error.txt" || {
    tail -1 "$venv/torch-error.txt" >&2
    fail "torch does not load. cpu.txt needs torch's CPU build: point pip at the CPU wheels of the PyTorch project (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS), remove $venv and run make setup again"
}
say "ready after ${SECONDS} s"

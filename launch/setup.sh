#!/usr/bin/env bash
# Makes .venv anew from launch/locks/ACCEL.lock: with uv where it is, else with pip alone.
# usage: launch/setup.sh cpu|cuda|tpu PYTHON     (`make setup` calls it, and only when needed)
set -euo pipefail
cd "$(dirname "$0")/.."
accel=$1
python=$2
lock=launch/locks/$accel.lock

with_uv() {
    # uv reads none of pip's settings; the one that most often matters is handed on.
    if [ -n "${PIP_INDEX_URL:-}" ]; then
        export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"
    fi
    uv pip install --python .venv/bin/python --require-hashes --requirements "$lock" &&
        uv pip install --python .venv/bin/python --no-deps --no-build-isolation --editable .
}

with_pip() {
    [ -t 1 ] || set -- --quiet
    # Compiling all of it takes as long as installing it; Python compiles what is imported.
    "${pip[@]}" install "$@" --no-compile --require-hashes --requirement "$lock"
    "${pip[@]}" install "$@" --no-deps --no-build-isolation --editable .
}

echo "setup: .venv with $("$python" --version) from $lock (about a minute)"
rm -rf .venv
if "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv .venv
    pip=(.venv/bin/python -m pip)
else # Debian's Python without the package python3-venv
    "$python" -m venv --without-pip .venv
    pip=("$python" -m pip --python .venv/bin/python)
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1
if ! command -v uv >/dev/null; then
    with_pip
elif ! with_uv; then
    echo "setup: uv could not install it; trying pip" >&2
    with_pip
fi
# Last, so that an installation cut short is begun anew.
echo "$accel" >.venv/accel
echo "$python" >.venv/python
cp "$lock" .venv/installed.lock

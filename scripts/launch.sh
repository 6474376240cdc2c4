#!/usr/bin/env bash
# Calls the launcher with the Python of this repository; msrun_train.sh and msrun_generate.sh do so.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x "$root/.venv/bin/python" ] && PYTHON="$root/.venv/bin/python"
fi
# msrun starts the first `python` on the PATH: it must be the one beside msrun
PATH="$(dirname "$(command -v "$PYTHON")"):$PATH"
export PATH PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec python -m mistral_ms.launch "$@"

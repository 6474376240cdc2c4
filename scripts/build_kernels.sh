#!/usr/bin/env bash
# Builds the AscendC operators. --target npu: with CANN, for the NPU of this machine; --target twin:
# with g++, for CPUs. --help shows all flags.
set -euo pipefail
cd "$(dirname "$0")/.."
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
exec env PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-$python}" -m ascend_kernels.build "$@"

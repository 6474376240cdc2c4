#!/usr/bin/env bash
# Measures every kind of model against Hugging Face and prints the table of docs/alignment.md.
set -euo pipefail
case "${1:-}" in
  -h | --help) echo "usage: scripts/alignment_table.sh   (after make install; takes a few minutes)"; exit 0 ;;
esac
cd "$(dirname "$0")/.."
table=$(mktemp)
trap 'rm -f "$table"' EXIT
export GLOG_v="${GLOG_v:-3}"
ALIGNMENT_TABLE="$table" .venv/bin/python -m pytest -q tests/alignment -k every_kind >&2
cat "$table"

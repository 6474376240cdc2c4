#!/usr/bin/env bash
# Starts a run file by its name; the scripts that are named after run files call it.
set -euo pipefail
case "${1:-}" in
  "" | -h | --help)
    echo "usage: $0 NAME [KEY=VALUE...] FLAG... [-- ARGUMENT...]"
    echo "NAME is a file of configs/run; flags and arguments are those of scripts/msrun_train.sh;"
    echo "a KEY=VALUE in front stands before the arguments, so that they may change it."
    exit 0 ;;
esac
root=$(cd "$(dirname "$0")/.." && pwd)
config="$root/configs/run/$1.yaml"
shift
own=() flags=()
while [ $# -gt 0 ] && [[ "$1" == [!-]*=* ]]; do own+=("$1"); shift; done
while [ $# -gt 0 ] && [ "$1" != -- ]; do flags+=("$1"); shift; done
exec "$root/scripts/msrun_train.sh" --config "$config" "${flags[@]}" -- "${own[@]}" "${@:2}"

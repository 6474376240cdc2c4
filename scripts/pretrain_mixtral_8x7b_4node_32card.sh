#!/usr/bin/env bash
# Mixtral 8x7B on 4 machines with 8 cards each: run it on every machine with its own --node-rank.
set -euo pipefail
case "${1:-}" in
  "" | -h | --help)
    echo "usage: $0 --node-rank R --master A [more flags of scripts/msrun_train.sh]"
    exit 0 ;;
esac
root=$(cd "$(dirname "$0")/.." && pwd)
exec "$root/scripts/msrun_train.sh" --config "$root/configs/run/pretrain_mixtral_8x7b_32card.yaml" \
  --workers 8 --nodes 4 "$@"

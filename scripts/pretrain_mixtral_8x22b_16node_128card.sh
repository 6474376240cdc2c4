#!/usr/bin/env bash
# Pretrains Mixtral 8x22B on 16 machines with 8 cards each: run it on every machine with its own --node-rank.
exec "$(dirname "$0")/start_run.sh" pretrain_mixtral_8x22b_128card --workers 8 --nodes 16 "$@"

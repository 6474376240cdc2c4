#!/usr/bin/env bash
# Finetunes Mixtral 8x7B on 4 machines with 8 cards each: run it on every machine with its own --node-rank. The weights: -- init_from=CHECKPOINT
exec "$(dirname "$0")/start_run.sh" finetune_mixtral_8x7b_32card --workers 8 --nodes 4 "$@"

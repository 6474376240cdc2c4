#!/usr/bin/env bash
# Finetunes Mistral 7B on one machine with 8 cards; `train` recomputes in pipelines only. The weights: -- init_from=CHECKPOINT
exec "$(dirname "$0")/start_run.sh" finetune_mistral_7b_8card parallel.recompute=none --workers 8 "$@"

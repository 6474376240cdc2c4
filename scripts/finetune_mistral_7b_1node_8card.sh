#!/usr/bin/env bash
# Finetunes Mistral 7B on one machine with 8 cards. The weights: -- init_from=CHECKPOINT
exec "$(dirname "$0")/start_run.sh" finetune_mistral_7b_8card --workers 8 "$@"

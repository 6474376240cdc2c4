#!/usr/bin/env bash
# Finetunes any small checkpoint on the packaged text. The weights: -- init_from=CHECKPOINT
exec "$(dirname "$0")/start_run.sh" finetune_tiny --workers 1 "$@"

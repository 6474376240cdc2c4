#!/usr/bin/env bash
# Trains adapters of any small checkpoint on the packaged pairs of answers. Its path: -- init_from=CHECKPOINT
exec "$(dirname "$0")/start_run.sh" dpo_tiny --workers 1 "$@"

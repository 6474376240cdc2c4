#!/usr/bin/env bash
# Trains adapters of any small checkpoint on the packaged text. Its path: -- init_from=CHECKPOINT
exec "$(dirname "$0")/start_run.sh" lora_tiny --workers 1 "$@"

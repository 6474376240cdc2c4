#!/usr/bin/env bash
# Pretrains a tiny Mixtral on the packaged text for 200 epochs, in one process.
exec "$(dirname "$0")/start_run.sh" pretrain_mixtral_tiny_200ep --workers 1 "$@"

#!/usr/bin/env bash
# Pretrains Mistral 7B on one machine with 8 cards; `train` recomputes in pipelines only.
exec "$(dirname "$0")/start_run.sh" pretrain_mistral_7b_8card parallel.recompute=none --workers 8 "$@"

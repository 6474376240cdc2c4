#!/usr/bin/env bash
# Pretrains Mistral 7B on one machine with 8 cards.
exec "$(dirname "$0")/start_run.sh" pretrain_mistral_7b_8card --workers 8 "$@"

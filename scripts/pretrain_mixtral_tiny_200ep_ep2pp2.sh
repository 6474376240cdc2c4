#!/usr/bin/env bash
# The same training in four processes: two stages in which two ranks share the experts.
exec "$(dirname "$0")/start_run.sh" pretrain_mixtral_tiny_200ep_ep2pp2 --workers 4 "$@"

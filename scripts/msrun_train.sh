#!/usr/bin/env bash
# Trains a run file with several processes, on one machine or more. --help shows all flags.
exec "$(dirname "$0")/launch.sh" train "$@"

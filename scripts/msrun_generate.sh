#!/usr/bin/env bash
# Generates (or, with --align, compares) with several processes, on one machine or more; see --help.
exec "$(dirname "$0")/launch.sh" generate "$@"

#!/usr/bin/env bash
# Starts a command in several processes, with the arguments of MindFormers' msrun_launcher.sh or
# with named flags. --help shows both.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: msrun_launcher.sh COMMAND [WORKERS]
       msrun_launcher.sh COMMAND WORKERS PORT LOG_DIR JOIN CLUSTER_TIME_OUT
       msrun_launcher.sh COMMAND WORKERS LOCAL_WORKERS MASTER_ADDR MASTER_PORT NODE_RANK \
                         LOG_DIR JOIN CLUSTER_TIME_OUT
       msrun_launcher.sh COMMAND [--workers N] [--local-workers N] [--master-addr A]
                         [--master-port P] [--node-rank R] [--log-dir D] [--join True|False]
                         [--cluster-time-out SECONDS] [--print]

COMMAND is one argument: the script with its flags, such as
  "run_mindformer.py --config F --run_mode train", or "-m mistral_ms.mindformers.run --config F".
One worker runs without msrun. --print shows the command and starts nothing.
Defaults: 8 workers, all local, 127.0.0.1, port 8118, node 0, output/msrun_log, False, 7200.
TEXT
}

fail() {
  echo "error: $1" >&2
  usage >&2
  exit 2
}

[ $# -ge 1 ] || fail "no command"
case "$1" in -h | --help) usage; exit 0 ;; esac
command=$1
shift
workers=8 local_workers= master=127.0.0.1 port=8118 node=0 logs=output/msrun_log
join=False timeout=7200 print=
if [[ $# -gt 0 && "$1" == --* ]]; then
  while [ $# -gt 0 ]; do
    flag=$1
    if [ "$flag" = --print ]; then
      print=yes
      shift
      continue
    fi
    [ $# -ge 2 ] || fail "$flag needs a value"
    case "$flag" in
      --workers) workers=$2 ;;
      --local-workers) local_workers=$2 ;;
      --master-addr) master=$2 ;;
      --master-port) port=$2 ;;
      --node-rank) node=$2 ;;
      --log-dir) logs=$2 ;;
      --join) join=$2 ;;
      --cluster-time-out) timeout=$2 ;;
      *) fail "unknown flag $flag" ;;
    esac
    shift 2
  done
else
  case $# in
    0) ;;
    1) workers=$1 ;;
    5) workers=$1 port=$2 logs=$3 join=$4 timeout=$5 ;;
    8)
      workers=$1 local_workers=$2 master=$3 port=$4 node=$5
      logs=$6 join=$7 timeout=$8
      ;;
    *) fail "$(($# + 1)) arguments; there are 1, 2, 6 or 9" ;;
  esac
fi
local_workers=${local_workers:-$workers}
for number in "$workers" "$local_workers" "$port" "$node" "$timeout"; do
  [[ "$number" =~ ^[0-9]+$ ]] || fail "$number is no whole number"
done

root=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x "$root/.venv/bin/python" ] && PYTHON="$root/.venv/bin/python"
fi
PATH="$(dirname "$(command -v "$PYTHON")"):$PATH"
export PATH PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
read -r -a words <<<"$command"
# msrun takes a word that begins with a dash for a flag of its own, not for one of python
if [[ "$workers" -eq 1 || "${words[0]}" == -* ]]; then
  words=(python "${words[@]}")
fi
if [ "$workers" -ne 1 ]; then
  words=(msrun --bind_core=True "--worker_num=$workers" "--local_worker_num=$local_workers"
    "--master_addr=$master" "--master_port=$port" "--node_rank=$node" "--log_dir=$logs"
    "--join=$join" "--cluster_time_out=$timeout" "${words[@]}")
fi
if [ -n "$print" ]; then
  echo "${words[*]}"
  exit 0
fi
if [ "$workers" -ne 1 ] && [ "$node" -eq 0 ]; then
  # behind a port in use, workers wait for each other until the cluster time out
  answers='import socket, sys; socket.create_connection((sys.argv[1], sys.argv[2]), 2); sys.exit(3)'
  status=0
  python -c "$answers" "$master" "$port" >/dev/null 2>&1 || status=$?
  [ "$status" -ne 3 ] || fail "port $port of $master is in use: choose another, --master-port P"
fi
exec "${words[@]}"

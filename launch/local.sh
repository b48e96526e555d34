#!/usr/bin/env bash
# Usage: launch/local.sh RECIPE [section.field=value ...]
# Prepares (a no-op when that is done) and trains on the devices of this machine, one process each. Run it again after an
# interruption: it goes on. Exit codes: 0 finished, 75 saved and left (run it again), 1 failed, 2 misconfigured, 130 Ctrl-C.
#
#   NUM_PROCESSES=4 launch/local.sh recipes/eli5_distilgpt2.yaml
set -euo pipefail

if [[ $# -lt 1 || "$1" == -* ]]; then
  sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
here="$(cd "$(dirname "$0")/.." && pwd)"

# Number of processes: one per GPU, or one where there is none.
NUM_PROCESSES="${NUM_PROCESSES:-$(python -c 'import torch; print(max(1, torch.accelerator.device_count()))')}"
# The launcher passes these on to all processes; without this SIGUSR1 would kill it and leave them behind.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2}"

clm-dist prepare "$@"
WORLD_SIZE="$NUM_PROCESSES" clm-dist train "$@" --dry-run  # one message here rather than one for each process
if [[ "$NUM_PROCESSES" -eq 1 ]]; then
  exec clm-dist train "$@"
fi
# The launcher turns every exit code into 1; the processes write theirs to this file.
CLM_DIST_OUTCOME="$(mktemp)"
export CLM_DIST_OUTCOME
trap 'rm -f "$CLM_DIST_OUTCOME"' EXIT
# `accelerate launch` without the imports of Accelerate's other commands, which take a second or two.
accelerate-launch --config_file "$here/accelerate_configs/ddp.yaml" --num_processes "$NUM_PROCESSES" \
  -m clm_dist train "$@" &
launcher=$!
for name in TERM INT USR1 USR2; do
  # shellcheck disable=SC2064  # the pid of now
  trap "kill -$name $launcher 2>/dev/null || true" "$name"
done
code=1
while kill -0 "$launcher" 2>/dev/null; do
  if wait "$launcher"; then code=0; else code=$?; fi  # a signal ends the wait, not the launcher
done
read -r outcome < "$CLM_DIST_OUTCOME" || outcome="$code"
exit "$outcome"

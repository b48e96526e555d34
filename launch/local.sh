#!/usr/bin/env bash
# Usage: launch/local.sh RECIPE [section.field=value ...]
# Prepares (a no-op when that is done) and trains on the devices of this machine, one process each.
#
#   NUM_PROCESSES=4 launch/local.sh recipes/eli5_distilgpt2.yaml
set -euo pipefail

if [[ $# -lt 1 || "$1" == -* ]]; then
  sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
here="$(cd "$(dirname "$0")/.." && pwd)"

# Number of processes: one per GPU, or one where there is none.
NUM_PROCESSES="${NUM_PROCESSES:-$(python -c 'import torch; print(max(1, torch.accelerator.device_count()))')}"

clm-dist prepare "$@"
WORLD_SIZE="$NUM_PROCESSES" clm-dist train "$@" --dry-run  # one message here rather than one for each process
if [[ "$NUM_PROCESSES" -eq 1 ]]; then
  exec clm-dist train "$@"
fi
exec accelerate launch --config_file "$here/accelerate_configs/ddp.yaml" --num_processes "$NUM_PROCESSES" \
  -m clm_dist train "$@"

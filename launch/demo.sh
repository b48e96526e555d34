#!/usr/bin/env bash
# Usage: make demo     (or bash launch/demo.sh in an environment that has clm-dist)
# Shows every command as it runs, so that you can type it yourself.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

run() {
  printf '\n$'
  printf ' %q' "$@"
  printf '\n'
  "$@"
}

# accelerate-launch is `accelerate launch` without the imports of Accelerate's other commands: a second or two less.
run clm-dist prepare recipes/demo.yaml
run accelerate-launch --config_file accelerate_configs/ddp.yaml -m clm_dist train recipes/demo.yaml --overwrite
run clm-dist evaluate recipes/demo.yaml
run clm-dist generate runs/demo/model --prompt "Your immune system"
run clm-dist report runs/demo

cat <<'END'

What lies where:
  prepared/demo/              the sample as blocks of token ids, its tokenizer and manifest
  runs/demo/model/            the trained model, for transformers.pipeline("text-generation", model="runs/demo/model")
  runs/demo/model_best/       the same at its best evaluation
  runs/demo/metrics.jsonl     every figure of the run
  runs/demo/report.html       curves, samples, configuration, versions: open it in a browser
To type the commands yourself: source .venv/bin/activate
END

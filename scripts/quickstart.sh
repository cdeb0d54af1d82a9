#!/usr/bin/env bash
# Installs everything into .venv (a few minutes the first time), then runs the main job: GRPO with router replay on a
# built-in mixture-of-experts model, with Ray, SGLang, Megatron-core and W&B, on two CPU cores or on a GPU.
#
#   scripts/quickstart.sh                          the default run
#   scripts/quickstart.sh run.steps=10             any config key, as of `python -m r3.train`
#   R3_PYTHON=/path/to/python scripts/quickstart.sh    an environment of your own; nothing is installed
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

cd "$REPO"
exec "$PYTHON" -m r3.train --config grpo_qwen3moe.yaml "$@"

#!/usr/bin/env bash
# Runs a command on a GPU host from this source tree, without an installer or a registry:
#
#   scripts/gpu_host.sh python3 -m r3.train --config grpo_qwen3moe_1gpu.yaml
#
#   R3_SITE=/folder      unpacked packages with an env.sh in it, put on PYTHONPATH (default: /tmp/r3site where it exists)
#   R3_CACHE=/folder     built-in models (default: ~/.cache/r3)
#
# Our entry points are looked up in metadata, so it writes those beside the tree first.
set -euo pipefail
REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
SITE="${R3_SITE:-/tmp/r3site}"
# shellcheck disable=SC1091
if [ -f "$SITE/env.sh" ]; then source "$SITE/env.sh"; fi

# Some ways of copying a tree lose symbolic links.
for name in rollout trainer configs; do
    if [ ! -d "$REPO/r3/$name" ]; then
        rm -f "$REPO/r3/$name"
        ln -s "../$name" "$REPO/r3/$name"
    fi
done

METADATA="$(mktemp -d "${TMPDIR:-/tmp}/r3-metadata-XXXXXX")"
python3 "$REPO/scripts/_dist_info.py" "$METADATA" >/dev/null
export PYTHONPATH="$REPO:$METADATA${PYTHONPATH:+:$PYTHONPATH}"
export RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1 WANDB_MODE="${WANDB_MODE:-offline}" TOKENIZERS_PARALLELISM=false
export PYTHONUNBUFFERED=1
cd "$REPO"
exec "$@"

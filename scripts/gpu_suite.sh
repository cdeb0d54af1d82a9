#!/usr/bin/env bash
# Everything that only a GPU can show, one line of outcome each; logs and tables under the output folder:
#
#   scripts/gpu_suite.sh OUT                          all steps
#   STEPS="model tests job1" scripts/gpu_suite.sh OUT only these
#   TIME_JOB1=300 scripts/gpu_suite.sh OUT            another limit, in seconds, of one step
#
# Steps: model (warm start) tests doctor job1 job2 replay mismatch. A failed step does not stop the others.
set -uo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
OUT="$(mkdir -p "${1:?usage: scripts/gpu_suite.sh OUT}" && cd "$1" && pwd)"
STEPS="${STEPS:-model tests doctor job1 job2 replay mismatch}"
PYTHON="${PYTHON:-python3}"
FAILED=0

# step NAME SECONDS COMMAND...: run it, keep its output, print one line
step() {
    local name="$1" limit="$2" begin code last
    shift 2
    case " $STEPS " in *" $name "*) ;; *) return ;; esac
    local own="TIME_${name^^}"
    limit="${!own:-$limit}"
    begin=$(date +%s)
    # The limit ends the whole tree: SGLang and Ray start processes of their own.
    timeout --kill-after=20 "$limit" "$HERE/gpu_host.sh" "$@" >"$OUT/$name.log" 2>&1 </dev/null
    code=$?
    last=$(grep -v '^[[:space:]]*$' "$OUT/$name.log" | tail -n 1 | cut -c1-160)
    [ "$code" = 0 ] || FAILED=1
    printf '%-9s %-7s %4ss  %s\n' "$name" "$([ "$code" = 0 ] && echo ok || echo "exit $code")" \
        "$(($(date +%s) - begin))" "$last"
}

gpus=$("$HERE/gpu_host.sh" "$PYTHON" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null || echo 0)
printf '%s GPU(s); output in %s\n' "$gpus" "$OUT"

step model 240 "$PYTHON" -c 'from r3.builtin import resolve_model as r; print(r("builtin:qwen3moe-1b", target_reward=0.35, seed=0))'
step tests 400 "$PYTHON" -m pytest -q -m gpu tests/gpu
step doctor 240 "$PYTHON" -m r3.doctor replay --config grpo_qwen3moe_1gpu.yaml trainer.gpus_per_process=1
step job1 420 "$PYTHON" scripts/bench/job.py --config grpo_qwen3moe_1gpu.yaml --dir "$OUT/run1" --out "$OUT/job.json" run.eval_every=0
if [ "$gpus" -ge 2 ]; then
    step job2 420 "$PYTHON" scripts/bench/job.py --config grpo_qwen3moe_2gpu.yaml --dir "$OUT/run2" --out "$OUT/job_2gpu.json" run.eval_every=0
fi
step replay 300 "$PYTHON" scripts/bench/replay.py --seconds "${REPLAY_SECONDS:-200}" --out "$OUT/replay.json"
step mismatch 400 "$PYTHON" scripts/bench/consistency.py --tokens "${TOKENS:-200000}" --out "$OUT/consistency.json" -- rollout.prompts_per_step=512
exit "$FAILED"

#!/usr/bin/env bash
# Everything that only a GPU can show, one line of outcome each; logs and tables under the output folder:
#
#   scripts/gpu_suite.sh OUT                                          every step that the GPUs here are enough for
#   STEPS="model tests job1" scripts/gpu_suite.sh OUT                 only these
#   scripts/gpu_suite.sh OUT 0=model,replay 1=queue1 2,3=queue2       side by side: each lane its GPUs and its steps
#   TIME_JOB1=300 scripts/gpu_suite.sh OUT                            another limit, in seconds, of one step
#
# A failed step does not stop the others. A table goes to OUT/STEP.json, what a step prints to OUT/STEP.log.
set -uo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
OUT="$(mkdir -p "${1:?usage: scripts/gpu_suite.sh OUT [GPUS=STEP,STEP ...]}" && cd "$1" && pwd)"
shift
ALL="model tests doctor job1 job2 job4 replay replay_large mismatch gather capture1 capture2 capture4 queue1 queue2 queue4 equality"
STEPS="${STEPS:-$ALL}"
PYTHON="${PYTHON:-python3}"

# run NAME SECONDS GPUS COMMAND...: run it where there are so many GPUs, keep its output, print one line
run() {
    local name="$1" limit="$2" needed="$3" begin code last own="TIME_${1^^}"
    shift 3
    if [ "$(gpus)" -lt "$needed" ]; then
        printf '%-12s skipped       needs %s GPUs\n' "$name" "$needed"
        return 0
    fi
    limit="${!own:-$limit}"
    begin=$(date +%s)
    # The limit ends the whole tree: SGLang and Ray start processes of their own.
    timeout --kill-after=20 "$limit" "$HERE/gpu_host.sh" "$@" >"$OUT/$name.log" 2>&1 </dev/null
    code=$?
    last=$(grep -v '^[[:space:]]*$' "$OUT/$name.log" | tail -n 1 | cut -c1-160)
    printf '%-12s %-7s %4ss  %s\n' "$name" "$([ "$code" = 0 ] && echo ok || echo "exit $code")" \
        "$(($(date +%s) - begin))" "$last"
    [ "$code" = 0 ]
}

# Prints how many GPUs a step sees: those of its lane, as far as they are there.
gpus() {
    local found mine
    found=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        mine=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
        if [ "$mine" -lt "$found" ]; then found=$mine; fi
    fi
    echo "$found"
}

job() { # GPUS
    run "job$1" 420 "$1" "$PYTHON" scripts/bench/job.py --config "grpo_qwen3moe_$1gpu.yaml" --dir "$OUT/run$1" \
        --out "$OUT/job$1.json" run.eval_every=0
}

capture() { # NAME TP SECONDS LOADS...
    local name="$1" ranks="$2" limit="$3"
    shift 3
    run "$name" "$limit" "$ranks" "$PYTHON" scripts/bench/capture.py --tp "$ranks" --mixed 384 "$@" \
        --target "$OUT/$name.json"
}

replay() { # NAME TRAJECTORIES-OF-A-MICROBATCH
    run "$1" 300 1 "$PYTHON" scripts/bench/replay.py --rounds 1000 --micro-batch-size "$2" \
        --seconds "${REPLAY_SECONDS:-200}" --profile 3 --out "$OUT/$1.json"
}

step() {
    case "$1" in
    model) run model 240 0 "$PYTHON" -c \
        'from r3.builtin import resolve_model as r; print(r("builtin:qwen3moe-1b", target_reward=0.35, seed=0))' ;;
    tests) run tests 600 1 "$PYTHON" -m pytest -q -m gpu tests/gpu ;;
    doctor) run doctor 240 1 "$PYTHON" -m r3.doctor replay --config grpo_qwen3moe_1gpu.yaml \
        trainer.gpus_per_process=1 ;;
    job1 | job2 | job4) job "${1#job}" ;;
    replay) replay replay 32 ;;
    replay_large) replay replay_large 64 ;;
    mismatch) run mismatch 500 1 "$PYTHON" scripts/bench/consistency.py --tokens "${TOKENS:-200000}" \
        --dense builtin:qwen3-1b --out "$OUT/mismatch.json" -- rollout.prompts_per_step=512 ;;
    gather) run gather 180 2 "$PYTHON" scripts/bench/gather.py --target "$OUT/gather.json" ;;
    capture1 | capture2 | capture4) capture "$1" "${1#capture}" 700 --load batch=300 --load one=150 ;;
    queue1 | queue2 | queue4) capture "$1" "${1#queue}" 900 --pairs 5 --load mixed=800 ;;
    equality) capture equality 1 400 --load tee=200 ;;
    *) printf '%s: no such step; there are %s\n' "$1" "$ALL" >&2; return 2 ;;
    esac
}

lane() {
    local failed=0 name
    for name in "$@"; do step "$name" || failed=1; done
    return "$failed"
}

printf '%s GPU(s); output in %s\n' "$(gpus)" "$OUT"
if [ $# = 0 ]; then
    # shellcheck disable=SC2086
    lane $STEPS
    exit
fi
for one in "$@"; do
    case "$one" in *=*) ;; *) printf '%s: a lane is GPUS=STEP,STEP, such as 0,1=job2\n' "$one" >&2; exit 2 ;; esac
    # shellcheck disable=SC2046
    (export CUDA_VISIBLE_DEVICES="${one%%=*}"; lane $(tr , ' ' <<<"${one#*=}")) &
done
failed=0
for _ in "$@"; do wait -n || failed=1; done
exit "$failed"

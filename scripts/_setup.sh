# Sourced by quickstart.sh and test.sh: prepares an environment that can run R3 and sets PYTHON to its interpreter.
#
#   R3_PYTHON=/path/to/python   use this interpreter as it is; nothing is installed
#   R3_VENV=/path/to/folder     where the environment lives (default: .venv in the repository)
#
# Safe to run again: a stamp in the environment holds a hash of everything that the installation depends on, and an
# environment whose stamp agrees is left alone.

TORCH_VERSION=2.13.0
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
NEEDED_DISK_KB=$((5 * 1024 * 1024))

say() { printf '[setup] %s\n' "$*" >&2; }
die() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }

has_cuda() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }

# Prints the newest-tested interpreter that R3 supports and that can make an environment with pip in it.
find_python() {
    local name
    for name in python3.11 python3.12 python3; do
        if "$name" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
            >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
    die "no Python 3.11 or 3.12 with venv and pip on PATH. Install one (Debian/Ubuntu: apt install python3.11-venv;" \
        "or: uv python install 3.11) or name an interpreter that has everything installed: R3_PYTHON=/path/to/python"
}

check_disk() {
    local free_kb
    free_kb=$(df -Pk "$1" | awk 'NR == 2 { print $4 }')
    if [ "$free_kb" -lt "$NEEDED_DISK_KB" ]; then
        die "$1 has $((free_kb / 1024)) MiB free; the installation needs 5 GiB. Free some, or put the environment" \
            "elsewhere: R3_VENV=/path/on/a/larger/disk"
    fi
}

pip_install() {
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@" || die "pip could not install: $*
  If it says that it cannot connect, this machine has no network, or needs its package index named:
  set PIP_INDEX_URL (or PIP_FIND_LINKS to a folder of wheels) and run this again; finished parts are not repeated."
}

# Prints "cpu" or "cuda": what a plain `pip install torch` would bring here, asked of pip without installing.
torch_build_from_pip() {
    local report
    report=$("$PYTHON" -m pip install --quiet --disable-pip-version-check --dry-run --no-deps --report - \
        "torch==$TORCH_VERSION") || return 1
    printf '%s' "$report" | "$PYTHON" -c '
import json, re, sys
metadata = json.load(sys.stdin)["install"][0]["metadata"]
cuda = any(re.match(r"(nvidia|cuda|triton)", name) for name in metadata.get("requires_dist", []))
print("cpu" if metadata["version"].endswith("+cpu") or not cuda or sys.platform != "linux" else "cuda")'
}

install_torch_cpu() {
    if "$PYTHON" -c "import sys, importlib.metadata as m; sys.exit(m.version('torch').split('+')[0] != '$TORCH_VERSION')" \
        2>/dev/null; then
        return
    fi
    local build
    build=$(torch_build_from_pip) || die "pip finds no torch $TORCH_VERSION for $("$PYTHON" -V). No network, or an index" \
        "without it: set PIP_INDEX_URL, or PIP_FIND_LINKS to a folder that holds the wheel."
    if [ "$build" = cpu ]; then
        say "torch $TORCH_VERSION (the CPU build that pip is configured for)"
        pip_install "torch==$TORCH_VERSION"
    else
        say "torch $TORCH_VERSION+cpu from $TORCH_CPU_INDEX (the default index would bring the CUDA libraries)"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check "torch==$TORCH_VERSION+cpu" \
            --extra-index-url "$TORCH_CPU_INDEX" ||
            die "no CPU build of torch $TORCH_VERSION for $("$PYTHON" -V) could be fetched from $TORCH_CPU_INDEX." \
                "Put its wheel in a folder and set PIP_FIND_LINKS to that folder."
    fi
}

install_cpu() {
    install_torch_cpu
    say "SGLang, Megatron-core, Ray, W&B and tools"
    pip_install -r "$REPO/scripts/requirements-cpu.txt"
    pip_install --no-deps -r "$REPO/scripts/requirements-cpu-nodeps.txt"
    pip_install --no-deps --no-build-isolation --editable "$REPO"
}

install_cuda() {
    say "R3 with the CUDA builds of SGLang and torch, Megatron-core, Ray, W&B and tools"
    pip_install --editable "$REPO[sglang,http,megatron,dashboard,tasks,plot,browser,dev]"
}

# A hash of the recipe and of where it is applied: an environment that was moved, or whose recipe changed, is refreshed.
recipe_hash() {
    { sed '/^\[tool\./,$d' "$REPO/pyproject.toml"; cat "$REPO"/scripts/requirements-cpu*.txt "$REPO/scripts/_setup.sh"
      printf '%s\n' "$REPO" "$1" "$2"; } | sha256sum | cut -d ' ' -f 1
}

setup() {
    REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
    if [ -n "${R3_PYTHON:-}" ]; then
        PYTHON=$R3_PYTHON
        "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' ||
            die "R3_PYTHON=$PYTHON is not a working Python 3.11 or 3.12"
        say "using $PYTHON as it is"
        return
    fi

    local venv=${R3_VENV:-$REPO/.venv} base kind hash started=$SECONDS
    base=$(find_python) || exit 1
    if has_cuda; then kind=cuda; else kind=cpu; fi
    hash=$(recipe_hash "$venv" "$kind $("$base" -V)")
    PYTHON=$venv/bin/python
    if [ -x "$PYTHON" ] && [ "$(cat "$venv/.r3-installed" 2>/dev/null)" = "$hash" ]; then
        return
    fi

    say "installing into $venv ($("$base" -V), $kind; a few minutes the first time)"
    mkdir -p "$venv"
    check_disk "$venv"
    rm -f "$venv/.r3-installed"
    # --clear: pip leaves packages of another Python or recipe behind, which then win or lose by accident.
    "$base" -m venv --clear "$venv"
    if [ "$kind" = cuda ]; then install_cuda; else install_cpu; fi
    printf '%s\n' "$hash" >"$venv/.r3-installed"
    say "installed in $((SECONDS - started)) s"
}

setup

#!/usr/bin/env bash
# One entry point: makes .venv, makes the data, trains. `./run.sh help` lists what it can do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
TASKS="gpt maskgit 4m flow vlm"
PY=.venv/bin/python

usage() {
    cat <<'EOF'
./run.sh [4m] [--field=value ...]            set up, make the data, train nano4M: the main job; on a CPU without
                                             arguments every family trains longer than its record
./run.sh gpt|maskgit|4m|flow|vlm [--...]     the same for one model family
./run.sh all [--...]                         every family whose script is here
./run.sh test [pytest arguments]             set up, then the tests
./run.sh help                                this text
Arguments go to the training script: --seed=1, --track=cpu|gpu, --save=true, any field of its Config.
EOF
}

die() { echo "run.sh: $*" >&2; exit 1; }

setup() {
    if ! { [ -x $PY ] && $PY -c 'import pip'; } 2>/dev/null; then
        command -v python3 >/dev/null || die "python3 not found: install Python 3.10 or newer"
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            die "Python 3.10 or newer is needed, and python3 is $(python3 -V)"
        python3 -c 'import venv, ensurepip' 2>/dev/null ||
            die "python3 has no venv module: install it (on Debian and Ubuntu: apt install python3-venv)"
        python3 -m venv .venv
    fi
    local want  # the installed state we ask for: the pins and the Python they were installed for
    want=$($PY -c 'import hashlib, sys
print(hashlib.sha256(open("requirements.txt", "rb").read()).hexdigest(), *sys.version_info[:2])')
    if [ "$(cat .venv/installed 2>/dev/null)" = "$want" ]; then return; fi
    echo "installing requirements.txt into .venv: a few minutes, once"
    local torch; torch=$(grep '^torch==' requirements.txt)
    # PyPI's Linux build of torch brings gigabytes of CUDA libraries: without an NVIDIA GPU try the CPU build first.
    if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
        $PY -m pip install -q --timeout 5 --retries 0 --extra-index-url https://download.pytorch.org/whl/cpu \
            "$torch+cpu" || echo "no CPU build of torch within reach: taking the one on PyPI"
    fi
    $PY -m pip install -q -r requirements.txt
    echo "$want" > .venv/installed
}

prepare() {  # prepare TASK TRACK [--field=value ...]: the data a script trains on
    local task=$1 track=$2 data="" arg; shift 2
    for arg in "$@"; do case $arg in --data=*) data=${arg#--data=};; esac; done
    case "$task $data" in
        "4m ") if [ "$track" = gpu ]; then set -- scenes --size=128 --num=200000; else set -- scenes; fi;;
        "gpt ") if [ "$track" = gpu ]; then set -- fineweb; else set -- shakespeare; fi;;
        "maskgit text") set -- shakespeare;;
        "flow ") if [ "$track" = gpu ]; then set -- scenes --objects --size=128; else set -- scenes --objects; fi;;
        "vlm ") if [ "$track" = gpu ]; then set -- scenes --qa --num=200000; else set -- scenes --qa; fi;;
        "gpt scenes"|"maskgit ") set -- scenes --objects;;
        *) set -- "$data";;
    esac
    if [ -f "data/$1.py" ]; then $PY -u "data/$1.py" "${@:2}"; fi  # any other data is the user's own
}

train() {  # train TASK [--field=value ...]
    local task=$1 gpus track=cpu arg; shift
    gpus=$($PY -c 'import torch; print(torch.cuda.device_count())')
    if [ "$gpus" -gt 0 ]; then track=gpu; fi
    for arg in "$@"; do case $arg in --track=*) track=${arg#--track=};; esac; done
    # A record stops where the baseline did, before its samples are worth a look: the main job trains on.
    case "$task $track $#" in
        "4m cpu 0") set -- --num_steps=800 --eval_every=200;;
        "gpt cpu 0") set -- --depth=4 --dim=192 --orders=3 --window=128 --context=128 --batch=16 --num_steps=500 --eval_every=100;;
        "maskgit cpu 0") set -- --num_steps=1500 --eval_every=300;;
        "flow cpu 0") set -- --num_steps=3000 --eval_every=500;;
        "vlm cpu 0") set -- --num_steps=800 --eval_every=200;;
    esac
    prepare "$task" "$track" "$@"
    if [ "$track" = gpu ] && [ "$gpus" -gt 0 ]; then
        $PY -m torch.distributed.run --standalone --nproc_per_node="$gpus" "train_$task.py" "$@"
    else
        $PY -u "train_$task.py" "$@"
    fi
    echo "samples: $(echo samples/"$task"*.*), log: $(ls -t logs/*.txt | head -n 1), weights: checkpoints/ (--save=true)"
}

here=""
for t in $TASKS; do if [ -f "train_$t.py" ]; then here="$here $t"; fi; done

command=4m
case ${1:-} in -h|--help) command=help;; ""|--*) ;; *) command=$1; shift;; esac
case $command in
    help) usage;;
    test) setup; exec $PY -m pytest -q tests "$@";;
    all) [ -n "$here" ] || die "no training script is here yet"
        setup; for t in $here; do train "$t" "$@"; done;;
    gpt|maskgit|4m|flow|vlm)
        [ -f "train_$command.py" ] || die "train_$command.py is not here yet; there is:${here:- none}"
        setup; train "$command" "$@";;
    *) echo "run.sh: unknown task '$command'" >&2; usage >&2; exit 2;;
esac

#!/usr/bin/env bash
# One entry point: makes .venv, makes the data, trains. `./run.sh help` lists what it can do.
# What SLURM reads of it (`sbatch run.sh slurm 4m`; options before run.sh overrule these):
#SBATCH --job-name=nano4M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ "${1:-}" = slurm ]; then cd "${SLURM_SUBMIT_DIR:-.}"; fi  # sbatch runs a copy of this file in its spool folder
TASKS="gpt maskgit 4m flow vlm"
PY=.venv/bin/python

usage() {
    cat <<'EOF'
./run.sh [4m] [--field=value ...]            set up, make the data, train nano4M: the main job; on a CPU without
                                             arguments the run that races, a few minutes
./run.sh gpt|maskgit|4m|flow|vlm [--...]     the same for one model family
./run.sh all [--...]                         every family whose script is here
./run.sh nodes HOST:PORT COUNT TASK [--...]  one run on COUNT machines: the same command on each, HOST is one of them
sbatch run.sh slurm TASK [--...]             that as a SLURM job, which queues itself again when its time is over
./run.sh test [pytest arguments]             set up, then the tests
./run.sh help                                this text
Arguments go to the training script: --seed=1, --track=cpu|gpu, --save=true, any field of its Config.
EOF
}

die() { echo "run.sh: $*" >&2; exit 1; }

have() { [ -f "train_$1.py" ] || die "train_$1.py is not here yet; there is:${here:- none}"; }

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
    # a set is named by its folder as well: of data/mnist/train, where that is not there, the script is data/mnist.py
    if [ ! -d "$data" ]; then data=${data#data/}; data=${data%/train}; fi
    case "$task $data" in
        "4m ") case $track in
            gpu*) set -- scenes --size=128;;
            course) return;;
            cpu-rich|cpu-audio|cpu-fine) $PY -u data/scenes.py; $PY -u data/scenes.py "--${track#cpu-}"; set -- join scenes64 "${track#cpu-}64";;
            *) set -- scenes;;
        esac;;
        "gpt ") case $track in gpu*) set -- fineweb;; cpu-code) set -- pycode;; *) set -- shakespeare;; esac;;
        "maskgit text") set -- shakespeare;;
        "flow "|"maskgit ") case $track in
            gpu*) set -- scenes --objects --size=128;;
            cpu-mnist) set -- mnist;;
            *) set -- scenes --objects;;
        esac;;
        "vlm ") if [[ $track = gpu* ]]; then set -- scenes --qa --num=200000; else set -- scenes --qa; fi;;
        "gpt scenes") set -- scenes --objects;;
        *" mnist14") set -- mnist;;
        *) set -- "$data";;
    esac
    if [ -f "data/$1.py" ]; then $PY -u "data/$1.py" "${@:2}"; fi  # any other data is the user's own
}

look() {  # look [--field=value ...]: sets gpus, how many are here, and track
    local arg
    gpus=$($PY -c 'import torch; print(torch.cuda.device_count())')
    if [ "$gpus" -gt 0 ]; then track=gpu; else track=cpu; fi
    for arg in "$@"; do case $arg in --track=*) track=${arg#--track=};; esac; done
}

even() {  # even MACHINES TASK [--field=value ...]: no more gpus than can share the batch evenly
    local all=$gpus
    if [ "$gpus" -lt 2 ]; then return; fi
    gpus=$($PY -c 'import importlib, sys
machines, gpus, script = int(sys.argv[1]), int(sys.argv[2]), importlib.import_module(sys.argv[3])
batch = script.read_options(sys.argv[4:])[0].batch
print(max((n for n in range(1, gpus + 1) if batch % (n * machines) == 0), default=gpus))' \
        "$1" "$gpus" "train_$2" "${@:3}" 2>/dev/null) || gpus=$all  # the script says what is wrong
    if [ "$gpus" -lt "$all" ]; then echo "run.sh: $gpus of $all GPUs here, which share the batch evenly"; fi
}

train() {  # train TASK [--field=value ...]
    local task=$1 gpus track; shift
    look "$@"
    # fewer scenes than a record is judged by, for a first look
    if [ "$task $track $#" = "4m cpu 0" ]; then set -- --quality_scenes=200; fi
    prepare "$task" "$track" "$@"
    even 1 "$task" "$@"
    echo "training: train_$task.py $*"
    if [[ $track != cpu ]] && [ "$gpus" -gt 0 ]; then
        $PY -m torch.distributed.run --standalone --nproc_per_node="$gpus" --shutdown_timeout=120 "train_$task.py" "$@"
    else
        $PY -u "train_$task.py" "$@"
    fi
    echo "samples: $(echo samples/"$task"*.*), log: $(ls -t logs/*.txt | head -n 1), weights: checkpoints/ (--save=true)"
}

nodes() {  # nodes HOST:PORT COUNT TASK [--field=value ...]: this machine's part of a run on COUNT machines
    [[ ${1:-} =~ ^([^:]+):([0-9]+)$ ]] ||
        die "nodes needs HOST:PORT first, where the machines meet, such as 10.0.0.1:29500, not '${1:-}'"
    local host=${BASH_REMATCH[1]} port=${BASH_REMATCH[2]} gpus track way options
    [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "nodes needs COUNT, the number of machines, after HOST:PORT, not '${2:-}'"
    [ -n "${3:-}" ] || die "nodes needs a TASK after HOST:PORT and COUNT; there is:${here:- none}"
    have "$3"
    local count=$2 task=$3; shift 3
    mkdir -p logs  # where machines share this folder, one makes environment and data there, and the others wait
    exec 9> logs/setup.lock
    if command -v flock >/dev/null; then flock 9 || true; fi
    setup
    look "$@"
    prepare "$task" "$track" "$@"
    even "$count" "$task" "$@"
    exec 9>&-
    # torchrun announces a machine by its host name, which others may not know, and compares host names to see which
    # one is HOST. The way there tells both for sure: this end of it has an address, and is HOST's own on HOST alone.
    way=$($PY -c 'import ipaddress, socket, sys
family, kind, _, _, there = socket.getaddrinfo(sys.argv[1], 9, type=socket.SOCK_DGRAM)[0]
probe = socket.socket(family, kind)
probe.connect(there)  # sends nothing
mine = probe.getsockname()[0]
print("here" if mine == there[0] or ipaddress.ip_address(mine).is_loopback else mine)' "$host" 2>/dev/null) ||
        die "there is no way from this machine to a host '$host'"
    if [ "$way" = here ]; then options="--rdzv_endpoint=localhost:$port --local_addr=$host --rdzv_conf="
    else options="--rdzv_endpoint=$host:$port --local_addr=$way --rdzv_conf=is_host=false,"; fi
    echo "run.sh: $task on $count machines, this one with $gpus GPUs; waiting for all of them at $host:$port"
    # exec: a signal to stop has to reach torchrun, and no shell may end before it does
    exec $PY -m torch.distributed.run --nnodes="$count" --nproc_per_node="$((gpus > 0 ? gpus : 1))" \
        --rdzv_backend=c10d --rdzv_id="modded-nano4M-$task" ${options}join_timeout=1800,read_timeout=1800 \
        --shutdown_timeout=120 "train_$task.py" "$@"
}

slurm() {  # slurm TASK [--field=value ...]: the job that sbatch starts, on its first machine
    [ -n "${SLURM_JOB_ID:-}" ] || die "slurm is for a SLURM job: sbatch run.sh slurm TASK [--field=value ...]"
    [ -n "${1:-}" ] || die "slurm needs a TASK; there is:${here:- none}"
    have "$1"
    local task=$1 seed=0 head arg state latest began=checkpoints/slurm-$SLURM_JOB_ID; shift
    read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST") || die "scontrol names no machine of this job"
    for arg in "$@"; do case $arg in --seed=*) seed=${arg#--seed=};; esac; done
    if [ -f "$began" ]; then  # a job keeps its id in the queue: the newest state since it first began is its own
        latest=$began
        for state in checkpoints/*-"$task"-*-"$seed".state.pt; do
            if [ "$state" -nt "$latest" ]; then latest=$state; fi
        done
        if [ "$latest" != "$began" ]; then set -- "$@" --resume="$latest"; fi
    else
        mkdir -p checkpoints; touch "$began"
    fi
    # --cpu-bind: a machine's one task is all its processes, and SLURM may bind a task to a single core
    if srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpu-bind=none \
        ./run.sh nodes "$head:29500" "$SLURM_NNODES" "$task" "$@"; then rm "$began"; return; fi
    # Preempted jobs are queued again by SLURM, those out of time are not; --signal stops them up to 4 minutes before.
    case $(squeue -h -j "$SLURM_JOB_ID" -o %L) in
        [0-4]:??) echo "run.sh: out of time, back into the queue"; scontrol requeue "$SLURM_JOB_ID";;
        *) die "the run failed before its time was over";;
    esac
}

here=""
for t in $TASKS; do if [ -f "train_$t.py" ]; then here="$here $t"; fi; done

command=4m
case ${1:-} in -h|--help) command=help;; ""|--*) ;; *) command=$1; shift;; esac
case $command in
    help) usage;;
    test) setup; exec $PY -m pytest -q tests -n auto --maxprocesses=4 --dist=loadfile "$@";;  # torch has one thread there
    nodes|slurm) "$command" "$@";;
    all) [ -n "$here" ] || die "no training script is here yet"
        setup; for t in $here; do train "$t" "$@"; done;;
    gpt|maskgit|4m|flow|vlm)
        have "$command"; setup; train "$command" "$@";;
    *) echo "run.sh: unknown task '$command'" >&2; usage >&2; exit 2;;
esac

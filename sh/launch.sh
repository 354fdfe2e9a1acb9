# Sourced by every launcher. Only this file deals with Python, GPUs and the memory allocator. It does not change the
# directory, so that relative paths in flags refer to the user's.
root=$(CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# positionals COUNT "$@": with fewer arguments, print the launcher's usage line and exit.
positionals() {
  if (($# <= $1)); then
    sed -n 's/^# Usage/usage/p' "$0" >&2
    exit 2
  fi
}

# stop MESSAGE: report a user error and exit with code 2.
stop() {
  echo "error: $1" >&2
  exit 2
}

# refuse FLAG ADVICE "$@": report a flag that the user gives but that this launcher sets itself.
refuse() {
  local flag=$1 advice=$2 word; shift 2
  for word in "$@"; do
    if [[ $word == "$flag" || $word == "$flag="* ]]; then stop "this launcher sets $flag: $advice"; fi
  done
}

# install [PACKAGE …]: install requirements.txt and the packages into the virtual environment, unless PYTHON is set or
# all are installed.
install() {
  if [[ -n ${PYTHON:-} ]]; then return; fi
  environment
  local missing; missing=$(cat "$root/requirements.txt" <(printf '%s\n' "$@") | grep -v '^$' |
    grep -vxFf <(echo '#'; cat "$root/.venv/installed" 2>/dev/null) || true)   # old macOS: no empty list of patterns
  if [[ -n $missing ]]; then
    echo "installing into $root/.venv (PyTorch is large: this takes a minute or more)"
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
      -r "$root/requirements.txt" "$@"
    # Compile what the scripts import, not all. -I: also where Python is told to write no compiled files, and without the
    # modules of the user's folder.
    "$root/.venv/bin/python" -I -c "import av, kornia, matplotlib.pyplot, optuna, pandas, \
torch._dynamo, torchvision.models, wandb"
    echo "$missing" >> "$root/.venv/installed"
  fi
}

# Make a virtual environment with a working Python and pip; make it again if an earlier attempt stopped half-way.
environment() {
  local python=$root/.venv/bin/python
  recent "$python" || { recent python3 && python3 -m venv --clear --without-pip "$root/.venv"; } ||
    stop "$root/.venv needs Python 3.10 or later: install it (on Debian and Ubuntu the packages python3 and \
python3-venv), or give PYTHON=/path/to/python"
  "$python" -c 'import pip' 2>/dev/null && return
  rm -f "$root/.venv/installed"   # the system's Python has another version now, and none of these packages
  "$python" -m ensurepip >/dev/null 2>&1 ||
    stop "$root/.venv has no pip: on Debian and Ubuntu install the package python3-venv, elsewhere Python's ensurepip"
}

recent() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

find_python() {
  if [[ -n ${PYTHON:-} ]]; then echo "$PYTHON"
  elif [[ -x $root/.venv/bin/python ]]; then echo "$root/.venv/bin/python"
  else echo python3; fi
}

# given NUMBERS: translate positions in a scheduler's CUDA_VISIBLE_DEVICES to its entries: numbers or names (GPU-…,
# MIG-…).
given() {
  local place found=() names=()
  IFS=, read -ra names <<< "${CUDA_VISIBLE_DEVICES// /}"
  for place in ${1//,/ }; do
    [[ -n ${names[place]:-} ]] ||
      stop "there is no GPU $place: CUDA_VISIBLE_DEVICES='$CUDA_VISIBLE_DEVICES' gives ${#names[@]}, counted from 0"
    found+=("${names[place]}")
  done
  (IFS=,; echo "${found[*]}")
}

# launch GPU PROGRAM [FLAG …]: replace this shell by a script, or a module such as distill_utils.evaluate, on a GPU.
# GPU is a number; cpu or -1 for the CPU; mps for Apple's GPU; xpu for Intel's. A list such as 0,1,2,3 starts one
# process per GPU with torchrun; cpu*2 starts two processes on the CPU. If CUDA_VISIBLE_DEVICES is set, the numbers are
# positions in its list.
launch() {
  local gpu=$1 program=("$root/$2"); shift 2
  if [[ ${program[0]} != *.py && ! -d ${program[0]} ]]; then program=(-m "${program[0]#"$root/"}"); fi
  local device=cuda processes=1
  if [[ $gpu =~ ^(cpu|-1)(\*([1-9][0-9]{0,2}))?$ ]]; then
    device=cpu gpu='' processes=${BASH_REMATCH[3]:-1}
  elif [[ $gpu =~ ^(0|[1-9][0-9]{0,3})(,(0|[1-9][0-9]{0,3}))*$ && -z $(tr , '\n' <<< "$gpu" | sort | uniq -d) ]]; then
    processes=$(($(tr , '\n' <<< "$gpu" | wc -l)))
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then gpu=$(given "$gpu"); fi
  elif [[ $gpu == mps || $gpu == xpu ]]; then
    device=$gpu gpu=''
  else
    stop "GPU must be a number, a list such as 0,1, cpu, -1, cpu*2, mps or xpu, not '$gpu'"
  fi
  if ((processes > 1)); then program=(-m distill_utils.torchrun --nproc_per_node "$processes" "${program[@]}"); fi
  # Activations of hundreds of megabytes are allocated and freed often. Without these settings glibc returns them to the
  # system each time, and page faults double the time of a step on a CPU. (glibc before 2.35 refuses a high
  # MALLOC_MMAP_THRESHOLD_.)
  export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
  export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-8589934592}
  export CUDA_VISIBLE_DEVICES=$gpu
  become "${program[@]}" --device "$device" "$@"
}

# module NAME [ARGUMENT …]: run a module that needs no GPU.
module() {
  python -m "$@"
}

python() {
  (become "$@")
}

# become ARGUMENT …: replace this shell by Python, so that a signal to a launcher of one run ends the run.
# Our modules come before the user's: a utils.py in the user's directory must not be imported (PYTHONSAFEPATH; before
# Python 3.11 distill_utils/__init__.py does this).
become() {
  local found; found=$(find_python)
  if [[ -z ${PYTHON:-} ]]; then
    "$found" -c 'import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, sys.argv[1:])))' \
      torch torchvision numpy pandas PIL av kornia matplotlib tqdm wandb optuna ||
      stop "$found lacks packages of requirements.txt: bash sh/quickstart.sh installs them into $root/.venv, or give \
PYTHON=/path/to/python"
  fi
  export PYTHONSAFEPATH=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
  exec "$found" "$@"
}

# Sourced by every launcher: the one place that knows about Python, GPUs and the allocator. It does not change the folder, so that
# relative paths in flags are the user's.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# positionals COUNT "$@": without as many arguments, print the launcher's own usage line and stop.
positionals() {
  if (($# <= $1)); then
    sed -n 's/^# Usage/usage/p' "$0" >&2
    exit 2
  fi
}

# stop SENTENCE: what the user is to mend, exit code 2.
stop() {
  echo "error: $1" >&2
  exit 2
}

# install [PACKAGE …]: the virtual environment with what requirements.txt names; nothing to do where PYTHON is given or all is there.
install() {
  if [[ -n ${PYTHON:-} ]]; then return; fi
  environment
  local missing; missing=$(cat "$root/requirements.txt" <(printf '%s\n' "$@") | grep -v '^$' | grep -vxFf <(cat "$root/.venv/installed" 2>/dev/null) || true)
  if [[ -n $missing ]]; then
    echo "installing into $root/.venv (PyTorch is large: a minute or more)"
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt" "$@"
    echo "$missing" >> "$root/.venv/installed"
  fi
}

# The virtual environment with a Python that runs and has pip, made anew where an attempt to make it stopped half-way.
environment() {
  local python=$root/.venv/bin/python
  recent "$python" || { recent python3 && python3 -m venv --clear --without-pip "$root/.venv"; } ||
    stop "$root/.venv needs Python 3.10 or later: install it (on Debian and Ubuntu the packages python3 and python3-venv), or give PYTHON=/path/to/python"
  "$python" -c 'import pip' 2>/dev/null || "$python" -m ensurepip >/dev/null 2>&1 ||
    stop "$root/.venv gets no pip: on Debian and Ubuntu install the package python3-venv, elsewhere Python's ensurepip"
}

recent() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

find_python() {
  if [[ -n ${PYTHON:-} ]]; then echo "$PYTHON"
  elif [[ -x $root/.venv/bin/python ]]; then echo "$root/.venv/bin/python"
  else echo python3; fi
}

# given NUMBERS: those of a scheduler's GPUs, in CUDA_VISIBLE_DEVICES, that have these places in its list, by number or name (GPU-…, MIG-…).
given() {
  local place found=() names=()
  IFS=, read -ra names <<< "${CUDA_VISIBLE_DEVICES// /}"
  for place in ${1//,/ }; do
    [[ -n ${names[place]:-} ]] || stop "there is no GPU $place: CUDA_VISIBLE_DEVICES='$CUDA_VISIBLE_DEVICES' gives ${#names[@]}, counted from 0"
    found+=("${names[place]}")
  done
  (IFS=,; echo "${found[*]}")
}

# launch GPU PROGRAM [FLAG …]: run a script, or a module such as distill_utils.evaluate, on that GPU; cpu or -1 is the CPU, mps Apple's GPU, xpu Intel's.
# A list such as 0,1,2,3 starts a process for each GPU by torchrun, cpu*2 two processes on the CPU. Where CUDA_VISIBLE_DEVICES is set, numbers are places in its list.
launch() {
  local gpu=$1 program=("$root/$2"); shift 2
  if [[ ${program[0]} != *.py ]]; then program=(-m "${program[0]#"$root/"}"); fi
  local device=cuda processes=1
  if [[ $gpu =~ ^(cpu|-1)(\*([1-9][0-9]{0,2}))?$ ]]; then
    device=cpu gpu='' processes=${BASH_REMATCH[3]:-1}
  elif [[ $gpu =~ ^(0|[1-9][0-9]{0,3})(,(0|[1-9][0-9]{0,3}))*$ && -z $(tr , '\n' <<< "$gpu" | sort | uniq -d) ]]; then
    processes=$(($(tr , '\n' <<< "$gpu" | wc -l)))
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then gpu=$(given "$gpu"); fi
  elif [[ $gpu == mps || $gpu == xpu ]]; then
    device=$gpu gpu=''
  else
    stop "GPU is a number, a list such as 0,1, cpu, -1, cpu*2, mps or xpu, not '$gpu'"
  fi
  if ((processes > 1)); then program=(-m distill_utils.torchrun --nproc_per_node "$processes" "${program[@]}"); fi
  # Activations come and go by the hundred megabytes: without these glibc gives them back to the system and faults them in again, which
  # doubles the time of a step on a CPU.
  export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4294967296} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-8589934592}
  CUDA_VISIBLE_DEVICES=$gpu python "${program[@]}" --device "$device" "$@"
}

# module NAME [ARGUMENT …]: run a module that needs no GPU.
module() {
  python -m "$@"
}

# Ours are found before the user's: a utils.py in the user's folder is not ours (PYTHONSAFEPATH; before Python 3.11 distill_utils/__init__.py).
python() {
  local found; found=$(find_python)
  if [[ -z ${PYTHON:-} && ! -e $root/.venv/installed ]]; then
    "$found" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))' ||
      stop "there is no PyTorch for $found: bash sh/quickstart.sh installs all into $root/.venv, or give PYTHON=/path/to/python"
  fi
  PYTHONSAFEPATH=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$found" "$@"
}

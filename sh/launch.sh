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

# install [PACKAGE …]: the virtual environment with what requirements.txt names; nothing to do where PYTHON is given or all is there.
install() {
  if [[ -n ${PYTHON:-} ]]; then return; fi
  local missing; missing=$(cat "$root/requirements.txt" <(printf '%s\n' "$@") | grep -v '^$' | grep -vxFf <(cat "$root/.venv/installed" 2>/dev/null) || true)
  if [[ -n $missing ]]; then
    echo "installing into $root/.venv (PyTorch is large: a minute or more)"
    [[ -x $root/.venv/bin/python ]] || python3 -m venv "$root/.venv"
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt" "$@"
    echo "$missing" >> "$root/.venv/installed"
  fi
}

find_python() {
  if [[ -n ${PYTHON:-} ]]; then echo "$PYTHON"
  elif [[ -x $root/.venv/bin/python ]]; then echo "$root/.venv/bin/python"
  else echo python3; fi
}

# launch GPU PROGRAM [FLAG …]: run a script, or a module such as distill_utils.evaluate, on that GPU; cpu or -1 is the CPU, mps Apple's GPU, xpu Intel's.
# A list such as 0,1,2,3 starts a process for each GPU by torchrun, cpu*2 two processes on the CPU.
launch() {
  local gpu=$1 program=("$root/$2"); shift 2
  if [[ ${program[0]} != *.py ]]; then program=(-m "${program[0]#"$root/"}"); fi
  local device=cuda processes=1
  if [[ $gpu =~ ^(cpu|-1)(\*([1-9][0-9]{0,2}))?$ ]]; then
    device=cpu gpu='' processes=${BASH_REMATCH[3]:-1}
  elif [[ $gpu =~ ^(0|[1-9][0-9]*)(,(0|[1-9][0-9]*))*$ && -z $(tr , '\n' <<< "$gpu" | sort | uniq -d) ]]; then
    processes=$(tr , '\n' <<< "$gpu" | wc -l)
  elif [[ $gpu == mps || $gpu == xpu ]]; then
    device=$gpu gpu=''
  else
    echo "error: GPU is a number, a list such as 0,1, cpu, -1, cpu*2, mps or xpu, not '$gpu'" >&2; exit 2
  fi
  if ((processes > 1)); then
    program=(-m distill_utils.torchrun --nproc_per_node "$processes" "${program[@]}")
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + processes - 1) / processes))}
  fi
  # Activations come and go by the hundred megabytes: without these glibc gives them back to the system and faults them in again, which
  # doubles the time of a step on a CPU.
  export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4294967296} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-8589934592}
  CUDA_VISIBLE_DEVICES=$gpu python "${program[@]}" --device "$device" "$@"
}

# module NAME [ARGUMENT …]: run a module that needs no GPU.
module() {
  python -m "$@"
}

# Ours are found before the user's: a utils.py in the user's folder is not ours (PYTHONSAFEPATH).
python() {
  PYTHONSAFEPATH=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$(find_python)" "$@"
}

#!/usr/bin/env bash
# Tests and benchmarks on a machine with an H100 or H200: torch >= 2.11 and triton >= 3.6, nothing
# else. Leaves JSON files, logs and summary.txt in OUT.
#
#   bench/gpu_session.sh OUT [WHEELS] [PART ...]
#
# WHEELS: folder of wheels (pytest and peers); each is installed on its own, without dependencies,
# and one that does not install is noted and left out. The CUDA operators are built here with nvcc, a
# C++ compiler and, among WHEELS, nvidia-cutlass, cmake, ninja and setuptools; without nvcc a library
# that was built elsewhere (kernels/flowrl_kernels/_C.abi3.so) is taken as it is.
# PART: build tests fp8 cuda sanitize aot cuda_code tune forward_7b forward_32b logprobs_7b loss_7b
# loss_32b loss_peaked balance; without any, all. Each part ends within 10 minutes.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
if [ $# -lt 1 ]; then
  sed -n '2,12p' "$0"
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
wheels=${2:-}
shift $(($# > 1 ? 2 : 1))
parts=("$@")
if [ ${#parts[@]} = 0 ]; then
  parts=(build tests fp8 cuda sanitize aot cuda_code tune forward_7b forward_32b logprobs_7b loss_7b
    loss_32b loss_peaked balance)
fi
python=${PYTHON:-python3}
cd "$root" || exit 1
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH="$root/kernels:$root:$root/tests:$root/tests/kernels:$site${PYTHONPATH:+:$PYTHONPATH}"
export PATH="$site/bin:$PATH"
unset TRITON_INTERPRET

note() { echo "$*" | tee -a "$out/summary.txt"; }

if ! "$python" -c 'import sys, torch, triton; sys.exit(not torch.cuda.is_available())'; then
  note "needs python with torch and triton and a CUDA GPU"
  exit 2
fi
if [ -n "$wheels" ]; then
  for wheel in "$wheels"/*.whl; do
    "$python" -m pip install -q --no-index --no-deps --target "$site" "$wheel" \
      >>"$out/install.log" 2>&1 || note "left out, does not install: $(basename "$wheel")"
  done
fi

run() { # part, command: at most 590 seconds, the log kept, the others go on
  local name=$1 start=$SECONDS
  shift
  timeout 590 "$@" >"$out/$name.log" 2>&1
  local status=$?
  note "$name: exit $status after $((SECONDS - start)) s"
  tail -n 40 "$out/$name.log" >>"$out/summary.txt"
}

bench() { # part, benchmark, options
  local name=$1
  shift
  run "$name" "$python" -m bench "$@" --json "$out/$name.json"
}

test_files() { # part, pytest options; under the program in $under, if any
  local name=$1
  shift
  if "$python" -c 'import pytest' 2>/dev/null; then
    # shellcheck disable=SC2086
    run "$name" ${under:-} "$python" -m pytest -q -c /dev/null --rootdir "$root" --noconftest \
      -p no:cacheprovider "$@"
  else
    note "$name: skipped, no pytest (put pytest, pluggy and iniconfig into WHEELS)"
  fi
}

has_cuda() { # part: whether the CUDA operators are built; a note if not
  "$python" -c 'from flowrl_kernels.cuda_support import build_problem; p = build_problem()
if p: raise SystemExit(f"cuda {p}")' >"$out/$1.log" 2>&1 && return
  note "$1: skipped, $(tail -n 1 "$out/$1.log")"
  return 1
}

for part in "${parts[@]}"; do
  case $part in
    build)
      if command -v nvcc >/dev/null; then
        FLOWRL_BUILD_NATIVE=1 run build "$python" setup.py build_ext --inplace
      else
        note "build: skipped, no nvcc"
      fi
      ;;
    cuda) has_cuda cuda && test_files cuda "$root"/tests/kernels/on_cuda_*.py ;;
    sanitize)
      if ! command -v compute-sanitizer >/dev/null; then
        note "sanitize: skipped, no compute-sanitizer"
      elif has_cuda sanitize; then
        under="compute-sanitizer --error-exitcode 9" test_files sanitize \
          "$root"/tests/kernels/on_cuda_*.py -k "error_budget and (65 or bound or 100)"
        under="compute-sanitizer --tool racecheck --error-exitcode 9" test_files racecheck \
          "$root"/tests/kernels/on_cuda_*.py -k "error_budget and (193-129 or bound1)"
      fi
      ;;
    tests) test_files tests "$root"/tests/kernels/on_triton_*.py ;;
    fp8) test_files fp8 "$root"/tests/kernels/on_triton_fp8.py -rA ;;
    aot) bench aot aot ;;
    cuda_code) has_cuda cuda_code && bench cuda_code cuda_code ;;
    tune) bench tune tune --shape qwen2.5-7b ;;
    forward_7b) bench forward_7b linear_logprobs --shape qwen2.5-7b --pass forward ;;
    forward_32b) bench forward_32b linear_logprobs --shape qwen2.5-32b --pass forward ;;
    logprobs_7b) bench logprobs_7b linear_logprobs --shape qwen2.5-7b ;;
    loss_7b) bench loss_7b policy_loss --shape qwen2.5-7b ;;
    loss_32b) bench loss_32b policy_loss --shape qwen2.5-32b ;;
    loss_peaked) bench loss_peaked policy_loss --shape qwen2.5-7b --inputs peaked ;;
    balance) bench balance trajectory_balance ;;
    *) note "no such part: $part" ;;
  esac
done
echo "results in $out"

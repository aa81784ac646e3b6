#!/usr/bin/env bash
# Tests and benchmarks on a machine with an H100 or H200: torch >= 2.11 and triton >= 3.6, nothing
# else. Leaves summary.txt and results.tgz (JSON files and logs) in OUT, the latter complete after
# each part; ends with the worst status of its parts.
#
#   bench/gpu_session.sh OUT [WHEELS] [PART ...]
#
# WHEELS: folder of wheels (pytest and peers); each is installed on its own, without dependencies,
# and one that does not install is noted and left out. The CUDA operators are built here with nvcc,
# a C++ compiler and, here or among WHEELS, nvidia-cutlass, cmake, ninja, setuptools >= 77; without
# nvcc or CUTLASS a library that was built elsewhere (kernels/flowrl_kernels/_C.abi3.so) is taken as
# it is.
# PART: build tests cuda tune forward_7b forward_7b_1024 forward_7b_9000 forward_32b logprobs_7b
# loss_7b loss_32b loss_peaked balance sanitize racecheck aot cuda_code; without any, all. Each
# process ends within PART_LIMIT_S (590); tests (5 files) and cuda (2) have one for each file.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
if [ $# -lt 1 ]; then
  sed -n '2,15p' "$0"
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
wheels=${2:-}
shift $(($# > 1 ? 2 : 1))
parts=("$@")
if [ ${#parts[@]} = 0 ]; then
  parts=(build tests cuda tune forward_7b forward_7b_1024 forward_7b_9000 forward_32b logprobs_7b
    loss_7b loss_32b loss_peaked balance sanitize racecheck aot cuda_code)
fi
python=${PYTHON:-python3}
cd "$root" || exit 1
site=$(mktemp -d) logs=$(mktemp -d) worst=0
trap 'rm -rf "$site" "$logs"' EXIT
export PYTHONPATH="$root/kernels:$root:$root/tests:$root/tests/kernels${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET TORCH_ALLOW_TF32_CUBLAS_OVERRIDE # float32 products in float32

note() { echo "$*" | tee -a "$out/summary.txt"; }

if ! "$python" -c 'import sys, torch, triton; sys.exit(not torch.cuda.is_available())'; then
  note "needs python with torch and triton and a CUDA GPU"
  exit 2
fi
if [ -n "$wheels" ]; then
  for wheel in "$wheels"/*.whl; do
    target="$site/$(basename "$wheel" .whl)" # one each: pip does not merge their bin/
    "$python" -m pip install -q --no-index --no-deps --target "$target" "$wheel" \
      >>"$logs/install.log" 2>&1 || note "left out, does not install: $(basename "$wheel")"
    export PYTHONPATH="$PYTHONPATH:$target" PATH="$target/bin:$PATH"
  done
fi

run() { # part, command: within the limit, its results kept at once, the others go on
  local name=$1 start=$SECONDS
  shift
  timeout -k 10 "${PART_LIMIT_S:-590}" "$@" >"$logs/$name.log" 2>&1
  local status=$?
  [ "$status" -le "$worst" ] || worst=$status
  note "$name: exit $status after $((SECONDS - start)) s"
  tail -n 40 "$logs/$name.log" >>"$out/summary.txt"
  tar -czf "$out/results.tgz" -C "$logs" .
}

bench() { # part, benchmark, options
  local name=$1
  shift
  run "$name" "$python" -m bench "$@" --json "$logs/$name.json"
}

test_files() { # part, pytest options; under the program in $under, if any
  local name=$1
  shift
  if "$python" -c 'import pytest' 2>/dev/null; then
    # shellcheck disable=SC2086
    run "$name" ${under:-} "$python" -m pytest -q -c /dev/null --rootdir "$root" --noconftest \
      -p no:cacheprovider --maxfail=10 -o faulthandler_timeout=120 "$@"
  else
    note "$name: skipped, no pytest (put pytest, pluggy, iniconfig and pygments into WHEELS)"
  fi
}

each_file() { # tests of this name, each file in a process of its own: after an error of a kernel
  # all that follows in its process fails
  for file in "$root"/tests/kernels/"$1"_*.py; do
    test_files "$(basename "$file" .py)" "$file"
  done
}

has_cuda() { # part: whether the CUDA operators are built; a note if not
  "$python" -c 'from flowrl_kernels.cuda_support import build_problem; p = build_problem()
if p: raise SystemExit(f"cuda {p}")' >"$logs/$1.log" 2>&1 && return
  note "$1: skipped, $(tail -n 1 "$logs/$1.log")"
  return 1
}

sanitize() { # part, tests, options of compute-sanitizer: this project's kernels alone, and without
  # torch's pool of memory, in which an access out of bounds hits a neighbour and is not seen
  local name=$1 tests=$2
  shift 2
  if ! command -v compute-sanitizer >/dev/null; then
    note "$name: skipped, no compute-sanitizer"
  elif has_cuda "$name"; then
    under="compute-sanitizer $* --kernel-name kns=flowrl --print-limit 20 --error-exitcode 9" \
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      test_files "$name" "$root"/tests/kernels/on_cuda_*.py -k "$tests"
  fi
}

for part in "${parts[@]}"; do
  case $part in
    build)
      if ! command -v nvcc >/dev/null; then
        note "build: skipped, no nvcc"
      elif ! "$python" -c 'import cutlass_library' 2>/dev/null; then
        note "build: skipped, no CUTLASS (put nvidia-cutlass into WHEELS)"
      else
        FLOWRL_BUILD_NATIVE=1 run build "$python" setup.py build_ext --inplace
      fi
      ;;
    cuda) has_cuda cuda && each_file on_cuda ;;
    # torch asks the driver for functions that it need not have: no errors of this project
    sanitize) sanitize sanitize "error_budget and (65 or bound or 100)" --report-api-errors no ;;
    racecheck) sanitize racecheck "error_budget and (193-129 or bound1)" --tool racecheck ;;
    tests) each_file on_triton ;;
    aot) bench aot aot ;;
    cuda_code) has_cuda cuda_code && bench cuda_code cuda_code ;;
    tune) bench tune tune --shape qwen2.5-7b ;;
    forward_7b) bench forward_7b linear_logprobs --shape qwen2.5-7b --pass forward ;;
    forward_7b_*) bench "$part" linear_logprobs --shape "${part##*_}x3584x152064" --pass forward ;;
    forward_32b) bench forward_32b linear_logprobs --shape qwen2.5-32b --pass forward ;;
    logprobs_7b) bench logprobs_7b linear_logprobs --shape qwen2.5-7b ;;
    loss_7b) bench loss_7b policy_loss --shape qwen2.5-7b ;;
    loss_32b) bench loss_32b policy_loss --shape qwen2.5-32b ;;
    loss_peaked) bench loss_peaked policy_loss --shape qwen2.5-7b --inputs peaked ;;
    balance) bench balance trajectory_balance ;;
    *) note "no such part: $part" && worst=2 ;;
  esac
done
echo "results in $out"
exit "$worst"

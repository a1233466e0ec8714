#!/usr/bin/env bash
# What this machine's GPU does with the CUDA kernels: builds, tests, measures, and writes all to DIR.
#   benchmarks/gpu_check.sh DIR [SECONDS]
# Needs nvcc and torch with CUDA; pytest, hypothesis and expecttest for the tests, pytest-benchmark
# for the benchmarks; no network. Ends after SECONDS, 530 if not given. What it could not do is in
# DIR/not_done.txt, and the exit code is 1 where a step failed.
set -uo pipefail
limit=${2:-530}  # seconds, of all steps
mkdir -p "${1:?usage: benchmarks/gpu_check.sh DIR [SECONDS]}"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
: > "$out/not_done.txt"
failed=0

not_done() { echo "$1" | tee -a "$out/not_done.txt"; }

# step SECONDS NAME COMMAND...: what it prints goes to NAME.log; a failure is noted, the rest goes on.
step() {
  local seconds=$1 name=$2 start=$SECONDS left=$((limit - SECONDS)) code
  shift 2
  if [ "$left" -lt 10 ]; then
    not_done "$name: no time left"
    return 1
  fi
  # interrupted, benchmarks write what they have
  timeout -s INT -k 10 "$((seconds < left ? seconds : left))" "$@" > "$out/$name.log" 2>&1
  code=$?
  if [ $code = 0 ]; then
    echo "ok      $name ($((SECONDS - start)) s)"
  else
    [ $code = 124 ] && what="out of time" || what=FAILED
    not_done "$name: $what after $((SECONDS - start)) s, see $name.log"
    failed=1
  fi
  return $code
}

# Python's modules that are not there
missing=$(python -c '
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
' torch triton pytest hypothesis expecttest pytest_benchmark xdist)
has() {
  local name
  for name in "$@"; do [[ " $missing " == *" $name "* ]] && return 1; done
  return 0
}

finish() {
  echo "not done, or failed:"
  sed 's/^/  /' "$out/not_done.txt"
  exit $failed
}

step 20 machine nvidia-smi
for tool in nvcc compute-sanitizer ncu nsys; do
  command -v $tool > /dev/null || not_done "no $tool"
done
for module in $missing; do not_done "no Python module $module"; done
capability=$(python -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))' \
  2> /dev/null) || {
  not_done "no GPU that torch sees: no build, no tests, no measurements"
  failed=1
  finish
}

# Only what this card runs, so that the build is short.
[ "$capability" = 9.0 ] && capability=9.0a
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}
step 200 build python -m pip install --no-build-isolation --no-deps . || {
  not_done "nothing after the build"
  finish
}
PATH=$(python -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH
step 30 doctor fused-preact doctor
if has pytest hypothesis expecttest; then
  # most of their time is Triton's compilers'
  parallel=
  has xdist && parallel="-n $(($(nproc) < 14 ? $(nproc) : 14))"
  tests=(python -m pytest -m gpu tests/gpu -q -rsf --durations=10)
  step 200 tests "${tests[@]}" -k "not warpgroups" $parallel
  # apart, since a barrier that is never passed would hang
  [ "$capability" = 9.0a ] && step 90 tests-warpgroups "${tests[@]}" -k warpgroups $parallel
  grep -h ^SKIPPED "$out"/tests*.log >> "$out/not_done.txt"
else
  not_done "tests: pytest, hypothesis or expecttest is missing"
fi
# what fused-preact bench runs, which would not pass on that its time is up
bench=(python -P -m pytest benchmarks --benchmark-only -q)
if has pytest pytest_benchmark; then
  step 150 steps "${bench[@]}" -k "(step- or attack-) and bfloat16" \
    --results "$out/steps.json"
  [ "$capability" = 9.0a ] && step 90 steps-warpgroups "${bench[@]}" --warpgroups \
    -k "(step- or attack-) and bfloat16" --results "$out/steps-warpgroups.json"
fi
for network in R-1001 R-200 WRN-28-10; do
  measure=(python benchmarks/predicted_and_measured.py "$network")
  step 60 "predictions-$network" "${measure[@]}" --results "$out/predictions-$network.md"
  [ "$capability" = 9.0a ] && step 60 "warpgroups-$network" "${measure[@]}" --warpgroups \
    --results "$out/warpgroups-$network.md"
done
if has pytest pytest_benchmark; then
  step 90 operators "${bench[@]}" -k operator- --results "$out/operators.json"
  step 90 units "${bench[@]}" -k unit- --results "$out/units.json"
  not_done "all shapes, dtypes and contenders: fused-preact bench --full takes longer than this check"
else
  not_done "benchmarks: pytest-benchmark is missing"
fi
finish

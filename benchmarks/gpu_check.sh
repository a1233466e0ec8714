#!/usr/bin/env bash
# What this machine's GPU does with the CUDA kernels: builds, tests, and writes everything to DIR.
#   benchmarks/gpu_check.sh DIR
# Needs nvcc, torch with CUDA, pytest, hypothesis and expecttest; no network. Ends in under 9 minutes.
set -uo pipefail
mkdir -p "${1:?usage: benchmarks/gpu_check.sh DIR}"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
: > "$out/not_done.txt"
failed=0

# step SECONDS NAME COMMAND...: what it prints goes to NAME.log; a failure is noted, the rest goes on.
step() {
  local seconds=$1 name=$2 start=$SECONDS
  shift 2
  if timeout "$seconds" "$@" > "$out/$name.log" 2>&1; then
    echo "ok      $name ($((SECONDS - start)) s)"
  else
    echo "FAILED  $name after $((SECONDS - start)) s, see $name.log" | tee -a "$out/not_done.txt"
    failed=1
    return 1
  fi
}

step 20 machine nvidia-smi
capability=$(python -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))' \
  2> /dev/null) || { echo "no GPU that torch sees" | tee -a "$out/not_done.txt"; exit 1; }
# Only what this card runs, so that the build is short.
[ "$capability" = 9.0 ] && capability=9.0a
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}
step 240 build pip install --no-build-isolation --no-deps . || exit 1
step 30 doctor fused-preact doctor
step 240 tests python -m pytest -m gpu tests/gpu -q -rsf --durations=10
grep -h ^SKIPPED "$out/tests.log" >> "$out/not_done.txt"
for tool in compute-sanitizer ncu nsys; do
  command -v $tool > /dev/null || echo "no $tool" >> "$out/not_done.txt"
done
echo "no benchmark of the CUDA kernels exists yet" >> "$out/not_done.txt"
echo "not done, or failed:"
sed 's/^/  /' "$out/not_done.txt"
exit $failed

#!/usr/bin/env bash
# A trial on one GPU in two calls of a few minutes each, also on a machine without access to a package registry.
#
#   benchmarks/gpu_trial.sh prepare       here: download packages that it may lack into .trial/wheels (about 15 MB)
#   benchmarks/gpu_trial.sh correctness   there: tests marked gpu, the most important ones first
#   benchmarks/gpu_trial.sh speed         there: benchmarks/gpu.py for the 1.2B and the 203M model
#   benchmarks/gpu_trial.sh try           here, on the CPU: both calls at a tiny size
#
# There: a checkout with .trial, Python 3.12 with a CUDA build of torch, and the larger packages that setup.py names
# (transformers, pyarrow, scipy, …). Results go to OUT (default: .trial/results).
set -euo pipefail
cd "$(dirname "$0")/.."

PACKAGES=(megatron-core gigatoken zstandard plotille argcomplete liger-kernel xxhash pytest pluggy iniconfig hypothesis sortedcontainers)
PYTHON=${PYTHON:-python3}
OUT=${OUT:-.trial/results}
SITE=.trial/site

prepare() {
  local wanted=() name
  for name in "${PACKAGES[@]}"; do
    wanted+=("$(grep -i "^$name==" constraints.txt)")
  done
  rm -rf .trial/wheels
  .venv/bin/python -m pip --disable-pip-version-check download --quiet --no-deps --only-binary :all: --python-version 3.12 \
    --dest .trial/wheels "${wanted[@]}"
  du -sh .trial/wheels
}

# Install the wheels beside the machine's packages, once, and print what else is missing.
install() {
  mkdir -p "$OUT"
  if [ -d .trial/wheels ] && [ ! -d "$SITE" ]; then
    "$PYTHON" -m pip --disable-pip-version-check install --quiet --no-index --no-deps --target "$SITE" .trial/wheels/*.whl
  fi
  export PYTHONPATH="$PWD/$SITE:$PWD${PYTHONPATH:+:$PYTHONPATH}"
  "$PYTHON" - <<'PY'
import importlib.util, sys
wanted = """torch numpy psutil sentencepiece google.protobuf transformers safetensors gigatoken pyarrow zstandard yaml rich
plotille scipy xxhash matplotlib jinja2 tensorboard argcomplete megatron.core liger_kernel triton pytest hypothesis""".split()
def is_missing(name):
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:
        return True
missing = [name for name in wanted if is_missing(name)]
if missing:
    sys.exit(f"gpu_trial: this Python lacks {', '.join(missing)}: download their wheels into .trial/wheels as well")
import torch
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"gpu_trial: {name}, torch {torch.__version__}, Python {sys.version.split()[0]}")
PY
}

# A call of pytest for each group, so that a slow group does not take the time of the earlier groups.
correctness() {
  install
  local status=0 group
  for group in "kernels" "real_model" "stopped_training" "rates" "whole_plan or doctor"; do
    "$PYTHON" -W ignore -m pytest -q -rxX -p no:cacheprovider -m gpu tests/training/test_gpu.py -k "$group" 2>&1 |
      tee -a "$OUT/correctness.txt" || status=1
  done
  return $status
}

speed() {
  install
  local status=0
  "$PYTHON" -W ignore benchmarks/gpu.py --model 1.2b --micro 4 --budget 210 --limit 70 --profile --output "$OUT" \
    --contenders plain ours fusion ceiling hf-compile toggled no-adam 2>&1 | tee "$OUT/speed-1.2b.txt" || status=1
  "$PYTHON" -W ignore benchmarks/gpu.py --model 1.2b --micro 8 --budget 60 --limit 60 --output "$OUT/micro8" \
    --contenders ours 2>&1 | tee "$OUT/speed-1.2b-8.txt" || status=1
  "$PYTHON" -W ignore benchmarks/gpu.py --model 203m --micro 8 --batch 64 --budget 150 --limit 60 --profile \
    --output "$OUT" --contenders plain ours hf-compile ceiling 2>&1 | tee "$OUT/speed-203m.txt" || status=1
  return $status
}

try() {
  [ "$PYTHON" != python3 ] || PYTHON=.venv/bin/python
  install
  "$PYTHON" -W ignore -m pytest -q -m gpu tests/training/test_gpu.py
  "$PYTHON" -W ignore benchmarks/gpu.py --device cpu --steps 10 --profile --output "$OUT/cpu"
}

case "${1:-}" in
prepare | correctness | speed | try) "$1" ;;
*)
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
  ;;
esac

#!/bin/bash
#SBATCH --job-name=preprocess --output=preprocess-%A-%a.log --open-mode=append --requeue --nodes=1 --ntasks=1
# Tokenize a delivery of many files as a job array, then merge the shards into one dataset:
#   bash slurm/preprocess.sh SHARDS --input 'FILES' --output-prefix PREFIX …   (arguments of tools/preprocess_data.py)
# LRPATH_SBATCH holds further options of sbatch ("--cpus-per-task=16 --time=4:00:00 --partition=cpu"). A second call
# with the same arguments does only what is missing.
set -euo pipefail
self=$(realpath "${BASH_SOURCE[0]}")
root=$(dirname "$(dirname "$self")")
[ -e "$root/slurm/preprocess.sh" ] || root=${LRPATH_ROOT:-$SLURM_SUBMIT_DIR} # sbatch runs a copy of this file
python=${LRPATH_PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python3
tool=("$python" -m megatron_lrpath.tools.preprocess_shards)
[ ! -e "$root/tools/preprocess_shards.py" ] || tool=("$python" "$root/tools/preprocess_shards.py")

case ${1:-} in
  shard) exec "${tool[@]}" shard "$2" "$SLURM_ARRAY_TASK_ID" ;;
  merge) exec "${tool[@]}" merge "$2" ;;
esac
answer=$("${tool[@]}" prepare --shards "${1:?how many shards?}" -- "${@:2}")
missing=${answer%%$'\n'*} folder=${answer#*$'\n'}
export LRPATH_ROOT=$root
read -ra options <<<"${LRPATH_SBATCH:-}"
if [ "$missing" != none ]; then
  array=$(sbatch --parsable "${options[@]}" --array="$missing" "$self" shard "$folder")
  options+=(--dependency="afterok:${array%%;*}" --kill-on-invalid-dep=yes)
  echo "shards $missing: job ${array%%;*}"
fi
merge=$(sbatch --parsable "${options[@]}" "$self" merge "$folder")
echo "merge: job ${merge%%;*}; the same command again does what is missing"

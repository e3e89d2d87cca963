#!/bin/bash
#SBATCH --job-name=ours_3.1b --output=ours_3.1b-%j.log --nodes=1 --ntasks=1 --time=10:00
# The main path and a branch for every version of LLaMA-3.1B: this small job submits the training jobs.
root=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")
[ -e "$root/slurm/common.sh" ] || root=${LRPATH_ROOT:-$SLURM_SUBMIT_DIR} # sbatch runs a copy of this file
source "$root/slurm/common.sh"
submit ours 3.1b "$@"

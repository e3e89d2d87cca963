#!/bin/bash
#SBATCH --job-name=ptfs_1.2b --output=ptfs_1.2b-%j.log --nodes=1 --ntasks=1 --time=10:00
# Pre-training from scratch of every version of LLaMA-1.2B: this small job submits the training jobs.
root=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")
[ -e "$root/slurm/common.sh" ] || root=${LRPATH_ROOT:-$SLURM_SUBMIT_DIR} # sbatch runs a copy of this file
source "$root/slurm/common.sh"
submit ptfs 1.2b "$@"

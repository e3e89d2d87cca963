#!/bin/bash
#SBATCH --job-name=ptfs_3.1b --output=ptfs_3.1b-%j.log --nodes=1 --ntasks=1 --time=10:00
# Pre-training from scratch of every version of LLaMA-3.1B: this small job submits the training jobs.
root=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")
[ -e "$root/slurm/common.sh" ] || root=${LRPATH_ROOT:-$SLURM_SUBMIT_DIR} # sbatch runs a copy of this file
source "$root/slurm/common.sh"
submit ptfs 3.1b "$@"

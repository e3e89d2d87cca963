#!/bin/bash
#SBATCH --job-name=cpt_1.2b --output=cpt_1.2b-%j.log --nodes=1 --ntasks=1 --time=10:00
# Continual pre-training, version after version, of LLaMA-1.2B: this small job submits the training jobs.
root=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")
[ -e "$root/slurm/common.sh" ] || root=${LRPATH_ROOT:-$SLURM_SUBMIT_DIR} # sbatch runs a copy of this file
source "$root/slurm/common.sh"
submit cpt 1.2b "$@"

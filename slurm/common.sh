# Shared by the recipes: `submit PARADIGM SIZE OPTIONS…` submits the jobs of examples/paper/SIZE.yaml.
# The settings come from slurm/settings.env (or the file that LRPATH_SETTINGS names), options override them.
# A recipe sets `root` to the checkout and sources this file.
set -euo pipefail

submit() {
  local paradigm=$1 size=$2 settings=${LRPATH_SETTINGS:-$root/slurm/settings.env} lrpath=lrpath
  shift 2
  cd -- "$root" # relative paths of the plan start here
  if [ -x "$root/.venv/bin/lrpath" ]; then lrpath=$root/.venv/bin/lrpath; fi
  if [ -e "$settings" ]; then set -- --settings "$settings" "$@"; fi
  "$lrpath" submit "examples/paper/$size.yaml" --paradigm "$paradigm" "$@"
}

#!/usr/bin/env bash
# LLaMA-203M on four dated crawls of FineWeb, from download to report. Call it from the project's root:
#
#   bash examples/public/203m/recipe.sh download tokenizer tokenize draw plan run report
#
# Every step can be called again and does only what is missing. DRY=1 prints the commands instead.
set -euo pipefail

ROOT=${ROOT:-data/public}
PLAN=${PLAN:-examples/public/203m/plan.yaml}
DUMPS=(${DUMPS:-CC-MAIN-2021-04 CC-MAIN-2022-05 CC-MAIN-2023-06 CC-MAIN-2024-10})
FILES=${FILES:-000_000[01]?.parquet}     # of each crawl; `draw` reports the missing tokens if these are too few
TOKENS=${TOKENS:-10.5e9}                 # of a version
VALID=${VALID:-20e6}                     # of the validation set, drawn from the first crawl
LENGTH=${LENGTH:-2048}
VOCABULARY=${VOCABULARY:-100000}
WORKERS=${WORKERS:-$(nproc)}
PYTHON=${PYTHON:-.venv/bin/python}
LRPATH=${LRPATH:-.venv/bin/lrpath}

call() {
  printf '%q ' "$@"; echo
  [ -n "${DRY:-}" ] || "$@"
}

there() { [ -z "${DRY:-}" ] && [ -e "$1" ]; }

version() { local year=${1#CC-MAIN-}; echo "cc${year%-*}"; }

download() {
  for dump in "${DUMPS[@]}"; do
    call hf download HuggingFaceFW/fineweb --repo-type dataset --include "data/$dump/$FILES" --local-dir "$ROOT/fineweb"
  done
}

tokenizer() {
  there "$ROOT/tokenizer.model" ||
    call "$PYTHON" tools/train_tokenizer.py --input "$ROOT/fineweb/data/${DUMPS[0]}/*.parquet" \
      --output-prefix "$ROOT/tokenizer" --vocab-size "$VOCABULARY"
}

tokenize() {
  for dump in "${DUMPS[@]}"; do
    there "$ROOT/${dump}_text_document.idx" ||
      call "$PYTHON" tools/preprocess_data.py --input "$ROOT/fineweb/data/$dump/*.parquet" --workers "$WORKERS" \
        --append-eod --tokenizer-type SentencePieceTokenizer --tokenizer-model "$ROOT/tokenizer.model" \
        --output-prefix "$ROOT/$dump"
  done
}

draw() {
  local more=(--valid-tokens "$VALID")
  for dump in "${DUMPS[@]}"; do
    there "$ROOT/slices/$(version "$dump").slice" ||
      call "$PYTHON" tools/slice_versions.py --source "$ROOT/${dump}_text_document" --names "$(version "$dump")" \
        --tokens-per-version "$TOKENS" --seq-length "$LENGTH" --drop-duplicates --output "$ROOT/slices" "${more[@]}"
    more=(--append)
  done
  call "$PYTHON" tools/check_slices.py "$ROOT/slices"
}

plan() { call "$LRPATH" plan "$PLAN"; }
run() { call "$LRPATH" run "$PLAN"; }
report() { call "$LRPATH" report "$PLAN"; }

for step in "$@"; do
  case $step in
    download | tokenizer | tokenize | draw | plan | run | report) "$step" ;;
    *) echo "recipe.sh: no step '$step'; there are download tokenizer tokenize draw plan run report" >&2; exit 2 ;;
  esac
done

#!/usr/bin/env bash
# What a short visit to a machine with a GPU is for, in one command (bench/visit/visit.py):
#
#   bench/gpu.sh OUT [--seconds 540] [--parts a,b,...] [--wheels DIR] [--quick]
#
# OUT gets facts, one line of JSON each (OUT/*.jsonl), and log.txt. `python -m bench.harness.results collect OUT` makes
# results of them, partial ones too. PYTHON is the interpreter, python3 by default; PGOLF_PEERS may name a folder of
# other people's checkouts.
set -eu
out=()
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
  mkdir -p "$1"
  out=("$(cd "$1" && pwd)")
  shift
fi
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m bench.visit.visit ${out[@]+"${out[@]}"} "$@"

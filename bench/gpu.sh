#!/usr/bin/env bash
# Everything that a machine with a GPU can say about this checkout, in one command and under 10 minutes:
#
#   bench/gpu.sh OUT_DIR
#
# builds, asks the doctor, runs the GPU tests, all benchmarks, the static report and a 60 s training run of `baseline`
# on demo data. OUT_DIR gets <device>.json (results, and how each part ended; fit for bench/results/), the raw
# benchmarks.json and the logs. A part that fails costs the others nothing; the script then ends with status 1.
#
#   PGOLF_WHEELS       folder of wheels, from which missing Python packages are installed (no network is used)
#   PGOLF_ALL_TESTS=1  the whole test-suite instead of the GPU tests, and 10 minutes more
#   PGOLF_RECORD_STEP=1  the step of `pr1855` beside #1855's script (PGOLF_PEERS) and beside fused glue and CUDA graphs,
#                      its profiles by class, 60 s of training of `pr1493` and `pr1855`, and 30 minutes more
#   PGOLF_BENCH_QUICK=1  few rounds and a short demo run: proves the script, on any machine, and measures nothing
#   PYTHON             the interpreter, python3 by default
set -u

if [ $# -ne 1 ]; then
  echo "usage: bench/gpu.sh OUT_DIR" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
quick=${PGOLF_BENCH_QUICK:-}
if [ "$quick" = 0 ]; then quick=; fi
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
parts=$work/parts.tsv
: >"$parts"
failed=0
deadline=$(($(date +%s) + 570))
if [ -n "${PGOLF_ALL_TESTS:-}" ]; then deadline=$((deadline + 600)); fi
if [ -n "${PGOLF_RECORD_STEP:-}" ]; then deadline=$((deadline + 1800)); fi

# part NAME LOG SECONDS COMMAND...: run with a time limit, append to the log, remember how it ended.
part() {
  local name=$1 log=$2 limit=$3 status left
  shift 3
  left=$((deadline - $(date +%s)))
  if [ "$left" -lt 5 ]; then
    echo "== $name: skipped, the time is used up"
    printf '%s\tskipped\t0\n' "$name" >>"$parts"
    failed=1
    return
  fi
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  echo "== $name (at most $limit s)" | tee -a "$out/$log"
  SECONDS=0
  timeout --kill-after=20 "$limit" "$@" >>"$out/$log" 2>&1
  status=$?
  printf '%s\t%s\t%s\n' "$name" "$status" "$SECONDS" >>"$parts"
  if [ "$status" -ne 0 ]; then
    failed=1
    echo "   FAILED with status $status; the end of $log:"
    tail -n 15 "$out/$log" | sed 's/^/   | /'
  else
    echo "   ok in $SECONDS s"
  fi
}

rm -f "$out"/{build,tests,bench,static,run,record_step}.log

# What pyproject.toml asks for to build, run and test, and is not here or too old: one name a line.
missing_packages() {
  "$python" - <<'END'
import shutil
from importlib import metadata

from pip._vendor.packaging.requirements import Requirement

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

with open("pyproject.toml", "rb") as file:
    settings = tomllib.load(file)
project = settings["project"]
needs = settings["build-system"]["requires"] + project["dependencies"] + project["optional-dependencies"]["test"]
for need in map(Requirement, needs):
    if (need.marker and not need.marker.evaluate()) or (need.name in ("cmake", "ninja") and shutil.which(need.name)):
        continue
    try:
        good = need.specifier.contains(metadata.version(need.name), prereleases=True)
    except metadata.PackageNotFoundError:
        good = False
    if not good:
        print(need.name)
END
}

# Stops at nothing: what cannot be installed is reported below, and the parts that need it fail by name.
install_wheels() {
  local name
  for name in $(missing_packages); do
    "$python" -m pip install --no-index --upgrade --find-links "$PGOLF_WHEELS" "$name" || echo "no wheel for $name"
  done
}

if [ -n "${PGOLF_WHEELS:-}" ]; then
  echo "== wheels from PGOLF_WHEELS"
  install_wheels >>"$out/build.log" 2>&1
fi
missing=$(missing_packages)
if [ -n "$missing" ]; then
  echo "MISSING or too old, of Python packages: ${missing//$'\n'/ }" | tee -a "$out/build.log"
  echo "   (parts that need them will fail; PGOLF_WHEELS can name a folder with their wheels)"
else
  echo "all Python packages of pyproject.toml are here"
fi

part build build.log 100 "$python" -m pip install --no-build-isolation --no-deps -e .
part doctor build.log 30 "$python" -m pgolf doctor

if [ -n "${PGOLF_ALL_TESTS:-}" ]; then
  part tests tests.log 600 "$python" -m pytest -q --continue-on-collection-errors
else
  # Status 5 is "no test carries the mark", which is how it is while there is none.
  part tests tests.log 170 bash -c '"$0" -m pytest -q -m gpu --continue-on-collection-errors; s=$?; [ $s = 5 ] || exit $s' \
    "$python"
fi

# Stopped at the limit, pytest writes what was measured until then.
part benchmarks bench.log 260 "$python" -m pytest bench/ -q --benchmark-json="$work/benchmarks.json" \
  --ignore=bench/bench_record_step.py

seconds=60 preset=baseline
if [ -n "$quick" ]; then seconds=10 preset=demo; fi
part data run.log 60 "$python" -m pgolf data demo
# train NAME PRESET SECONDS [SETTING=value...]: a part that trains on demo data.
train() {
  local name=$1 preset=$2 limit=$3
  shift 3
  part "$name" run.log "$limit" env PRESET="$preset" MAX_WALLCLOCK_SECONDS="$seconds" \
    ${quick:+GPTQ_RESERVE_SECONDS=3} OUT_DIR="$work/runs" RUN_ID="$name" "$@" \
    DATA_PATH=data/datasets/demo_sp1024 TOKENIZER_PATH=data/tokenizers/demo_1024_bpe.model \
    "$python" -m torch.distributed.run --standalone --nproc_per_node=1 train_gpt.py
}
train run "$preset" 180
part static_report static.log 60 "$python" -m bench.kernels.static_report --json "$work/static.json"

if [ -n "${PGOLF_RECORD_STEP:-}" ]; then
  part record_step record_step.log 900 "$python" -m pytest bench/bench_record_step.py -q \
    --benchmark-json="$out/record_step.json"
  profiled=(--preset pr1855) trained=(pr1493 pr1855)
  if [ -n "$quick" ]; then profiled=(--preset demo --steps 1) trained=(); fi
  for glue in off on; do
    for phase in "" --first-phase; do
      part "profile_glue_$glue$phase" record_step.log 240 "$python" -m bench.step_model.profile "${profiled[@]}" \
        ${phase:+"$phase"} --json "$out/profile_glue_$glue$phase.json" FUSED_GLUE=$glue
    done
  done
  for preset in ${trained[@]+"${trained[@]}"}; do
    train "$preset" "$preset" 420 VOCAB_SIZE=1024 TRAIN_BATCH_TOKENS=98304
    cp "$work/runs/$preset/summary.json" "$out/run_$preset.json" || failed=1
  done
fi

if [ -f "$work/benchmarks.json" ]; then cp "$work/benchmarks.json" "$out/benchmarks.json"; fi
if ! "$python" -m bench.harness.results collect "$work/benchmarks.json" --folder "$out" --parts "$parts" \
  --run "$work/runs/run/summary.json" --static "$work/static.json"; then
  failed=1
fi
echo
column -t -s "$(printf '\t')" "$parts" 2>/dev/null || cat "$parts"
exit "$failed"

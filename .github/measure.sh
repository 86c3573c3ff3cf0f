#!/usr/bin/env bash
# Measures what README.md reports, into benchmarks.jsonl and sizes.jsonl beside this file.
#
# usage: .github/measure.sh [ROUNDS]   (default 15, about 75 minutes on 2 cores)
#
# Needs the project's environment, the files of save_model.py in the project's folder, and
# a machine that does nothing else. Stop it when you like: rows are added when a run is
# complete, and the same command goes on where it was stopped.
set -euo pipefail
trap 'exit 1' TERM # when the present command has ended; Ctrl-C ends that, too
cd "$(dirname "$0")/.."
rounds=${1:-15}
benchmarks=.github/benchmarks.jsonl
sizes=.github/sizes.jsonl
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT
touch "$benchmarks" "$sizes"

shuffled() {
  shuf -e serial multiprocessing_naive multiprocessing_tuned ray_naive ray_tuned
}

# Eight lines a run: the limit of the moment, which is one process alone and two at once
# that share nothing, and then the five implementations.
run_benchmark() {
  rm -f "$new"/*
  local limit="numerical.py --implementations serial --num-cpus 1 --num-warmups 1 --num-trials 5"
  python $limit --json "$new/1"
  python $limit --json "$new/2" &
  python $limit --json "$new/3"
  wait $!
  python "$1.py" --num-cpus 2 --num-warmups 3 --num-trials 3 \
    --implementations $(shuffled) --json "$new/4"
  cat "$new"/* >> "$benchmarks"
}

# Five lines a run.
run_size() {
  rm -f "$new"/*
  python numerical.py --num-cpus 2 --image-size "$1" --filter-size "$2" \
    --num-warmups 5 --num-trials 10 --implementations $(shuffled) --json "$new/1"
  cat "$new"/* >> "$sizes"
}

scripts=(numerical stateful expensive_init)
pixels=("30 1" "100 1" "300 1" "1000 1" "3000 1" "30 30" "100 30" "300 30")
while true; do
  run=$(($(wc -l < "$benchmarks") / 8))
  size=$(($(wc -l < "$sizes") / 5))
  if [ "$run" -lt $((3 * rounds)) ]; then
    run_benchmark "${scripts[$((run % 3))]}"
  fi
  if [ "$size" -lt $((8 * rounds / 3)) ]; then # sizes get a third of the rounds
    run_size ${pixels[$((size % 8))]}
  fi
  if [ "$run" -ge $((3 * rounds)) ] && [ "$size" -ge $((8 * rounds / 3)) ]; then
    break
  fi
done

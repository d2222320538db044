#!/usr/bin/env bash
# Grid, random and TPE search over two hyperparameters of algos/ppo.py on CartPole: 20 trials of 2 seeds each, two runs at
# a time; each sweep is killed once on the way and continued. About 60 runs a method. The reports land in $OUT/*.sweep
# (default: runs/new/sweep_ppo). Smaller: TRIALS, STEPS, FRESH, and RATES for the grid's learning rates (times 4
# discounts), METHODS.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/new/sweep_ppo}
for method in ${METHODS:-grid random tpe}; do
  if [ "$method" = grid ]; then
    search=("learning_rate=1e-4..1e-2:log:${RATES:-5}" "gamma=0.9,0.95,0.98,0.99")
  else
    search=("learning_rate=1e-4..1e-2:log" "gamma=0.9,0.95,0.98,0.99" --trials "${TRIALS:-20}")
  fi
  words=(sweep algos/ppo.py --env-id CartPole-v1 --method "$method" --seeds 1-2 --fresh-seeds "${FRESH:-1001-1010}"
    --name "sweep_ppo_$method" --runs-dir "$OUT" --workers 2 --search "${search[@]}"
    -- --total-timesteps "${STEPS:-2e4}" --save-interval 2000 --no-capture-video --no-cuda)
  mkdir -p "$OUT"
  python -m common "${words[@]}" >"$OUT/$method.first.log" 2>&1 &
  first=$!
  # Killed in the middle of a run, when two trials are finished.
  until [ "$(grep -c '^\[' "$OUT/$method.first.log")" -ge 2 ] || ! kill -0 $first; do sleep 1; done
  sleep 3
  kill -KILL $first || true
  wait $first || true
  python -m common "${words[@]}"
done

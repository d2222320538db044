#!/usr/bin/env bash
# The reference runs of algos/pqn.py: CartPole-v1, 10 seeds; Acrobot-v1, 4 seeds. A quarter of an hour or so on one core.
# Runs land in $OUT/NAME ($OUT: runs/new). To keep them:
#   python runs/reference/collect.py runs/new/pqn --into runs/reference/results/pqn
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/new}
quiet=(--no-track --no-capture-video --save-interval 0 --eval-interval 0 --eval-episodes 100)
for seed in 31 32 33 34 35 36 37 38 39 40; do
  python algos/pqn.py --env-id CartPole-v1 --cuda --seed $seed --runs-dir "$OUT/pqn" "${quiet[@]}"
done
# The seeds 31 and 32 were looked at with 250,000 steps, so they are none of these.
for seed in 33 34 35 36; do
  python algos/pqn.py --env-id Acrobot-v1 --cuda --seed $seed --runs-dir "$OUT/pqn" "${quiet[@]}" --total-timesteps 5e5
done

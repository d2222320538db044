#!/usr/bin/env bash
# The reference runs of algos/rainbow.py: CartPole-v1, 5 seeds, with the defaults (all six parts).
# Runs land in $OUT/NAME ($OUT: runs/new). To keep them:
#   python runs/reference/collect.py runs/new/rainbow --into runs/reference/results/rainbow
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/new}
for seed in 31 32 33 34 35; do
  python algos/rainbow.py --env-id CartPole-v1 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT/rainbow"
done

#!/usr/bin/env bash
# The reference runs of algos/rainbow.py: CartPole-v1, 5 seeds, with the defaults (all six parts).
# Results land in $OUT (default: runs/reference); `python runs/collect.py` turns them into runs/results/.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/reference}
for seed in 31 32 33 34 35; do
  python algos/rainbow.py --env-id CartPole-v1 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT"
done

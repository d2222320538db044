#!/usr/bin/env bash
# The reference runs of algos/ppo.py: CartPole-v1, 10 seeds. About 6 minutes on one core.
# Results land in $OUT (default: runs/reference); `python runs/collect.py` turns them into runs/results/.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/reference}
for seed in 31 32 33 34 35 36 37 38 39 40; do
  python algos/ppo.py --env-id CartPole-v1 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT"
done

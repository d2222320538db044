#!/usr/bin/env bash
# The reference runs of algos/dqn.py: CartPole-v1, 20 seeds; Acrobot-v1, 5 seeds. About 13 minutes on one core.
# Results land in $OUT (default: runs/reference); `python runs/collect.py` turns them into runs/results/.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/reference}
for seed in 1 2 3 4 5 6 7 8 9 10 31 32 33 34 35 36 37 38 39 40; do
  python algos/dqn.py --env-id CartPole-v1 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT"
done
for seed in 1 2 3 4 5; do
  python algos/dqn.py --env-id Acrobot-v1 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT"
done

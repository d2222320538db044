#!/usr/bin/env bash
# The reference runs of algos/dqn_lightning.py: CartPole-v1, 5 seeds, with the defaults and with twice the steps.
# Results land in $OUT (default: runs/reference_dqn_lightning); `python runs/collect.py` turns them into runs/results/.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/reference_dqn_lightning}
for seed in 31 32 33 34 35; do
  python algos/dqn_lightning.py --env-id CartPole-v1 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT"
  python algos/dqn_lightning.py --env-id CartPole-v1 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT-100k" \
    --total-timesteps 1e5
done

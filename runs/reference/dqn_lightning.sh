#!/usr/bin/env bash
# The reference runs of algos/dqn_lightning.py: CartPole-v1, 5 seeds, with the defaults and with twice the steps.
# Runs land in $OUT/NAME ($OUT: runs/new). To keep them:
#   python runs/reference/collect.py runs/new/dqn_lightning --into runs/reference/results/dqn_lightning
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/new}
for seed in 31 32 33 34 35; do
  python algos/dqn_lightning.py --env-id CartPole-v1 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT/dqn_lightning"
  python algos/dqn_lightning.py --env-id CartPole-v1 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT/dqn_lightning_100k" \
    --total-timesteps 1e5
done

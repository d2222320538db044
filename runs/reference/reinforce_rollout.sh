#!/usr/bin/env bash
# The reference runs of algos/reinforce_rollout.py: CartPole-v1, 10 seeds; Acrobot-v1 and LunarLander-v3, 5 seeds each.
# About 20 minutes on one core.
# Runs land in $OUT/NAME ($OUT: runs/new). To keep them:
#   python runs/reference/collect.py runs/new/reinforce_rollout --into runs/reference/results/reinforce_rollout
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/new}
for seed in 31 32 33 34 35 36 37 38 39 40; do
  python algos/reinforce_rollout.py --env-id CartPole-v1 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT/reinforce_rollout"
done
for seed in 31 32 33 34 35; do
  python algos/reinforce_rollout.py --env-id Acrobot-v1 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT/reinforce_rollout" \
    --log-interval 10000
  python algos/reinforce_rollout.py --env-id LunarLander-v3 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT/reinforce_rollout" \
    --total-timesteps 2e6 --learning-rate 5e-3 --eval-interval 500000 --log-interval 20000
done

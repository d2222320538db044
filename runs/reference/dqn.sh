#!/usr/bin/env bash
# The reference runs of algos/dqn.py: CartPole-v1, 20 seeds; Acrobot-v1 and MountainCar-v0, 5 seeds each.
# About 20 minutes on one core.
# Runs land in $OUT/NAME ($OUT: runs/new). To keep them:
#   python runs/reference/collect.py runs/new/dqn --into runs/reference/results/dqn
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/new}
for seed in 1 2 3 4 5 6 7 8 9 10 31 32 33 34 35 36 37 38 39 40; do
  python algos/dqn.py --env-id CartPole-v1 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT/dqn"
done
for seed in 1 2 3 4 5; do
  python algos/dqn.py --env-id Acrobot-v1 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT/dqn"
done
# rl-baselines3-zoo's flags with an eighth of its updates: one every 16 steps, where it has 8 in a row every 16.
for seed in 31 32 33 34 35; do
  python algos/dqn.py --env-id MountainCar-v0 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT/dqn" \
    --total-timesteps 120000 --eval-interval 60000 --log-interval 5000 --gamma 0.98 --learning-rate 4e-3 \
    --no-anneal-lr --no-double --batch-size 128 --buffer-size 10000 --learning-starts 1000 \
    --target-network-frequency 600 --train-frequency 16 --exploration-fraction 0.2 --end-e 0.07
done

#!/usr/bin/env bash
# What the options of algos/dqn.py are worth: LunarLander-v3 with all of them (5 seeds), and an ablation on CartPole-v1
# and LunarLander-v3 (flags of rl-baselines3-zoo's DQN, close to). About 2 hours on one core.
# Results land in $OUT (default: runs/reference); `python runs/collect.py` turns them into runs/results/.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/reference}
LUNAR="--env-id LunarLander-v3 --total-timesteps 3e5 --eval-interval 1e5 --log-interval 5000 --learning-starts 5000
  --learning-rate 6.3e-4 --batch-size 128 --train-frequency 4 --target-network-frequency 250 --exploration-fraction 0.12"
CARTPOLE="--env-id CartPole-v1"
run() {
  python algos/dqn.py --cuda --eval-episodes 100 "$@"
}
for seed in 31 32 33 34 35; do
  run $LUNAR --seed $seed --runs-dir "$OUT/all" --prioritized-replay --dueling --n-step 3
done
for seed in 31 32 33 34 35; do
  run $CARTPOLE --seed $seed --runs-dir "$OUT/all" --prioritized-replay --dueling --n-step 3
  run $CARTPOLE --seed $seed --runs-dir "$OUT/none"
  run $CARTPOLE --seed $seed --runs-dir "$OUT/no-double" --no-double
  run $CARTPOLE --seed $seed --runs-dir "$OUT/dueling" --dueling
  run $CARTPOLE --seed $seed --runs-dir "$OUT/n-step" --n-step 3
  run $CARTPOLE --seed $seed --runs-dir "$OUT/prioritized" --prioritized-replay
done
for seed in 31 32 33; do
  run $LUNAR --seed $seed --runs-dir "$OUT/none"
  run $LUNAR --seed $seed --runs-dir "$OUT/no-double" --no-double
  run $LUNAR --seed $seed --runs-dir "$OUT/dueling" --dueling
  run $LUNAR --seed $seed --runs-dir "$OUT/n-step" --n-step 3
  run $LUNAR --seed $seed --runs-dir "$OUT/prioritized" --prioritized-replay
done

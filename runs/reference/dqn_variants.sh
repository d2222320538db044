#!/usr/bin/env bash
# What double Q-learning, dueling, n-step returns and prioritized replay are worth to DQN: algos/rainbow.py without its
# distributional and noisy parts. LunarLander-v3 with all four (5 seeds), and an ablation on CartPole-v1, LunarLander-v3
# (close to rl-baselines3-zoo's flags for DQN), Acrobot-v1 and MountainCar-v0 (the flags of dqn.sh, which has double
# Q-learning off there). About two and a half hours on one core.
# Runs land in $OUT/NAME ($OUT: runs/new). To keep them:
#   python runs/reference/collect.py runs/new/dqn_ablation/all --into runs/reference/results/dqn_ablation/all
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/new}
LUNAR="--env-id LunarLander-v3 --total-timesteps 3e5 --eval-interval 1e5 --log-interval 5000 --learning-starts 5000
  --learning-rate 6.3e-4 --batch-size 128 --train-frequency 4 --target-network-frequency 250 --exploration-fraction 0.12"
CARTPOLE="--env-id CartPole-v1"
ACROBOT="--env-id Acrobot-v1"
MOUNTAINCAR="--env-id MountainCar-v0 --total-timesteps 120000 --eval-interval 60000 --log-interval 5000 --gamma 0.98
  --learning-rate 4e-3 --no-anneal-lr --batch-size 128 --buffer-size 10000 --learning-starts 1000
  --target-network-frequency 600 --train-frequency 16 --exploration-fraction 0.2 --end-e 0.07"
run() { # with every part but --double off, and dqn.py's other defaults: what comes later on the line holds
  python algos/rainbow.py --cuda --eval-episodes 100 --no-distributional --no-noisy --no-dueling --n-step 1 \
    --no-prioritized-replay --prioritized-replay-alpha 0.6 --learning-rate 2.3e-3 "$@"
}
for seed in 31 32 33 34 35; do
  run $LUNAR --seed $seed --runs-dir "$OUT/dqn_all" --prioritized-replay --dueling --n-step 3
done
for seed in 31 32 33 34 35; do
  run $CARTPOLE --seed $seed --runs-dir "$OUT/dqn_ablation/all" --prioritized-replay --dueling --n-step 3
  run $CARTPOLE --seed $seed --runs-dir "$OUT/dqn_ablation/none"
  run $CARTPOLE --seed $seed --runs-dir "$OUT/dqn_ablation/no-double" --no-double
  run $CARTPOLE --seed $seed --runs-dir "$OUT/dqn_ablation/dueling" --dueling
  run $CARTPOLE --seed $seed --runs-dir "$OUT/dqn_ablation/n-step" --n-step 3
  run $CARTPOLE --seed $seed --runs-dir "$OUT/dqn_ablation/prioritized" --prioritized-replay
done
for seed in 31 32 33; do
  run $LUNAR --seed $seed --runs-dir "$OUT/dqn_ablation/none"
  run $LUNAR --seed $seed --runs-dir "$OUT/dqn_ablation/no-double" --no-double
  run $LUNAR --seed $seed --runs-dir "$OUT/dqn_ablation/dueling" --dueling
  run $LUNAR --seed $seed --runs-dir "$OUT/dqn_ablation/n-step" --n-step 3
  run $LUNAR --seed $seed --runs-dir "$OUT/dqn_ablation/prioritized" --prioritized-replay
done
for seed in 31 32 33 34 35; do
  run $ACROBOT --seed $seed --runs-dir "$OUT/dqn_ablation/all" --prioritized-replay --dueling --n-step 3
  run $ACROBOT --seed $seed --runs-dir "$OUT/dqn_ablation/none"
  run $ACROBOT --seed $seed --runs-dir "$OUT/dqn_ablation/no-double" --no-double
  run $ACROBOT --seed $seed --runs-dir "$OUT/dqn_ablation/dueling" --dueling
  run $ACROBOT --seed $seed --runs-dir "$OUT/dqn_ablation/n-step" --n-step 3
  run $ACROBOT --seed $seed --runs-dir "$OUT/dqn_ablation/prioritized" --prioritized-replay
  run $MOUNTAINCAR --seed $seed --runs-dir "$OUT/dqn_ablation/all" --prioritized-replay --dueling --n-step 3
  run $MOUNTAINCAR --seed $seed --runs-dir "$OUT/dqn_ablation/double"
  run $MOUNTAINCAR --seed $seed --runs-dir "$OUT/dqn_ablation/dueling" --no-double --dueling
  run $MOUNTAINCAR --seed $seed --runs-dir "$OUT/dqn_ablation/n-step" --no-double --n-step 3
  run $MOUNTAINCAR --seed $seed --runs-dir "$OUT/dqn_ablation/prioritized" --no-double --prioritized-replay
done

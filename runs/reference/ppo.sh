#!/usr/bin/env bash
# The reference runs of algos/ppo.py. About an hour and a half on one core.
# Runs land in $OUT/NAME ($OUT: runs/new). To keep them:
#   python runs/reference/collect.py runs/new/ppo --into runs/reference/results/ppo
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/new}
for seed in 31 32 33 34 35 36 37 38 39 40; do
  python algos/ppo.py --env-id CartPole-v1 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT/ppo"
done
for seed in 31 32 33 34 35; do
  python algos/ppo.py --env-id Pendulum-v1 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT/ppo" \
    --num-envs 4 --num-steps 1024 --num-minibatches 64 --update-epochs 10 --gamma 0.9 --gae-lambda 0.95
  python algos/ppo.py --env-id Acrobot-v1 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT/ppo" \
    --total-timesteps 5e5 --eval-interval 250000
  python algos/ppo.py --env-id LunarLander-v3 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT/ppo" \
    --total-timesteps 1e6 --eval-interval 5e5 --log-interval 16384 --num-envs 16 --num-steps 256 \
    --num-minibatches 32 --update-epochs 8 --gamma 0.995 --gae-lambda 0.97 --ent-coef 0.01
  python algos/ppo.py --env-id LunarLanderContinuous-v3 --cuda --compile --seed $seed --eval-episodes 100 \
    --runs-dir "$OUT/ppo" --total-timesteps 1e6 --eval-interval 5e5 --log-interval 16384 --num-envs 16 --num-steps 256 \
    --num-minibatches 32 --update-epochs 8 --gamma 0.995 --gae-lambda 0.97 --ent-coef 0 --learning-rate 5e-4 \
    --logstd-init -0.5
  # CleanRL's flags for MuJoCo, except that episodes cut by the time limit bootstrap.
  python algos/ppo.py --env-id HalfCheetah-v4 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT/ppo_cleanrl_flags" \
    --total-timesteps 1e6 --eval-interval 5e5 --log-interval 20480 --norm-obs --norm-reward --clip-vloss \
    --num-envs 1 --num-steps 2048 --num-minibatches 32 --update-epochs 10 --gamma 0.99 --gae-lambda 0.95 \
    --learning-rate 3e-4
  # What does better: many short rollouts, and actions that start with a third of that standard deviation.
  python algos/ppo.py --env-id HalfCheetah-v4 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT/ppo" \
    --total-timesteps 1e6 --eval-interval 5e5 --log-interval 20480 --norm-obs --norm-reward --logstd-init -1 \
    --num-envs 16 --num-steps 128 --num-minibatches 16 --update-epochs 10 --gamma 0.99 --gae-lambda 0.95 \
    --learning-rate 4e-4
done
# Atari on a CPU, 8 minutes: far from CleanRL's 10,000,000 steps, enough to leave random play behind.
python algos/ppo.py --env-id ALE/Breakout-v5 --cuda --seed 31 --eval-episodes 0 --runs-dir "$OUT/ppo_breakout" \
  --total-timesteps 110000 --log-interval 1024 --clip-rewards --num-steps 128 --num-minibatches 4 --update-epochs 4 \
  --clip-coef 0.1 --ent-coef 0.01 --gamma 0.99 --gae-lambda 0.95 --learning-rate 2.5e-4

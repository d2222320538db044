#!/usr/bin/env bash
# The reference runs of algos/ppo.py on MuJoCo's v4 environments, 1,000,000 steps, 5 seeds each: about 3 minutes a seed
# on one core, compiled. HalfCheetah is in ppo.sh. Needs pip install -e ".[mujoco]".
# Results land in $OUT (default: runs/reference); `python runs/collect.py` turns them into runs/results/.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/reference}
COMMON="--cuda --compile --eval-episodes 100 --runs-dir $OUT --total-timesteps 1e6 --eval-interval 5e5 --log-interval 20480"
COMMON="$COMMON --norm-obs --norm-reward --logstd-init -1 --num-envs 16 --update-epochs 10 --gamma 0.99 --gae-lambda 0.95"
for seed in 31 32 33 34 35; do
  # HalfCheetah's flags; the walker falls into hopping on one leg with them, and gets longer rollouts and smaller steps.
  for env_id in Hopper-v4 InvertedPendulum-v4 Ant-v4; do
    # shellcheck disable=SC2086
    python algos/ppo.py --env-id $env_id $COMMON --seed $seed --num-steps 128 --num-minibatches 16 --learning-rate 4e-4
  done
  # shellcheck disable=SC2086
  python algos/ppo.py --env-id Walker2d-v4 $COMMON --seed $seed --num-steps 256 --num-minibatches 32 --learning-rate 3e-4
done

#!/usr/bin/env bash
# The reference runs of algos/ppo.py on MuJoCo's v4 environments, 1,000,000 steps, 5 seeds each: about an hour and a
# quarter on one core, compiled. HalfCheetah is in ppo.sh. Needs pip install -e ".[mujoco]".
# Runs land in $OUT/NAME ($OUT: runs/new). To keep them:
#   python runs/reference/collect.py runs/new/ppo --into runs/reference/results/ppo
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/new}
COMMON=(--cuda --compile --eval-episodes 100 --runs-dir "$OUT/ppo" --total-timesteps 1e6 --eval-interval 5e5
  --log-interval 20480 --norm-obs --norm-reward --update-epochs 10 --gamma 0.99 --gae-lambda 0.95)
for seed in 31 32 33 34 35; do
  # HalfCheetah's flags.
  for env_id in InvertedPendulum-v4 Ant-v4; do
    python algos/ppo.py --env-id $env_id --seed $seed "${COMMON[@]}" --logstd-init -1 --num-envs 16 \
      --num-steps 128 --num-minibatches 16 --learning-rate 4e-4
  done
  # With them the walker hops on one leg: longer rollouts and smaller steps.
  python algos/ppo.py --env-id Walker2d-v4 --seed $seed "${COMMON[@]}" --logstd-init -1 --num-envs 16 \
    --num-steps 256 --num-minibatches 32 --learning-rate 3e-4
  # With them the hopper stops exploring after 500,000 steps: CleanRL's, except that episodes cut by the time limit
  # bootstrap.
  python algos/ppo.py --env-id Hopper-v4 --seed $seed "${COMMON[@]}" --clip-vloss --num-envs 1 \
    --num-steps 2048 --num-minibatches 32 --learning-rate 3e-4
done

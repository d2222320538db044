#!/usr/bin/env bash
# Environments of other families, as docs/your-own-environment.md has them. Two hours on one core, most of it CarRacing.
# FetchReach: pip install -e ".[robotics]"; CarRacing: pip install -e ".[box2d]".
# Runs land in $OUT/NAME ($OUT: runs/new). To keep them:
#   python runs/reference/collect.py runs/new/NAME --into runs/reference/results/NAME
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/new}
common=(--no-track --no-capture-video --save-interval 0)
for name in ${1:-dqn_frozenlake sac_fetchreach ppo_carracing}; do
  for seed in ${SEEDS:-31 32 33 34 35}; do
    case $name in
      dqn_frozenlake)
        python algos/dqn.py --env-id FrozenLake-v1 --env-kwargs map_name=8x8 is_slippery=False --total-timesteps 5e4 \
          --exploration-fraction 0.6 --end-e 0.05 --learning-rate 1e-3 --eval-episodes 10 --eval-interval 5000 \
          --seed "$seed" "${common[@]}" --runs-dir "$OUT/$name" ;;
      sac_fetchreach)
        python algos/sac.py --env-id gymnasium_robotics:FetchReach-v4 --allow-env-import --total-timesteps 2e4 \
          --eval-episodes 50 --eval-interval 5000 --seed "$seed" "${common[@]}" --runs-dir "$OUT/$name" ;;
      ppo_carracing)
        python algos/ppo.py --env-id CarRacing-v3 --env-kwargs continuous=False --grayscale --resize 84 --frame-stack 4 \
          --total-timesteps 1e5 --num-steps 128 --num-minibatches 8 --update-epochs 4 --learning-rate 3e-4 --gamma 0.99 \
          --gae-lambda 0.95 --ent-coef 0.01 --eval-episodes 10 --eval-interval 50000 --seed "$seed" "${common[@]}" \
          --runs-dir "$OUT/$name" ;;
    esac
  done
done

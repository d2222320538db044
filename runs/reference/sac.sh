#!/usr/bin/env bash
# The reference runs of algos/sac.py. About 12 hours on one core. Minutes a seed: Pendulum-v1 3; LunarLanderContinuous-v3
# 18 (rl-baselines3-zoo's learning rate and tau, smaller networks, compiled); HalfCheetah-v4 16 (flags of
# Stable-Baselines3).
# The peer's runs with the same flags:
#   PEER_VENV/bin/python runs/reference/sac_sb3.py HalfCheetah-v4 --seeds 31 32 33
# Runs land in $OUT/NAME ($OUT: runs/new). To keep them:
#   python runs/reference/collect.py runs/new/sac --into runs/reference/results/sac
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/new}
for seed in 31 32 33 34 35; do
  python algos/sac.py --env-id Pendulum-v1 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT/sac"
done
for seed in 31 32 33; do
  python algos/sac.py --env-id LunarLanderContinuous-v3 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT/sac" \
    --total-timesteps 3e5 --eval-interval 1e5 --log-interval 2000 --learning-starts 1000 --hidden-sizes 128 128 \
    --policy-lr 7.3e-4 --q-lr 7.3e-4 --anneal-lr --tau 0.01 --policy-frequency 1 --compile
  python algos/sac.py --env-id HalfCheetah-v4 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT/sac" \
    --total-timesteps 1e5 --log-interval 2000 --learning-starts 5000 \
    --policy-lr 3e-4 --q-lr 3e-4 --policy-frequency 1
done
# The same in bfloat16, into a folder of its own.
for seed in 31 32 33; do
  python algos/sac.py --env-id HalfCheetah-v4 --cuda --seed $seed --eval-episodes 100 --runs-dir "$OUT/sac_bf16" \
    --total-timesteps 1e5 --log-interval 2000 --learning-starts 5000 \
    --policy-lr 3e-4 --q-lr 3e-4 --policy-frequency 1 --compile --bf16
done
# A million steps with Tianshou's flags (examples/mujoco/mujoco_sac.py: both learning rates 1e-3, a fixed temperature of 0.2,
# 10,000 random steps), in bfloat16, into a folder of its own: about 2 hours a run.
million() {
  python algos/sac.py --env-id "$1" --cuda --seed "$2" --eval-episodes 100 --runs-dir "$OUT/sac_million" \
    --total-timesteps 1e6 --eval-interval 2e5 --save-interval 1e5 --log-interval 5000 --learning-starts 10000 \
    --policy-lr 1e-3 --q-lr 1e-3 --alpha 0.2 --policy-frequency 1 --compile --bf16 --matmul-precision medium
}
for seed in 31 32 33; do
  million HalfCheetah-v4 $seed
done
million Hopper-v4 31

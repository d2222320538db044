#!/usr/bin/env bash
# The reference runs of algos/crossq.py on MuJoCo v4, one update a step, 5,000 random steps as the authors have.
# An hour or more a seed and task on a busy core with critics of 256 units. The paper's critics have 2,048, for a GPU:
#   CRITICS="2048 2048" runs/reference/crossq.sh
# Published at 100,000 and 300,000 steps, 10 seeds, critics of 2,048: HalfCheetah 8,112 ± 896 and 10,012 ± 1,112,
# Hopper 2,764 ± 781 and 2,644 ± 886, Walker2d 3,914 ± 1,641 and 5,941 ± 483.
# Runs land in $OUT/NAME ($OUT: runs/new). To keep them:
#   python runs/reference/collect.py runs/new/crossq --into runs/reference/results/crossq
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/new}
read -ra critics <<< "${CRITICS:-256 256}"
for seed in ${SEEDS:-31 32 33}; do
  for env in ${ENVS:-HalfCheetah-v4 Hopper-v4 Walker2d-v4}; do
    python algos/crossq.py --env-id $env --cuda --seed $seed --eval-episodes 100 --eval-interval 25000 \
      --total-timesteps ${STEPS:-1e5} --log-interval 2000 --learning-starts 5000 --hidden-sizes 256 256 \
      --critic-hidden-sizes "${critics[@]}" --no-capture-video --runs-dir "$OUT/crossq"
  done
done

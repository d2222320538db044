#!/usr/bin/env bash
# Memory: ppo_recurrent.py, with its LSTM and with a GRU, and ppo.py on the same tasks. Two hours on one core.
# MiniGrid: pip install -e ".[minigrid]". The tasks are in memory_envs.py.
# Runs land in $OUT/NAME ($OUT: runs/new). To keep them:
#   python runs/reference/collect.py runs/new/NAME --into runs/reference/results/NAME
set -euo pipefail
cd "$(dirname "$0")"
export PYTHONPATH="$PWD:${PYTHONPATH:-}"
OUT=$(realpath -m "${OUT:-../new}")
flags=(--allow-env-import --no-track --no-capture-video --save-interval 0 --eval-episodes 100)
pendulum=(--env-id memory_envs:PendulumNoVel-v1 --total-timesteps 1e5 --eval-interval 5e4 --num-envs 4 --num-steps 1024 \
  --num-minibatches 32 --update-epochs 10 --gamma 0.95 --gae-lambda 0.95)
mountain=(--env-id memory_envs:MountainCarContinuousNoVel-v0 --total-timesteps 3e5 --eval-interval 1e5 --num-envs 16 \
  --num-steps 128 --num-minibatches 4 --update-epochs 10 --gamma 0.999 --gae-lambda 0.95 --logstd-init 1 --ent-coef 0.01)
norm=(--norm-obs --norm-reward)  # defaults of ppo_recurrent.py
for seed in ${SEEDS:-31 32 33 34 35}; do
  for name in ${1:-cartpole pendulum mountaincar doorkey memory}; do
    length=()
    case $name in
      cartpole)
        task=(--env-id memory_envs:CartPoleNoVel-v1 --total-timesteps 1e5 --eval-interval 5e4 --num-steps 128)
        task+=(--gamma 0.99 --gae-lambda 0.95) ;;
      pendulum)
        task=("${pendulum[@]}")
        length=(--sequence-length 64) ;;
      mountaincar) task=("${mountain[@]}") ;;
      doorkey)
        task=(--env-id memory_envs:DoorKey-5x5-v0 --total-timesteps 1e5 --eval-interval 5e4 --num-steps 128 --num-minibatches 4)
        task+=(--update-epochs 10 --gamma 0.99 --gae-lambda 0.95 --ent-coef 0.01 --learning-rate 1e-3) ;;
      memory)
        task=(--env-id memory_envs:MemoryS7-v0 --total-timesteps 2e5 --eval-interval 1e5 --num-envs 16 --num-steps 128)
        task+=(--num-minibatches 4 --update-epochs 10 --gamma 0.99 --gae-lambda 0.95 --ent-coef 0.01) ;;
    esac
    for kind in ${KINDS:-gru lstm plain}; do
      case $kind in
        gru) script=(ppo_recurrent.py "${length[@]}" --no-lstm) ;;
        lstm) script=(ppo_recurrent.py "${length[@]}") ;;
        plain) script=(ppo.py "${norm[@]}") ;;
      esac
      python "../../algos/${script[0]}" "${task[@]}" "${script[@]:1}" --seed "$seed" "${flags[@]}" \
        --runs-dir "$OUT/memory_$kind"
    done
  done
done

#!/usr/bin/env bash
# Action masks: ppo.py on Taxi-v4 with its masks, and a fork of it that drops them. Ten minutes on one core.
# Runs land in $OUT/NAME ($OUT: runs/new). To keep them:
#   python runs/reference/collect.py runs/new/ppo_taxi --into runs/reference/results/ppo
#   python runs/reference/collect.py runs/new/ppo_without_masks_taxi --into runs/reference/results/ppo_without_masks
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/new}
mkdir -p "$OUT"
python - "$OUT/ppo_without_masks.py" <<'FORK'
import sys

text = open("algos/ppo.py").read()
text = text.replace("\nimport torch\n", "\nimport gymnasium as gym\nimport torch\n", 1).replace("wrap=None", "wrap")
wrapper = '''
class WithoutMasks(gym.Wrapper):
    def reset(self, **kwargs):
        return self.env.reset(**kwargs)[0], {}

    def step(self, action):
        return *self.env.step(action)[:4], {}


def wrap(env):
    return WithoutMasks(env)


def main(args'''
open(sys.argv[1], "w").write(text.replace("\ndef main(args", wrapper, 1))
FORK
for seed in 31 32 33 34 35; do
  for script in algos/ppo.py "$OUT/ppo_without_masks.py"; do
    python "$script" --env-id Taxi-v4 --seed $seed --eval-episodes 100 --eval-interval 50000 --save-interval 0 \
      --total-timesteps 2e5 --gamma 0.99 --gae-lambda 0.95 --num-steps 128 --num-minibatches 4 --update-epochs 10 \
      --ent-coef 0.01 --no-track --no-capture-video --runs-dir "$OUT/$(basename "$script" .py)_taxi"
  done
done

"""Runs a script as a user does, with a hash over all that happens in it, and leaves the hash in the run directory.

python tests/helpers/chained.py SCRIPT FLAGS...

The hash covers every observation, action, reward, ending, episode and logged metric of training, in their order. It is
saved and restored as a part of the script's checkpoint, so it is that of an uninterrupted run only if nothing was
left out, repeated or changed.
"""

import hashlib
import sys

import conftest
import torch

import common
import common.checkpoint
from common.args import RANK


class Chain:
    def __init__(self):
        self.digest = b""

    def add(self, *things):
        sha = hashlib.sha256(self.digest)
        for thing in things:
            sha.update(thing.numpy(force=True).tobytes() if isinstance(thing, torch.Tensor) else repr(thing).encode())
        self.digest = sha.digest()

    def state_dict(self):
        return {"digest": self.digest}

    def load_state_dict(self, state):
        self.digest = state["digest"]


class Checkpoint(common.checkpoint.Checkpoint):
    def __init__(self, run, envs, **parts):
        chain = Chain()
        step, log, finish = envs.step, run.log, run.finish

        def chained_step(actions):
            result = step(actions)
            episode = result[4].get("episode", {})
            chain.add(actions, *result[:4], [episode[key].tolist() for key in sorted(episode)])
            return result

        def chained_log(metrics, global_step):
            chain.add(global_step, *(part for key in sorted(metrics) for part in (key, torch.as_tensor(metrics[key]))))
            log(metrics, global_step)

        def chained_finish():
            finish()
            (run.dir / f"chain{RANK or ''}").write_text(chain.digest.hex())

        envs.step, run.log, run.finish = chained_step, chained_log, chained_finish
        super().__init__(run, envs, **parts, chain=chain)


if __name__ == "__main__":
    common.Checkpoint = Checkpoint
    script = conftest.load(sys.argv[1])
    script.main(common.parse(script.Args, argv=sys.argv[2:]))

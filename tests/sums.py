"""One of the processes that test_shared.py starts, with what torchrun puts into the environment.

python tests/sums.py FILE CASE        # the process ids of all come in a line of JSON on stdin
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch

from common.args import RANK, WORLD_SIZE
from common.shared import LIMIT, SharedSum

ROUNDS = 400


def tensors(number):
    """What each process brings to a round: of another size and dtype each time."""
    generator = torch.Generator().manual_seed(number)
    dtype = (torch.float32, torch.float64, torch.int64)[number % 3]
    most = LIMIT // dtype.itemsize
    size = [1, 7, most, int(torch.randint(1, 5000, (), generator=generator))][0 if number == 0 else number % 4]
    return [torch.randint(-1000, 1000, (size,), generator=generator).to(dtype) for _ in range(WORLD_SIZE)]


def equal(reduce):
    """Sums of whole numbers are exact, whatever their order; those of others must be the same everywhere."""
    bits = hashlib.sha256()
    delays = torch.Generator().manual_seed(7 + RANK)
    for number in range(ROUNDS):
        parts = tensors(number)
        if number % 20 == RANK:
            time.sleep(float(torch.rand((), generator=delays)) * 0.02)  # longer than the others stay awake
        x = parts[RANK].clone()
        reduce(x)
        assert torch.equal(x, sum(parts[1:], parts[0])), number
        if x.dtype != torch.int64:
            x = (parts[RANK] / 7).view(-1, 1)
            reduce(x)
            torch.testing.assert_close(x, sum(part / 7 for part in parts).view(-1, 1))
            bits.update(x.numpy().tobytes())
    return bits.hexdigest()


def main(path, case):
    reduce = SharedSum(Path(path), json.loads(sys.stdin.readline()), timeout=1.0 if case == "hangs" else 60.0).sum_
    if case == "equal":
        print(equal(reduce))
        return
    for _ in range(3):
        reduce(torch.zeros(3))
    if RANK == 1:
        if case == "hangs":
            time.sleep(3)
        os._exit(9)
    began = time.monotonic()
    try:
        reduce(torch.zeros(3))
    except RuntimeError as error:
        print(f"{time.monotonic() - began:.3f} {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The states of the random number generators of a process."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from common.args import RANK


def seed_everything(seed: int) -> None:
    """Seeds python, numpy and torch; each process of torchrun with numbers of its own."""
    if RANK > 0:
        seed = int(np.random.SeedSequence(seed, spawn_key=(RANK,)).generate_state(1, np.uint64)[0] >> 1)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - for environments and forks that draw from it
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy_state = np.random.get_state()  # noqa: NPY002
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


@contextlib.contextmanager
def isolated_rng(seed: int, network: Any = None) -> Iterator[None]:
    """Puts random generators and the network's training modes back afterwards; inside, draws depend on `seed` alone."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    modules = list(network.modules()) if isinstance(network, nn.Module) else []
    modes = [module.training for module in modules]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        for module in modules:
            module.training = False
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)
            for module, training in zip(modules, modes, strict=True):  # train() would wake up layers a fork has frozen
                module.training = training

"""policy.pt: the weights of the trained policy, and the names that lead back to its network."""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from common.internals.resume.files import write_atomically


def save_policy(policy: Callable[[Tensor], Tensor], path: Path) -> None:
    """Writes the network's weights and the names that lead back to `policy`; atomic.

    Raises:
        TypeError: `policy` is not a method of a network.
    """
    network = getattr(policy, "__self__", None)
    if not isinstance(network, nn.Module):
        raise TypeError("a policy is a method of a network, for example q_network.greedy")
    saved = {
        "format": 1,
        "network": type(network).__name__,
        "method": policy.__name__,
        "state_dict": {key: value.detach().cpu().clone() for key, value in network.state_dict().items()},
    }
    written = io.BytesIO()
    torch.save(saved, written)
    write_atomically(path, written.getvalue())

"""policy.pt: the weights of the trained policy, and the names that lead back to its network."""

import io
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.internals.resume.files import write_atomically


def save_policy(policy: Any, path: Path, wrap: Any = None) -> None:
    """Writes the network's weights and the names that lead back to `policy`, and to the environments' `wrap`; atomic.

    Raises:
        TypeError: `policy` is not a method of a network, or `wrap` is not a function at the top level of a script.
    """
    network = getattr(policy, "__self__", None)
    if not isinstance(network, nn.Module):
        raise TypeError("a policy is a method of a network, for example q_network.greedy")
    name = getattr(wrap, "__name__", "")
    if wrap is not None and getattr(sys.modules.get(wrap.__module__), name, None) is not wrap:
        raise TypeError("`wrap` of make_envs must be a function at the top level of the script: evaluate looks there")
    saved = {
        "format": 1,
        "network": type(network).__name__,
        "method": policy.__name__,
        "wrap": name,
        "state_dict": {key: value.detach().cpu().clone() for key, value in network.state_dict().items()},
    }
    written = io.BytesIO()
    torch.save(saved, written)
    write_atomically(path, written.getvalue())

"""Arguments are checked by type and, where the name is CleanRL's or ours, by range. Imports nothing of common."""

import contextlib
import dataclasses
import re
import sys
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_ABOVE_0, _FINITE = 5e-324, sys.float_info.max
_MOST = 2**53 - 1  # beyond it float64 has gaps
# A name that is not listed here may be a fork's own: any number is allowed.
_BOUNDS = {
    name: (low, high)
    for low, high, names in (
        (1, _MOST, "total_timesteps buffer_size batch_size num_steps num_minibatches update_epochs n_step n_atoms"),
        (1, _MOST, "train_frequency policy_frequency target_network_frequency"),
        (1, 4096, "num_envs"),
        (1, 1024, "torch_threads"),
        (0, 1024, "resize"),
        (0, 64, "frame_stack"),
        (1, 65536, "hidden_sizes critic_hidden_sizes memory_size"),
        (0, _MOST, "eval_episodes eval_max_steps eval_interval save_interval log_interval learning_starts"),
        (0, _MOST, "sequence_length"),
        (0, _FINITE, "alpha ent_coef vf_coef exploration_noise policy_noise noise_clip"),
        (0, 4_000_000, "env_timeout"),  # seconds; a wait can be no longer on Windows
        (_ABOVE_0, _FINITE, "learning_rate policy_lr q_lr clip_coef max_grad_norm target_kl"),
        (0, 1, "gamma gae_lambda q_lambda start_e end_e exploration_fraction"),
        (0, 1, "prioritized_replay_alpha prioritized_replay_beta"),
        (_ABOVE_0, 1, "tau"),
        (0, 2**32 - 1, "seed"),  # what numpy.random.seed takes
        (-_FINITE, _FINITE, "stop_at_return"),
        (-20, 20, "logstd_init"),  # exp(20) is 5e8
    )
    for name in names.split()
}
_NAMES = {"env_id", "runs_dir", "resume", "wandb_project", "wandb_entity", "wandb_group", "wandb_name"}
_NOT_IN_NAMES = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")  # control characters and ends of lines


def check_arguments(args: Any) -> None:
    """Checks the fields of a dataclass against their types and bounds; a tuple that JSON made a list is one again.

    Raises:
        ValueError: names the flag, what is allowed and what was given.
    """
    hints = type_hints(type(args))
    for field in dataclasses.fields(args):
        name, value, hint = field.name, getattr(args, field.name, None), hints.get(field.name)
        flag = "--" + name.replace("_", "-")
        if isinstance(value, list):
            value = from_json(value, hint)
            setattr(args, name, value)
        # A default that does not fit its own type (`target_kl: float = None`) may be given as well.
        as_default = type(value) is type(field.default) and not fits(field.default, hint)
        if field.init and not as_default and not fits(value, hint):
            raise ValueError(f"{flag} must be {type_name(hint)}, not {value!r:.60}")
        for number in value if isinstance(value, list | tuple) else (value,):
            if name in _BOUNDS and isinstance(number, int | float) and not isinstance(number, bool):
                _check_bounds(flag, number, *_BOUNDS[name])
        if name in _NAMES and value is not None and (not value.strip() or _NOT_IN_NAMES.search(value)):
            raise ValueError(f"{flag} must be a name on one line, not {value!r:.60}")
    buffer_size = getattr(args, "buffer_size", None)  # None in a fork that sizes it later
    batch_size, num_envs = getattr(args, "batch_size", 1), getattr(args, "num_envs", 1)
    if isinstance(buffer_size, int) and isinstance(batch_size, int) and buffer_size < max(num_envs, batch_size):
        raise ValueError(f"--buffer-size {buffer_size} holds no batch of {batch_size} from {num_envs} environments")


def _check_bounds(flag: str, number: float, low: float, high: float) -> None:
    if not abs(number) <= _FINITE:
        raise ValueError(f"{flag} must be a finite number, not {number}")
    if low <= number <= high:
        return
    least = "above 0" if low == _ABOVE_0 else f"at least {low}"
    if high == 1 and number != 0:
        least = "between 0 and 1"
    raise ValueError(f"{flag} must be {least if number < low or high == 1 else f'at most {high}'}, not {number}")


def type_hints(args_class: type) -> dict[str, Any]:
    """The types of its fields; none if a fork names one that only a type checker sees."""
    try:
        return get_type_hints(args_class)
    except Exception:
        return {}


def type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint`. An int is a float too, and a bool neither; an unknown hint fits all.

    Own code, as importing typeguard takes 0.8 s.
    """
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if kind is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    if kind is tuple and parts and isinstance(value, tuple):
        each = parts[:1] * len(value) if parts[1:] == (...,) else parts
        return len(each) == len(value) and all(map(fits, value, each))
    if kind is list and parts and isinstance(value, list):
        return all(fits(item, parts[0]) for item in value)
    with contextlib.suppress(TypeError):  # a protocol
        return not isinstance(kind, type) or kind is Any or isinstance(value, kind)
    return True


def from_json(value: Any, hint: Any) -> Any:
    """A list that JSON made of a tuple is a tuple again, unless `hint` says that it was a list."""
    if not isinstance(value, list) or fits(value, hint):
        return value
    return tuple(from_json(item, tuple) for item in value)

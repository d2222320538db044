"""Environment ids: what one that is not registered was meant to be. In one line, and without gymnasium's warnings."""

import contextlib
import difflib
import re
import warnings

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec, get_env_id

from common.args import fail, warn

_PARTS = re.compile(r"(?is)^(.*?)((?:-ram)?(?:Deterministic|NoFrameskip)?)(?:-v(\d+))?$")  # a name, Atari's, version
_FIRST_REGISTERED = frozenset(gym.registry)
# At import, as the processes of --async-envs make environments as well; `spec_of` reports an old version once.
warnings.filterwarnings("ignore", ".*The environment .* is out of date", DeprecationWarning)


def spec_of(env_id: str, module: str = "") -> EnvSpec:
    """The registered specification; ends the process with code 2 and one line if there is none."""
    spec = gym.registry.get(env_id)
    if spec is None or not _usable(spec, module):
        fail(f"--env-id {module}:{env_id}: {_ids_of(module, env_id)}" if module else _meant(env_id))
    if (newest := _newest(spec)) != env_id:
        warn(f"{env_id} is an old version; the newest is {newest}", once=env_id)
    return spec


def _usable(spec: EnvSpec, module: str = "") -> bool:
    """Neither removed from gymnasium nor one of ale_py's old ids, which have no preprocessing."""
    old_game = str(spec.entry_point).startswith("ale_py") and spec.namespace != "ALE" and not module
    return "_raise_mujoco" not in str(spec.entry_point) and not old_game


def _newest(spec: EnvSpec) -> str:
    versions = [each for each in gym.registry.values() if (each.namespace, each.name) == (spec.namespace, spec.name)]
    return max(filter(_usable, versions), key=lambda each: each.version or 0, default=spec).id


def _ids_of(module: str, env_id: str) -> str:
    """What the imported `module` registers, the likest first."""
    package = module.partition(".")[0]
    made_by = {each: str(spec.entry_point).partition(".")[0] for each, spec in gym.registry.items()}
    others = _FIRST_REGISTERED | {each for each in made_by if made_by[each] == "ale_py"}
    ids = [each for each in made_by if each not in others or made_by[each] == package]
    ids.sort(key=lambda each: -difflib.SequenceMatcher(None, env_id.lower(), each.lower()).ratio())
    return f"{module} registers {', '.join(ids[:8]) or 'no environment'}{', ...' * (len(ids) > 8)}"


def _meant(env_id: str) -> str:
    with contextlib.suppress(ImportError):
        import ale_py  # noqa: F401 - registers the games
    no_such = f"--env-id {env_id}: there is no such environment"
    ((name, of_atari, version),) = _PARTS.findall(env_id)
    game = f"ALE/{name[:1].upper()}{name[1:]}-v5"
    specs = sorted(filter(_usable, gym.registry.values()), key=lambda spec: spec.namespace or "", reverse=True)
    # Of the same name in two namespaces, the last: that of none.
    by_name = {(re.sub(r"-v\d+$", "", spec.id) if "/" in name else spec.name).lower(): spec for spec in specs}
    if of_atari:
        meant = game
    elif near := difflib.get_close_matches(name.lower(), by_name, 1, 0.7):
        spec = by_name[near[0]]
        same = gym.registry.get(get_env_id(spec.namespace, spec.name, int(version or -1)))
        meant = same.id if same and _usable(same) else _newest(spec)
    else:
        games_known = "/" in name or any(spec.namespace == "ALE" for spec in specs)  # else ale_py is not installed
        atari = "" if games_known else f"; an Atari game is {game}"
        return f"{no_such}; one of another package is PACKAGE:{env_id}, with --allow-env-import{atari}"
    preprocessing = " (with the standard preprocessing)" * meant.startswith("ALE/")
    return f"{no_such}; did you mean {meant}{preprocessing}?"

"""Keeps secrets out of what a run writes and uploads: known by their values, never by a name beside them."""

import base64
import contextlib
import json
import os
import re
import signal
import sys
from typing import Any
from urllib.parse import quote, quote_plus

REDACTED = "[redacted]"
LEAST = 8  # characters of a secret
_SECRET_NAME = re.compile(
    r"(?i)passw|passphrase|secret|credential|(api|access|private)_?key|(^|_)(tokens?|keys?)(_|$)|_pwd$|pass$"
)
# Not secret, though in a variable with a secret's name: a word or dotted name, a number or address, an environment id.
# Code and arguments are full of them.
_ORDINARY = re.compile(r"[A-Za-z]{1,12}([_./][A-Za-z]{1,12})*|[\d.:,_+-]+|[\w./:-]+-v\d+")
_KEY_BLOCK = r"(?:[A-Z]+ ){0,3}PRIVATE KEY(?: BLOCK)?"
_PATTERNS = [
    re.compile(pattern)
    for pattern in (
        r"(\w://[^\s/@:\"'<>(){}\[\]\\]*:)(?!\$|%[^0-9A-Fa-f])[^\s/@\"'<>(){}\[\]\\]+(?=@)",  # scheme://user:password@
        r"(\w://)[\w.~%-]{20,}(?=@)",  # https://TOKEN@host
        r"()(?<![\w-])sk-(?:(?:proj|ant|or|svcacct|admin)-[\w-]{16,}|(?=[A-Za-z]*\d)[A-Za-z0-9]{16,})",
        r"()(?<!\w)(?:gh[oprsu]|hf)_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{16,}",
        r"()(?<!\w)(?:github_pat_|wandb_v1_)(?=[a-z_]*[A-Z0-9])\w{20,}",
        r"()(?<!\w)(?:glpat-|xox[abeprs]-)(?=[a-z-]*[A-Z0-9])[\w-]{12,}",
        r"()(?<!\w)(?:AKIA|ASIA)[0-9A-Z]{16}(?!\w)",
        r"()(?<!\w)AIza[\w-]{35}",
        r"()(?<!\w)eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*",  # a JSON web token
        rf"()-----BEGIN {_KEY_BLOCK}-----(?:[\w+/=\s\\:,.\"']|-(?!-))*+-----END {_KEY_BLOCK}-----",
    )
]


def redact(value: Any) -> Any:
    """`value` with every secret in it replaced by "[redacted]"; text, bytes, and dicts, lists and tuples of them.

    Secret are the values of environment variables whose names say so (..._KEY, ..._TOKEN, ..._SECRET, PASSWORD and
    the like), passwords in URLs, and keys with a prefix of their issuer. Values shorter than 8 characters, ordinary
    ones (a word, a number, an environment id) and names of existing files are not secret.
    """
    return _redact(value, _secrets())


def _redact(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _redact(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_redact(item, secrets) for item in value)
    if isinstance(value, bytes):
        return _redact(value.decode("utf-8", "surrogateescape"), secrets).encode("utf-8", "surrogateescape")
    if not isinstance(value, str):
        return value
    for secret in secrets:
        value = value.replace(secret, REDACTED)
    for pattern in _PATTERNS:
        value = pattern.sub(rf"\1{REDACTED}", value)
    return value


def _secrets() -> list[str]:
    """The secrets of the environment, each as it is and as URLs, JSON and base64 write it; the longest first."""
    found = set()
    for name, value in os.environ.items():
        value = value.strip()
        if len(value) < LEAST or _ORDINARY.fullmatch(value) or not _SECRET_NAME.search(name) or os.path.exists(value):
            continue
        raw = value.encode("utf-8", "surrogateescape")
        found |= {value, quote(raw, safe=""), quote(raw), quote_plus(raw)}
        found |= {json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
        found |= {encode(raw).decode().rstrip("=") for encode in (base64.b64encode, base64.urlsafe_b64encode)}
    return sorted(found, key=len, reverse=True)


def filter_lines(path: str) -> None:
    """Appends stdin to the file at `path`, line by line, without secrets, until the last writer has ended.

    Neither a full disk, which loses lines, nor a signal ends it: its writers would end as well.
    """
    for number in {"SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"} & set(dir(signal)):
        signal.signal(getattr(signal, number), signal.SIG_IGN)
    with open(path, "ab", buffering=0) as file:
        for line in iter(lambda: sys.stdin.buffer.readline(1 << 20), b""):
            with contextlib.suppress(OSError):
                file.write(redact(line))


if __name__ == "__main__":
    filter_lines(sys.argv[1])

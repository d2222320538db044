"""Keeps secrets out of what a run writes down and uploads: its arguments, the copies of its code, the command line."""

import os
import re
from typing import Any

REDACTED = "[redacted]"
_WORD = r"(?:api_?key|access_?key|private_?key|token|secret|passw(?:or)?d|passphrase|credentials?)"
_NAME = re.compile(rf"(?:^|[_-])(?:{_WORD}|key)(?:$|[_-])", re.IGNORECASE)
_PATTERNS = [
    re.compile(pattern)
    for pattern in (
        rf"(?i)(\b\w*{_WORD}\w*[\"']?\s*[:=]\s*[rbf]{{0,2}}([\"']))[^\"'\n]{{6,}}?(?=\2)",  # api_key = "..."
        rf"(?i)(--?[\w-]*{_WORD.replace('_', '[_-]')}[\w-]*[= ])[^\s\"']{{6,}}",  # --api-key ...
        r"(\w+://)[^\s/@\"']+(?=@)",  # https://user:password@host
        r"()\b(?:sk-|gh[opsu]_|github_pat_|glpat-|hf_|xox[abprs]-|wandb_v1_|AKIA|AIza)[\w-]{12,}",
        r"()\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",  # a JSON web token
        r"()-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?-----END [A-Z ]*PRIVATE KEY-----",
    )
]


def redact(value: Any) -> Any:
    """`value` with every secret in it replaced by "[redacted]"; text, and dicts, lists and tuples of it.

    Secret is what an environment variable holds, or an entry of a dict, whose name says so (..._KEY, ..._TOKEN,
    password); what is assigned to such a name in code; a password in a URL; and keys of well-known forms.
    """
    if isinstance(value, dict):
        return {
            key: REDACTED if isinstance(item, str) and item and _NAME.search(str(key)) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(redact(item) for item in value)
    return _text(value) if isinstance(value, str) else value


def redact_argv(argv: list[str]) -> list[str]:
    """A command line; the word after `--api-key` is secret too."""
    after_name = [False, *(word.startswith("--") and "=" not in word and bool(_NAME.search(word)) for word in argv)]
    return [
        REDACTED if hidden and not word.startswith("--") else _text(word)
        for hidden, word in zip(after_name, argv, strict=False)
    ]


def _text(text: str) -> str:
    for name, secret in os.environ.items():
        if len(secret) >= 8 and _NAME.search(name):
            text = text.replace(secret, REDACTED)
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\1{REDACTED}", text)
    return text

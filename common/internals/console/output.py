"""Printing that never raises. Imports nothing of common."""

import contextlib
import os
import sys
from typing import TextIO


def say(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Prints and never raises. Characters that the stream cannot encode become "?".

    After a write error (`| head`, a full disk) the stream is redirected to nowhere.
    """
    stream = stream or sys.stdout
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), end=end, file=stream, flush=True)
    except OSError:
        with contextlib.suppress(Exception), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())  # or Python fails again when it flushes at exit
    except Exception:  # not a usable stream, so there is nowhere to report it
        return

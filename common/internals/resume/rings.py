"""Large rings (the replay) in checkpoints: each writes only the slots that are new since the one before, as a file."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.internals.resume.checkpoint_files import read_file, write_file

Segment = tuple[str, int, int]  # file, first slot, last slot


class RingFiles:
    """The files that hold the rings of a run's parts, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.segments: dict[str, list[Segment]] = {}  # of each part
        self.older_files: set[str] = set()  # those that the older one of the kept checkpoints needs

    def save(self, name: str, part: Any) -> list[Segment]:
        """Writes the slots of `part` filled since the last time; returns all files that together hold its rings."""
        rings, written = part.rings()
        kept = [s for s in self.segments.get(name, []) if s[2] > written - max(map(len, rings.values()))]
        first = kept[-1][2] if kept else 0
        if written > first:
            content = {}
            for key, ring in rings.items():
                slots = np.arange(max(first, written - len(ring)), written) % len(ring)
                content[key] = torch.from_numpy(ring[slots])
            file = f"{name}-{first:012d}-{written:012d}.pt"
            write_file(self.folder / file, content)
            kept.append((file, first, written))
        self.segments[name] = kept
        return kept

    def load(self, name: str, part: Any, segments: list[Segment]) -> None:
        rings, _ = part.rings()
        for file, first, last in segments:
            content = read_file(self.folder / file)
            for key, ring in rings.items():
                slots = np.arange(max(first, last - len(content[key])), last) % len(ring)
                ring[slots] = content[key].numpy()
        self.segments[name] = segments
        self.older_files |= {file for file, _, _ in segments}

    def prune(self) -> None:
        """Removes the files that neither the newest checkpoint nor the one before needs."""
        files = {file for segments in self.segments.values() for file, _, _ in segments}
        for path in self.folder.glob("*.pt"):
            if not path.name.startswith("step-") and path.name not in files | self.older_files:
                path.unlink(missing_ok=True)
        self.older_files = files

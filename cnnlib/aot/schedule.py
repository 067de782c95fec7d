"""Read how many cycles a TPU's core takes for each operation, from libtpu's dump of its final schedules.

A TPU core runs one bundle of instructions per cycle. libtpu writes the bundles of each operation into a file when
`--xla_jf_dump_to` asks for it. Counting them, loops with their trip counts, gives the cycles of the operation but for
waits on memory; loops of unknown length count once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

PASSES = "^(final_bundles|deduplication-map)$"
BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+((?:[A-Z]{2}\s?)*)\s*:\s*(>*(?: ?>)*)")
EXIT = re.compile(r"scmp\.g[et]\.s32\.totalorder %\w+, (\d+) /\* loop exit test \*/")


def flags(folder: Path) -> str:
    """Return the arguments with which libtpu writes its schedules into a folder."""
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={PASSES}"


@dataclass
class Loop:
    """A loop that is being read."""

    bundles: int = 0
    stages: int = 0
    """Of software pipelining: the loop runs so many times more often than its trip count says."""
    trips: int = 1


@dataclass
class Reader:
    """Sums up the bundles of one file, whose lines show the depth of loops by as many `>`."""

    loops: list[Loop] = field(default_factory=lambda: [Loop()])

    def close(self) -> None:
        """End the innermost loop."""
        done = self.loops.pop()
        self.loops[-1].bundles += done.bundles * max(1, done.trips - done.stages)

    def read(self, line: str) -> None:
        """Take one line."""
        found = BUNDLE.match(line)
        if not found or "{" not in line:
            return
        # An empty bundle shows no depth: it is of the loop of the line before.
        depth = len(self.loops) - 1 if re.search(r":\s*\{\}", line) else found[2].count(">")
        begins = "LB" in found[1]
        while len(self.loops) - 1 > depth or (begins and len(self.loops) - 1 >= max(depth, 1)):
            self.close()
        while len(self.loops) - 1 < depth:
            self.loops.append(Loop())
        loop = self.loops[-1]
        loop.bundles += 1
        if depth:
            stages = [int(stage) for stage in re.findall(r"iteration index, stage = (\d+)", line)]
            loop.stages = max([loop.stages, *stages])
            if limit := EXIT.search(line):
                loop.trips = int(limit[1])


def cycles_of(path: Path) -> int:
    """Count the bundles that one operation issues."""
    reader = Reader()
    with path.open(errors="replace") as lines:
        for line in lines:
            reader.read(line)
    while len(reader.loops) > 1:
        reader.close()
    return reader.loops[0].bundles


def schedules(folder: Path) -> dict[str, int]:
    """Return the cycles of each operation of the program that was compiled last, by name."""
    found: dict[str, int] = {}
    alike: list[list[str]] = []
    for path in sorted(folder.iterdir()):
        name = re.fullmatch(r"\d+-(.+)-\d\d-final_bundles\.txt", path.name)
        if name and not name[1].endswith("schedule-analysis"):
            found[name[1]] = cycles_of(path)
        elif path.name.endswith("deduplication-map.txt"):
            # Operations of equal code: a key, and the names that share its schedule, indented.
            for line in path.read_text(errors="replace").splitlines():
                if line.startswith("key:"):
                    alike.append([line.removeprefix("key:").strip()])
                elif line.startswith("  "):
                    alike[-1].append(line.strip())
    for group in alike:
        known = next((found[alias] for alias in group if alias in found), None)
        for alias in group if known is not None else ():
            found.setdefault(alias, known or 0)
    return found


def forget(folder: Path) -> None:
    """Remove the schedules of the program before."""
    for path in folder.iterdir():
        path.unlink()

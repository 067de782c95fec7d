"""Count the cycles of each operation on a TPU core, from libtpu's dump of its final schedules.

A TPU core runs one bundle of instructions per cycle. With `--xla_jf_dump_to`, libtpu writes the bundles of each
operation into a file: the schedule of the operation. We count the bundles, and multiply the bundles in a loop by the
trip count of the loop. If the trip count is unknown, the loop counts once. The total is the number of cycles, without
waits for memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

PASSES = "^(final_bundles|deduplication-map)$"
BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+((?:[A-Z]{2}\s?)*)\s*:\s*(>*(?: ?>)*)")
EXIT = re.compile(r"scmp\.g[et]\.s32\.totalorder %\w+, (\d+) /\* loop exit test \*/")


def flags(folder: Path) -> str:
    """Return the arguments that make libtpu write its schedules into `folder`."""
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={PASSES}"


@dataclass
class Loop:
    """A loop while it is parsed."""

    bundles: int = 0
    stages: int = 0
    """Stages of software pipelining. `Reader.close` multiplies `bundles` by `trips - stages`, but at least by 1."""
    trips: int = 1


@dataclass
class Reader:
    """Add up the bundles of one file. In each line, the number of `>` is the depth of loops."""

    loops: list[Loop] = field(default_factory=lambda: [Loop()])

    def close(self) -> None:
        """Close the innermost loop and add its bundles to the loop around it."""
        done = self.loops.pop()
        self.loops[-1].bundles += done.bundles * max(1, done.trips - done.stages)

    def read(self, line: str) -> None:
        """Parse one line."""
        found = BUNDLE.match(line)
        if not found or "{" not in line:
            return
        # An empty bundle shows no depth. It belongs to the same loop as the previous line.
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
    """Return the number of bundles that one operation issues, from its schedule file."""
    reader = Reader()
    with path.open(errors="replace") as lines:
        for line in lines:
            reader.read(line)
    while len(reader.loops) > 1:
        reader.close()
    return reader.loops[0].bundles


def schedules(folder: Path) -> dict[str, int]:
    """Return the cycles of each operation of the last compiled program, by the operation's name."""
    found: dict[str, int] = {}
    alike: list[list[str]] = []
    for path in sorted(folder.iterdir()):
        name = re.fullmatch(r"\d+-(.+)-\d\d-final_bundles\.txt", path.name)
        if name and not name[1].endswith("schedule-analysis"):
            found[name[1]] = cycles_of(path)
        elif path.name.endswith("deduplication-map.txt"):
            # Operations with equal code share a schedule. The file lists each group: a line with the key of the
            # schedule, then indented lines with the names of the operations.
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
    """Delete the schedules of the previous program."""
    for path in folder.iterdir():
        path.unlink()

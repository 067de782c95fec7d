"""Parse the text (HLO) of programs that XLA has optimised: list the operations, their runs, and the bytes they move."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

FREE = frozenset(
    {
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "iota",
        "opt-barrier",
        "add-dependency",
        "domain",
        "copy-done",
        "async-done",
        "async-update",
    }
)
"""Operations that have no cost of their own."""
ASYNCHRONOUS = frozenset({"copy-start", "slice-start", "slice-done"})
"""Copies between memories that run in parallel with other work."""
COLLECTIVES = frozenset(
    {
        "all-reduce",
        "all-gather",
        "reduce-scatter",
        "all-to-all",
        "collective-permute",
        "collective-broadcast",
        "ragged-all-to-all",
        "all-reduce-start",
        "all-gather-start",
        "collective-permute-start",
    }
)
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8}
ELSEWHERE = re.compile(r"[a-z]+\d*\[[\d,]*\]\{[^}]*S\([1-9]\d*\)[^}]*\}")
"""Match the shape of an array that lies outside main memory, for example in a memory on the chip."""


@dataclass(frozen=True)
class Instruction:
    """One operation of a computation, parsed from the text of the program."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, key: str) -> str | None:
        """Return the computation that the attribute `key`, such as `body`, names. Return None if there is none."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def kind(self) -> str:
        """The opcode; for a library call, also its target."""
        target = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return f"{self.opcode} {target[1]}" if target else self.opcode

    @property
    def source(self) -> str:
        """The JAX operation that the instruction comes from, or an empty string."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclass(frozen=True)
class Computation:
    """A computation: its instructions by name, in the order of the text."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose value is the result of the computation."""
        return next(i for i in self.instructions.values() if i.is_root)


@dataclass(frozen=True)
class Frame:
    """A computation at the place where it runs.

    For the body or condition of a loop, `caller` is the frame that contains the loop, and `operand` is the name of the
    loop's operand in that frame.
    """

    computation: Computation
    caller: Frame | None = None
    operand: str = ""


@dataclass(frozen=True)
class Cost:
    """An instruction that runs `times` times in total."""

    computation: Computation
    instruction: Instruction
    times: int


class Program:
    """The optimised program in the text of `compiled.as_text()`."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation | None = None
        for line in text.splitlines():
            if current is None:
                found = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$", line)
                if found:
                    current = self.computations.setdefault(found[2], Computation(found[2]))
                    self.entry = found[2] if found[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif (instruction := parse_instruction(line)) is not None:
                current.instructions[instruction.name] = instruction

    def costs(self) -> Iterator[Cost]:
        """Yield every instruction that runs, with its number of runs. Only the first branch of a conditional counts.

        Raises ValueError if the trip count of a loop does not follow from the program.
        """
        return self._walk(Frame(self.computations[self.entry]), 1)

    def _walk(self, frame: Frame, times: int) -> Iterator[Cost]:
        for instruction in frame.computation.instructions.values():
            opcode = instruction.opcode
            if opcode == "while":
                body = self.computations[instruction.called("body") or ""]
                inside = Frame(body, frame, instruction.operands[0])
                yield from self._walk(inside, times * self._trips(instruction, frame))
            elif opcode in ("call", "async-start"):
                callee = instruction.called("to_apply") or instruction.called("calls")
                if callee:
                    yield from self._walk(Frame(self.computations[callee]), times)
            elif opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
                first = (
                    re.findall(r"%?([\w.\-]+)", branches[1])[0] if branches else instruction.called("true_computation")
                )
                yield from self._walk(Frame(self.computations[first or ""]), times)
            elif opcode not in FREE:
                yield Cost(frame.computation, instruction, times)

    def _trips(self, loop: Instruction, frame: Frame) -> int:
        """Return how often a loop runs, from the compiler's annotation or from the constants in its condition."""
        known = re.search(r'known_trip_count":?\{"?n"?[:=]"?(\d+)', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition") or ""]
        root, inside = condition.root, Frame(condition, frame, loop.operands[0])
        compared = list(root.operands)
        if root.opcode == "fusion":
            callee = self.computations[root.called("calls") or ""]
            positions = {i.name: int(i.operands[0]) for i in callee.instructions.values() if i.opcode == "parameter"}
            root = callee.root
            compared = [root_operand(root, name, positions, compared) for name in root.operands]
        direction = re.search(r"direction=(\w+)", root.attributes)
        if root.opcode == "compare" and direction and len(compared) == 2:
            first, last = (self._constant(inside, name) for name in compared)
            if first is not None and last is not None:
                steps = {"LT": last - first, "LE": last - first + 1, "GT": first - last, "GE": first - last + 1}
                if direction[1] in steps:
                    return max(0, steps[direction[1]])
        raise ValueError(f"the trip count of the loop {loop.name} is unknown")

    def _constant(self, frame: Frame, name: str) -> int | None:
        """Trace a value back to its initial constant, through copies, tuples and the operands of loops."""
        instruction = frame.computation.instructions.get(name)
        if instruction is None:
            return None
        if instruction.opcode == "constant":
            return int(instruction.operands[0]) if re.fullmatch(r"-?\d+", instruction.operands[0]) else None
        if instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start", "reshape"):
            return self._constant(frame, instruction.operands[0])
        if instruction.opcode == "get-tuple-element":
            index = re.search(r"index=(\d+)", instruction.attributes)
            return self._element(frame, instruction.operands[0], int(index[1])) if index else None
        return None

    def _element(self, frame: Frame, name: str, index: int) -> int | None:
        instruction = frame.computation.instructions.get(name)
        if instruction is None:
            return None
        if instruction.opcode == "tuple":
            return self._constant(frame, instruction.operands[index])
        if instruction.opcode in ("while", "opt-barrier"):  # assumes that a loop leaves this element unchanged
            return self._element(frame, instruction.operands[0], index)
        if instruction.opcode == "parameter" and frame.caller is not None:
            return self._element(frame.caller, frame.operand, index)
        return None


def root_operand(root: Instruction, name: str, positions: dict[str, int], operands: list[str]) -> str:
    """Return the operand that a fusion passes to its parameter `name`. If `name` is no parameter, return `name`."""
    return operands[positions[name]] if name in positions else name


def parse_instruction(line: str) -> Instruction | None:
    """Parse one line of a computation. Return None if the line holds no instruction."""
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = re.sub(r"/\*index=\d+\*/", "", line[found.end() :])
    if rest.startswith("("):
        end = closing(rest, 0)
    else:
        shape = re.match(r"[a-z0-9]+\[[^\]]*\](\{[^}]*\})?", rest)
        if shape is None:
            return None
        end = shape.end()
    shape_text, rest = rest[:end], rest[end:].lstrip()
    opcode = re.match(r"[\w\-]+", rest)
    if opcode is None:
        return None
    close = closing(rest, opcode.end())
    inside = rest[opcode.end() + 1 : close - 1]
    operands = (inside,) if opcode[0] in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(found[2], shape_text, opcode[0], operands, rest[close:], bool(found[1]))


def closing(text: str, start: int) -> int:
    """Return the index after the bracket that closes the bracket at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in "([{") - (text[place] in ")]}")
        if depth == 0:
            return place + 1
    raise ValueError(f"no bracket closes {text[start : start + 80]}")


def bytes_of(shape: str, main_memory: bool = False) -> int:
    """Return the bytes of a shape, or of all shapes in a tuple. If `main_memory` is True, skip other memories."""
    text = ELSEWHERE.sub("", shape) if main_memory else shape
    return sum(
        BYTES.get(kind, 0) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", text)
    )


def moved_bytes(program: Program, cost: Cost) -> int:
    """Estimate the bytes of main memory that one run of an instruction reads and writes.

    If a fusion only slices an operand, or updates only part of a result, only that part counts.
    """
    instruction, known = cost.instruction, cost.computation.instructions
    callee = program.computations.get(instruction.called("calls") or "")
    operands = [known[name] for name in instruction.operands if name in known]
    if instruction.opcode != "fusion" or callee is None:
        return bytes_of(instruction.shape, True) + sum(bytes_of(operand.shape, True) for operand in operands)
    users: dict[str, list[Instruction]] = {}
    for inner in callee.instructions.values():
        for name in inner.operands if inner.opcode != "parameter" else ():
            users.setdefault(name, []).append(inner)
    total = 0
    for inner in callee.instructions.values():
        if inner.opcode != "parameter" or not bytes_of(operands[int(inner.operands[0])].shape, True):
            continue
        uses = users.get(inner.name, [])
        if uses and all(u.opcode in ("dynamic-slice", "gather", "slice") and u.operands[0] == inner.name for u in uses):
            total += sum(bytes_of(use.shape) for use in uses)
        elif not uses or not all(u.opcode == "dynamic-update-slice" and u.operands[0] == inner.name for u in uses):
            total += bytes_of(inner.shape)
    if not bytes_of(instruction.shape, True):
        return total
    roots = [callee.root] if callee.root.opcode != "tuple" else [callee.instructions[n] for n in callee.root.operands]
    for root in roots:
        while root.opcode == "bitcast":
            root = callee.instructions[root.operands[0]]
        updated = root.opcode == "dynamic-update-slice"
        total += bytes_of(callee.instructions[root.operands[1]].shape if updated else root.shape)
    return total

"""What machine code says: whether Hopper's touches registers that an asynchronous matrix product holds, and its loops.

`wgmma` (SASS: HGMMA) reads its left operand from registers, and adds to an accumulator in registers, after it was
issued: until a `WARPGROUP.DEPBAR` waits for its group, nothing else may write the operand, nor read or write the
accumulator (PTX ISA, wgmma.wait_group). Triton and ptxas are on record that did not keep to it (triton issues 9433 and
11781). What protects a register otherwise, such as a scoreboard, is not looked at: a hazard is not proof of a wrong
result, but none is what is shipped.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L_x?_?\w+):")
_REGISTER = re.compile(r"\bR(\d+)\b")
_SHAPE = re.compile(r"\.64x(\d+)x")
_NONE_WRITTEN = re.compile(r"ST|RED|BAR|BRA|R2P|LDGSTS|UTMA|MEMBAR|SYNCS|CCTL|EXIT|WARP|DEPBAR|ERRBAR|FENCE|\w*SETP")


class Instruction(NamedTuple):
    """One of SASS."""

    address: int
    guarded: bool
    opcode: str
    operands: list[str]
    label: str  # before it


class Product(NamedTuple):
    """An HGMMA in flight, and the registers it holds."""

    address: int
    operand: range
    accumulator: range


class Loop(NamedTuple):
    """How much is in a loop."""

    instructions: int
    barriers: int  # where all warps of a program wait for each other


class Hazard(NamedTuple):
    """An instruction that touches a register in flight."""

    product: int  # address of the HGMMA
    address: int
    opcode: str
    register: int
    what: str  # operand or accumulator


def written(one: Instruction) -> range:
    """The registers that an instruction writes, by number."""
    if _NONE_WRITTEN.match(one.opcode):
        return range(0)
    for operand in one.operands[:2]:
        if found := re.match(r"R(\d+)\b", operand):
            return range(int(found[1]), int(found[1]) + _width(one.opcode))
        if not re.match(r"!?U?P(T|\d)\b", operand):
            return range(0)
    return range(0)


def _width(opcode: str) -> int:
    parts = opcode.split(".")
    if parts[0] == "HGMMA":
        return int(_SHAPE.search(opcode)[1]) // 2  # 64 x N numbers over 128 threads
    if "128" in parts or parts[0] in ("HMMA", "IMMA") or (parts[0] == "LDSM" and "4" in parts):
        return 4
    wide = "64" in parts or "WIDE" in parts or parts[0][0] == "D" or (parts[0] == "LDSM" and "2" in parts)
    return 2 if wide or (parts[0] == "CS2R" and "32" not in parts) else 1


def instructions(sass: str) -> list[Instruction]:
    """Reads what `nvdisasm -c` prints of one kernel."""
    found, label = [], ""
    for line in sass.splitlines():
        if named := _LABEL.match(line):
            label = named[1]
        elif read := _LINE.match(line):
            address, guard, opcode, operands = read.groups()
            parts = [part.strip() for part in operands.split(",") if part.strip()]
            found.append(Instruction(int(address, 16), bool(guard), opcode, parts, label))
            label = ""
    return found


def hazards(code: list[Instruction]) -> Iterator[Hazard]:
    """Follows every path, with the products in flight on it: groups that were committed, oldest first; an open one."""
    places = _places(code)
    todo, seen, told = [(0, ((),))], set(), set()
    while todo:
        place, groups = todo.pop()
        if place >= len(code) or (place, groups) in seen:
            continue
        seen.add((place, groups))
        one = code[place]
        for product in chain(*groups):
            if (product.address, one.address) not in told and (hit := _touches(one, product)):
                told.add((product.address, one.address))
                yield Hazard(product.address, one.address, one.opcode, *hit)
        if one.opcode.startswith("HGMMA"):
            groups = _issued(one, groups)
        elif one.opcode.startswith("WARPGROUP.DEPBAR"):
            groups = groups[max(0, len(groups) - 1 - int(one.operands[-1], 16)) :]
        jumps = one.opcode.startswith("BRA")
        if jumps:
            todo.append((places[_target(one)], groups))
        if one.guarded or len(one.operands) > 1 or not (jumps or one.opcode == "EXIT"):
            todo.append((place + 1, groups))


def longest_loop(code: list[Instruction]) -> Loop:
    """Of all loops, from a jump backwards to where it leads, the one of the most instructions; inner loops count."""
    places = _places(code)
    jumps = [(places[_target(one)], place) for place, one in enumerate(code) if one.opcode.startswith("BRA")]
    body = max((code[first : last + 1] for first, last in jumps if first < last), key=len, default=[])
    return Loop(len(body), sum(one.opcode.startswith("BAR") for one in body))


def _places(code: list[Instruction]) -> dict[str, int]:
    return {one.label: place for place, one in enumerate(code) if one.label}


def _target(jump: Instruction) -> str:
    return re.search(r"\((\.\w+)\)", jump.operands[-1])[1]


def _touches(one: Instruction, product: Product) -> tuple[int, str] | None:
    """The lowest register, and of what, that must be left alone and is not."""
    writes = {*written(one)}
    if hit := writes & {*product.operand}:
        return min(hit), "operand"
    if one.opcode.startswith("HGMMA") and writes == {*product.accumulator}:
        return None  # products on one accumulator keep their order
    named = {int(number) for part in one.operands for number in _REGISTER.findall(part)}
    hit = (writes | named) & {*product.accumulator}
    return (min(hit), "accumulator") if hit else None


def _issued(one: Instruction, groups: tuple) -> tuple:
    """The groups with one product more; `gsb0` commits the open one."""
    left = _REGISTER.match(one.operands[1])
    operand = range(int(left[1]), int(left[1]) + 4) if left else range(0)
    # its earlier self, of the round before, holds the same registers and is done sooner
    *older, last = (tuple(product for product in group if product.address != one.address) for group in groups)
    groups = (*older, (*last, Product(one.address, operand, written(one))), *([()] if "gsb0" in one.operands else []))
    while len(groups) > 1 and not groups[0]:
        groups = groups[1:]
    return groups


def disassemble(cubin: bytes) -> str:
    """What triton's `nvdisasm` says of a kernel's machine code."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

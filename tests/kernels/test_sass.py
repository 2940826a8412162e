"""Reading machine code: registers that a matrix product of Hopper still holds, and what is in a loop."""

import json
import os
import subprocess
import sys

import pytest

from kernels.sass import hazards, instructions, longest_loop

FROM_REGISTERS = "HGMMA.64x16x16.F32.BF16 R24, R96, gdesc[UR4], R24, gsb0"
FROM_SHARED = "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
LOOP = "@P0 BRA `(.L_x_0)"


def code(*lines: str) -> str:
    """As `nvdisasm -c` prints it; `.L_x_0:` is a label."""
    written = [
        line if line.startswith(".L") else f"        /*{16 * place:04x}*/                   {line} ;"
        for place, line in enumerate(lines)
    ]
    return "\n".join(written)


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([FROM_REGISTERS, "LDS.128 R96, [R5]", WAIT], [("operand", 96)]),
        ([FROM_REGISTERS, "LDS.64 R94, [R5]", WAIT], []),
        ([FROM_REGISTERS, "LDS.128 R94, [R5]", WAIT], [("operand", 96)]),  # 94 to 97
        ([FROM_REGISTERS, "STS.128 [R5], R96", WAIT], []),  # reads it
        ([FROM_REGISTERS, "ISETP.GE.AND P0, PT, R96, R5, PT", WAIT], []),
        ([FROM_REGISTERS, "SHFL.BFLY PT, R98, R5, 0x4, 0x1f", WAIT], [("operand", 98)]),
        ([FROM_REGISTERS, "FADD R100, R96, R99", WAIT], []),
        ([FROM_SHARED, "FADD R5, R26, R6", WAIT], [("accumulator", 26)]),
        ([FROM_SHARED, FROM_SHARED, WAIT, "FADD R5, R26, R6"], []),  # products on one accumulator keep their order
        ([FROM_SHARED, "HGMMA.64x16x16.F32.BF16 R28, gdesc[UR8], R28, gsb0", WAIT], [("accumulator", 28)]),
        ([FROM_REGISTERS, WAIT, "LDS.128 R96, [R5]"], []),
        ([FROM_REGISTERS, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R96, R5", WAIT], [("operand", 96)]),
        ([FROM_REGISTERS, FROM_SHARED, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R96, R5", WAIT], []),
        ([".L_x_0:", "MOV R96, R5", FROM_REGISTERS, LOOP, WAIT], [("operand", 96)]),  # in the next round
        ([".L_x_0:", "MOV R96, R5", FROM_REGISTERS, WAIT, LOOP, "EXIT"], []),
    ],
)
def test_registers_in_flight(lines, found):
    assert [(one.what, one.register) for one in hazards(instructions(code(*lines)))] == found


def test_the_longest_loop():
    """With those in it; where a kernel's code ends, nvdisasm shows a jump to itself."""
    barrier = "BAR.SYNC.DEFER_BLOCKING 0x0"
    inner = [".L_x_1:", barrier, "@P1 BRA `(.L_x_1)"]
    lines = [".L_x_2:", barrier, "@P0 BRA `(.L_x_3)", ".L_x_0:", "MOV R1, R2", *inner, barrier, "MOV R2, R1", LOOP]
    assert longest_loop(instructions(code(*lines, ".L_x_3:", "EXIT", ".L_x_4:", "BRA `(.L_x_4)"))) == (6, 2)
    assert longest_loop(instructions(code("EXIT", ".L_x_4:", "BRA `(.L_x_4)"))) == (0, 0)


COMPILE = """
import json, torch
from unittest.mock import patch
from kernels.ahead_of_time import compile_only
from kernels.output_norm import triton_gram
for hopper in (True, False):
    with compile_only(90) as kernels, patch.object(triton_gram, "warpgroups", lambda device: hopper):
        triton_gram.output_norm(torch.zeros(1, 64, 2, 64, dtype=torch.bfloat16), torch.zeros(128, 2, 64))
    print(json.dumps([(kernel.stages, kernel.matrix, kernel.hazards, kernel.loop) for kernel in kernels]))
"""


def test_what_triton_makes_of_a_pipelined_loop():
    """Two stages overwrite an operand that may still be read; the one that Hopper is given does not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, piped = ([*map(tuple, json.loads(line))] for line in done.stdout.splitlines())
    assert [found[:3] for found in ours] == [(1, "wgmma", 0)]
    assert [found[:2] for found in piped] == [(2, "wgmma")] and piped[0][2] > 0
    assert 100 < ours[0][3] < 5000  # instructions of its loop

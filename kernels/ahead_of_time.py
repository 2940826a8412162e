"""Compiling Triton kernels for a GPU that is not there, to see what they would cost on it.

Needs triton's own compiler and the `ptxas` that it ships, and no driver. The kernels must not be in interpreter mode.
"""

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

from kernels import launch, sass

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""compute capability -> KiB of shared memory that a block can have"""


@dataclass(frozen=True)
class Compiled:
    """A kernel as compiled for one GPU.

    Attributes:
        name: of the kernel.
        capability: of the GPU, such as 90.
        warps: of a program.
        registers: of a thread.
        spilled: bytes.
        shared: bytes of shared memory.
        matrix: the matrix instructions in it: `wgmma`, `mma`, `tcgen05` or nothing.
        hazards: instructions that touch registers which a `wgmma` still holds, see `kernels.sass`.
        loop: instructions of its longest loop.
        barriers: in that loop.
    """

    name: str
    capability: int
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    matrix: str
    hazards: int
    loop: int
    barriers: int


class _Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # one cache a target

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def compile_only(capability: int) -> Iterator[list[Compiled]]:
    """Inside, launching a kernel (on CPU tensors) compiles it and runs nothing; the list holds what was compiled."""
    from triton import knobs
    from triton.runtime import JITFunction
    from triton.runtime.driver import driver

    found: list[Compiled] = []
    run, active = JITFunction.run, driver._active

    def compile_it(self, *args, grid, warmup, **kwargs):
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in _INSPECTED:
            _INSPECTED[kernel.hash] = inspect(kernel, capability, log.getvalue())
        if _INSPECTED[kernel.hash] not in found:
            found.append(_INSPECTED[kernel.hash])
        return kernel

    JITFunction.run = compile_it
    driver.set_active(_Driver(capability))
    try:
        # what ptxas says of a kernel is not in triton's cache
        with knobs.compilation.scope(), knobs.nvidia.scope(), launch.as_if(capability):
            knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
            yield found
    finally:
        JITFunction.run = run
        driver._active = active


_INSPECTED: dict[str, Compiled] = {}


def inspect(kernel, capability: int, log: str) -> Compiled:
    """Reads registers and spills from what ptxas said, matrix instructions from the PTX, loops from machine code."""
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log).groups()
    products = [name for name in ("wgmma", "tcgen05.mma", "mma.sync") if name in kernel.asm["ptx"]]
    code = sass.instructions(sass.disassemble(kernel.asm["cubin"]))
    loop, barriers = sass.longest_loop(code)
    return Compiled(
        name=kernel.metadata.name,
        capability=capability,
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        spilled=int(stores) + int(loads),
        shared=kernel.metadata.shared,
        matrix=products[0].split(".")[0] if products else "",
        hazards=len([*sass.hazards(code)]) if "wgmma" in products else 0,
        loop=loop,
        barriers=barriers,
    )

"""Compiles kernels without a GPU and returns their registers, spilled bytes and shared memory.

Needs a process without TRITON_INTERPRET, in which the compiler defines the kernels.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Resources(NamedTuple):
    """Registers of a thread, bytes it spills, bytes of shared memory of a program."""

    registers: int
    spills: int
    shared: int


def compiled(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    target: int = 90,
    num_warps: int = 4,
    num_stages: int = 3,
    keep: Path | None = None,
) -> Resources:
    """signature: type of each argument, as "*bf16", "i32", "tensordesc<bf16[128,64]>"; pointers and integers count as
    multiples of 16. constants: constexprs. target: 90 or 89. keep: a folder for the PTX."""
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    attrs = {
        (index,): [["tt.divisibility", 16]]
        for index, kind in enumerate(types.values())
        if kind.startswith("*") or kind in ("i32", "i64")
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = (keep or Path(folder)) / f"{kernel.__name__}.sm{target}.ptx"
        ptx.write_text(made.asm["ptx"])
        arch = "sm_90a" if target == 90 else f"sm_{target}"
        assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        command = [str(assembler), "-v", f"--gpu-name={arch}", str(ptx), "-o", str(Path(folder) / "cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes spill stores", said)
    assert registers is not None, said
    assert spills is not None, said
    return Resources(int(registers[1]), int(spills[1]), made.metadata.shared)

"""Compiles a kernel without a card and returns its registers, spilled bytes and shared memory.

Works only in a process without TRITON_INTERPRET, because interpreted kernels cannot be compiled.
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
    """Registers and spilled bytes of a thread, and bytes of shared memory of a program."""

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
    """Compiles a kernel for a target, 90 or 89.

    signature: type of each argument, as "*bf16", "i32", "tensordesc<bf16[128,64]>"; pointers and integers count as
    multiples of 16. constants: constexprs. keep: a folder for the PTX.
    """
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    attrs = {
        (index,): [["tt.divisibility", 16]]
        for index, kind in enumerate(types.values())
        if kind.startswith("*") or kind in ("i32", "i64")
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    kernel_binary = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = (keep or Path(folder)) / f"{kernel.__name__}.sm{target}.ptx"
        ptx.write_text(kernel_binary.asm["ptx"])
        arch = "sm_90a" if target == 90 else f"sm_{target}"
        assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        command = [str(assembler), "-v", f"--gpu-name={arch}", str(ptx), "-o", str(Path(folder) / "cubin")]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores", log)
    assert registers is not None, log
    assert spills is not None, log
    return Resources(int(registers[1]), int(spills[1]), kernel_binary.metadata.shared)

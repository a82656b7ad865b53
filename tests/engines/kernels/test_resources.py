"""The transformer's kernels at the published sizes spill no registers and fit the shared memory of H100 and Ada.

Compiles without a card, in a process without the interpreter.
"""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

SHARED = {90: 232448, 89: 101376}  # bytes per program
FP8 = "*fp8e4nv"
ROOT = Path(__file__).parents[3]


def cases(target: int) -> list[tuple[str, dict[str, str], dict[str, object], int, int]]:
    """Returns module and kernel, types of arguments other than bf16 pointers, constexprs, warps and stages."""
    ints = dict.fromkeys(("N", "T", "D", "H", "W", "M", "K", "ROW", "OFFSET", "SPLIT", "STEP", "PART", "PARTS"), "i32")
    ints |= dict.fromkeys(("CHUNK", "GATE_ROW", "SCALE_ROW", "KV_ROW", "AT", "BLOCKS"), "i32")
    floats = {
        "eps": "fp32",
        "rms": "*fp32",
        "per_scale": "fp32",
        "x_scale": "*fp32",
        "weight_scale": "*fp32",
        "ctx": "*fp32",
        "lengths": "*i32",
    }
    types = ints | floats
    attention = {"HD": 32, "HP": 32, "BN": 128, "FAST": True, "PRECISION": "tf32"}
    kernels: list[tuple[str, dict[str, str], dict[str, object], int, int]] = [
        ("linear_attention._row_rms", types | {"out": "*fp32"}, {"BC": 2048}, 2, 3),
        ("linear_attention._context", types, attention | {"NORMED": True}, 4, 3),
        ("linear_attention._context", types, attention | {"NORMED": False}, 4, 3),
        ("linear_attention._apply", types, attention | {"BS": 8}, 4, 3),
        ("cross_attention._key_norm", types | {"weight": "*fp32"}, {"NORMED": True, "BC": 2048}, 4, 3),
    ]
    norm = dict.fromkeys(("ADDED", "GATED", "EXTRA", "NORMED"), True) | {"BC": 4096}
    depthwise = {"C": 2880, "R": 8, "BW": 8, "BC": 64}
    for narrow in (False, True):  # outputs in e4m3
        out = types | ({"out": FP8, "to_h": FP8} if narrow else {})
        kernels.append(("gated_depthwise._gated_depthwise", out, depthwise | {"NARROW": narrow}, 4, 3))
        kernels.append(("modulated_norm._modulated_norm", out, norm | {"NARROW": narrow}, 8, 3))
    cross = {"HP": 128, "BM": 64, "BT": 32, "NORMED": True, "PRECISION": "tf32"}
    kernels += [
        ("cross_attention._cross_attention", types | ({"out": FP8} if narrow else {}),
         cross | {"HD": dim, "NARROW": narrow}, 4, 2)
        for dim in (72, 112) for narrow in (False, True)
    ]  # fmt: skip
    tiles = (
        ((128, 256, 64, 8, 3, True), (128, 128, 64, 4, 3, False)) if target == 90 else ((128, 128, 32, 8, 4, False),)
    )
    for (rows, cols, depth, warps, stages, persistent), narrow in product(tiles, (False, True)):
        deep, kind = (2 * depth, "fp8e4nv") if narrow else (depth, "bf16")
        operands = {"x": f"*{kind}", "weight": f"*{kind}"}
        if target == 90:
            operands = {name: f"tensordesc<{kind}[{side},{deep}]>" for name, side in (("x", rows), ("weight", cols))}
            operands["out"] = f"tensordesc<bf16[{rows},{cols}]>"
        shape = {"BM": rows, "BN": cols, "BK": deep, "GROUP": 8, "PERSISTENT": persistent, "PRECISION": "tf32"}
        constants = shape | {"SCALED": narrow, "TMA": target == 90}
        kernels.append(("silu_product._silu_product", types | operands, constants, warps, stages))
    return kernels


def compile_all(target: int) -> list[tuple[str, int, int, int]]:
    from importlib import import_module

    from compiling import compiled

    rows = []
    for name, types, constants, warps, stages in cases(target):
        module, kernel_name = name.split(".")
        kernel = getattr(import_module(f"engines.kernels.{module}"), kernel_name)
        signature = {arg: types.get(arg, "*bf16") for arg in kernel.arg_names}
        rows.append((name, *compiled(kernel, signature, constants, target, warps, stages)))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED)
def test_nothing_spills_and_all_fits(target: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests" / "helpers"), str(ROOT)])
    command = [sys.executable, str(Path(__file__)), str(target)]
    completed = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert completed.returncode == 0, completed.stderr
    for name, registers, spills, shared in json.loads(completed.stdout):
        print(target, name, registers, spills, shared)
        assert spills == 0, name
        assert shared <= SHARED[target], name


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))

"""PROJECTION, nothing measured: how fast SANA-Sprint can be on GPUs, from operations and bytes counted in its modules.

    python -m bench.roofline --model random:sprint-0.6b --size 1024 --steps 1 --batch 1 --plot roofline.svg

For every stage: the floor is the time of its products and convolutions one after the other at the device's peak rates,
each bound by arithmetic or by memory, with everything between them fused away. The projected time lowers the peaks by
a stated efficiency. The eager time runs every call as a kernel of its own; where the paper measured the same, their
ratio says how hopeful that is. fp8 is for transformer and decoder: the text encoder must stay in bf16. Not counted:
picture files, the host, and traffic that a cache on the device saves. Our engine as it is built, kernel by kernel and
at measured rates, is counted by bench.budget.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness.cli import command, parse_size, run_benchmark
from bench.roofline.projection import Efficiency, measure, plot, show


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="random:sprint-0.6b", help="folder, hub id or random:<name>")
    parser.add_argument("--decoder", help="folder or hub id of another autoencoder with the same latents")
    parser.add_argument("--size", type=parse_size, help="N or WxH in pixels (default: the checkpoint's)")
    parser.add_argument("--steps", type=int, default=1, choices=(1, 2, 3, 4))
    parser.add_argument("--batch", type=int, default=1, help="pictures at once (default 1)")
    parser.add_argument("--tokens", type=int, default=20, help="of a prompt (default 20)")
    parser.add_argument("--arithmetic", type=float, default=Efficiency.arithmetic, help="share of the peak (0.6)")
    parser.add_argument("--memory", type=float, default=Efficiency.memory, help="share of the peak (0.8)")
    parser.add_argument("--plot", type=Path, help="an SVG file to write")
    given = sys.argv[1:] if argv is None else argv
    parser.set_defaults(command=command("bench.roofline", given))
    options = parser.parse_args(given)

    def measured() -> dict[str, Any]:
        result = measure(options)
        if options.plot:
            options.plot.write_text(plot(result), encoding="utf-8")
        return result

    return run_benchmark(measured, show)


if __name__ == "__main__":
    sys.exit(main())

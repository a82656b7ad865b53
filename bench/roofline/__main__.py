"""PROJECTION, nothing measured: the speed of SANA-Sprint on GPUs, from operations and bytes counted in its modules.

    python -m bench.roofline --model random:sprint-0.6b --size 1024 --steps 1 --batch 1 --plot roofline.svg

Floor: the time of a stage's products and convolutions, one after the other, at the device's peak rates. Each is bound
by arithmetic or by memory; everything between them counts as fused. Projected: the same with peaks lowered by a stated
efficiency. Eager: every call is a separate kernel. Where the paper measured the same, their ratio shows how optimistic
the model is. fp8 applies to transformer and decoder; the text encoder stays in bf16. Not counted: image files, the
host, and traffic saved by caches of the device. bench.budget counts our engine kernel by kernel at measured rates.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness.cli import BenchmarkParser, parse_size, run_benchmark
from bench.roofline.projection import Efficiency, measure, plot, show


def main(argv: Sequence[str] | None = None) -> int:
    parser = BenchmarkParser("bench.roofline", __doc__)
    parser.add_argument("--model", default="random:sprint-0.6b", help="folder, hub id or random:<name>")
    parser.add_argument("--decoder", help="another decoder of the same latents: lite, taesana, a folder or a hub id")
    parser.add_argument("--size", type=parse_size, help="N or WxH in pixels (default: the checkpoint's)")
    parser.add_argument("--steps", type=int, default=1, choices=(1, 2, 3, 4))
    parser.add_argument("--batch", type=int, default=1, help="images at once (default 1)")
    parser.add_argument("--tokens", type=int, default=20, help="of a prompt (default 20)")
    parser.add_argument("--arithmetic", type=float, default=Efficiency.arithmetic, help="share of the peak (0.6)")
    parser.add_argument("--memory", type=float, default=Efficiency.memory, help="share of the peak (0.8)")
    parser.add_argument("--plot", type=Path, help="an SVG file to write")
    options = parser.options(argv)

    def measured() -> dict[str, Any]:
        result = measure(options)
        if options.plot:
            options.plot.write_text(plot(result), encoding="utf-8")
        return result

    return run_benchmark(measured, show)


if __name__ == "__main__":
    sys.exit(main())

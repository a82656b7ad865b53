"""Packs a kit of less than 60 MB for a GPU host that has PyTorch and no network.

    make accept-kit                     # fills build/accept-kit
    bash run.sh http; bash run.sh engine    # there, in the kit's folder; each below five minutes, again goes on
    bash run.sh rest                        # compiled diffusers, native engines
    bash run.sh engine --rehearse       # on any machine: the tiny checkpoint on its CPU

It packs the code of the commit; changes of the checkout stay out.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.acceptance.kit.packing import pack
from bench.harness.cli import comma_separated, run_benchmark
from bench.harness.host import REVISION
from bench.harness.server_process import ROOT


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.acceptance.kit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "accept-kit", help="folder that is replaced")
    parser.add_argument(
        "--python", type=comma_separated, default=("3.12",), help="of the hosts, with commas (default 3.12)"
    )
    options = parser.parse_args(argv)

    def packed() -> dict[str, Any]:
        size = pack(ROOT, options.out, options.python)
        revision = (options.out / REVISION).read_text().strip()
        return {"out": str(options.out), "bytes": size, "revision": revision, "python": list(options.python)}

    return run_benchmark(
        packed, lambda found: f"{found['out']}: {found['bytes'] / 1e6:.1f} MB, revision {found['revision']}"
    )


if __name__ == "__main__":
    sys.exit(main())

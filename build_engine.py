"""Builds engines from a checkpoint and prints their manifest. docs/understand/gpu-proof.md lists the proofs.

python build_engine.py --model models/tiny --gpu cpu --precision fp32 --out artifacts/tiny-cpu
python build_engine.py --model sprint-0.6b --gpu native --precision fp8 --out artifacts/sprint --sizes 1024x1024
python build_engine.py --model sprint-0.6b --gpu h100 --vendor native --precision bf16 --out artifacts/sprint-h100
python build_engine.py --list [DIR], --prune [DIR]    for DIR, by default the server's folder of engines
"""

import argparse
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from engines.artifacts.catalog import CatalogEntry, list_engines, prune
from engines.build.builder import BuildResult, build
from engines.build.paired_check import paired_check, with_check
from engines.build.spec import BuildSpec
from engines.build.targets import GPU_PRECISIONS, GPUS, VENDORS
from engines.errors import BuildError, DiskFullError, SprintError
from engines.loader import load_engine
from engines.types import AdapterOption
from server.loading.build_process import DISK_FULL
from server.loading.engine_loader import engine_folder


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Builds engines from a checkpoint, and prints their manifest.",
        epilog="build_engine.py --list [DIR] shows the engines in a folder, by default the server's; --prune [DIR] "
        "removes those of old versions.",
    )
    parser.add_argument("--model", required=True, help="folder, hub id or short name of a checkpoint")
    parser.add_argument("--gpu", required=True, choices=[*GPUS, "native", "cpu"], help="native: this machine's card")
    parser.add_argument("--precision", required=True, choices=GPU_PRECISIONS, help="a CPU takes fp32 and bf16")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder to build, replaced when the build is whole; default artifacts/<model>-<gpu>-<precision>",
    )
    parser.add_argument(
        "--sizes", default=(), type=sizes, help="1024x1024,... width x height; default: the checkpoint's"
    )
    parser.add_argument("--batches", default=(1, 2, 4, 8), type=numbers, help="buckets; default 1,2,4,8")
    parser.add_argument("--steps", default=(1, 2, 4), type=numbers, help="captured as CUDA graphs; default 1,2,4")
    parser.add_argument(
        "--decoder", help="another decoder of the same latents: lite, taesana, a folder, a hub id or a .pth file"
    )
    parser.add_argument(
        "--fast-decoder",
        help="a second decoder, which requests may choose: lite, taesana, a folder, a hub id or a .pth file",
    )
    parser.add_argument(
        "--vendor",
        choices=VENDORS,
        help="of a GPU's engines; native: our own kernels, compiled without a card; default: tensorrt where it is "
        "installed, native otherwise",
    )
    parser.add_argument("--jobs", default=os.cpu_count() or 1, type=int, help="processes that compile native kernels")
    parser.add_argument(
        "--lora",
        default=[],
        type=adapter,
        action="append",
        help="NAME=PATH[:SCALE], fused into the transformer (repeats); start the server with the same",
    )
    parser.add_argument(
        "--quality",
        action="store_true",
        help="then make 16 images by the engines and by fp32, and write how far they are apart into the manifest",
    )
    return parser


def parse(arguments: list[str]) -> BuildSpec:
    options = vars(parser().parse_args(arguments))
    options["jobs"] = max(1, options["jobs"])
    if options["out"] is None:
        name = Path(options["model"]).name.replace(":", "-")
        options["out"] = Path("artifacts") / f"{name}-{options['gpu']}-{options['precision']}"
    return BuildSpec(**{**options, "lora": tuple(options["lora"])})


def sizes(text: str) -> tuple[tuple[int, int], ...]:
    pairs = [size.split("x") for size in text.split(",")]
    if not all(len(pair) == 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"got {text!r}, like 1024x1024,512x512 is needed")
    return tuple((int(width), int(height)) for width, height in pairs)


def adapter(text: str) -> AdapterOption:
    try:
        return AdapterOption.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def run(spec: BuildSpec) -> BuildResult:
    """Builds with a progress bar on a terminal, otherwise with a line per step."""
    if not sys.stderr.isatty():
        return build(spec, lambda done, total, text: print(f"[{done}/{total}] {text}", file=sys.stderr, flush=True))
    with tqdm(unit="step", bar_format="{l_bar}{bar}| {n}/{total} {elapsed}", file=sys.stderr) as bar:

        def progress(done: int, total: int, text: str) -> None:
            bar.total = total
            bar.update(done - bar.n)
            bar.set_description_str(text)

        result = build(spec, progress)
        bar.update((bar.total or 0) - bar.n)
    return result


def check_quality(spec: BuildSpec, built: BuildResult) -> BuildResult:
    """Compares images of the engines with images of fp32 on the CPU, in the manifest. Raises BuildError."""
    if not built.manifest.executed:
        raise BuildError(
            f"quality: the engines for {spec.gpu} do not run here, so they make no image; they lie in {spec.out}"
        )
    print("paired check of whole images", file=sys.stderr, flush=True)
    largest = max(built.manifest.batches)
    reference = load_engine(
        spec.model, backend="eager", precision="fp32", device="cpu", decoder=spec.decoder, lora=spec.lora
    )
    engine = load_engine(spec.model, engine_dir=str(spec.out), decoder=spec.decoder, lora=spec.lora, max_batch=largest)
    try:
        checks = paired_check(reference, engine, built.manifest.steps)
    finally:
        reference.close()
        engine.close()
    return BuildResult(with_check(spec.out, built.manifest, checks), built.changed)


def catalogue(arguments: list[str]) -> int:
    """Runs --list or --prune and prints one line for each folder of engines."""
    parser = argparse.ArgumentParser(description="Shows the engines in a folder, or removes those of old versions.")
    command = parser.add_mutually_exclusive_group(required=True)
    for flag in ("--list", "--prune"):
        command.add_argument(flag, nargs="?", type=Path, const=engine_folder(None, os.environ), metavar="DIR")
    options = parser.parse_args(arguments)
    for entry in list_engines(options.list) if options.list else prune(options.prune):
        print(describe(entry) if options.list else f"removed {describe(entry)}")
    return 0


def describe(entry: CatalogEntry) -> str:
    engine = "unreadable"
    if (manifest := entry.manifest) is not None:
        sizes = ",".join(f"{width}x{height}" for width, height in manifest.sizes)
        engine = f"{manifest.checkpoint} {manifest.vendor} {manifest.precision} {sizes} on {manifest.device}"
    outdated = "" if entry.outdated is None else f", old: {entry.outdated}"
    return f"{entry.path}: {engine}, {entry.bytes / 1e6:.0f} MB{outdated}"


def main(arguments: list[str] | None = None) -> int:
    """Builds, lists or removes engines; the command line is sys.argv unless given. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0].startswith(("--list", "--prune")):
        return catalogue(arguments)
    spec = parse(arguments)
    try:
        built = run(spec)
        if spec.quality:
            built = check_quality(spec, built)
    except SprintError as error:
        print(f"build_engine.py: {error}", file=sys.stderr)
        return DISK_FULL if isinstance(error, DiskFullError) else 1
    if not built.changed:
        print(f"{spec.out}: nothing has changed, nothing was built", file=sys.stderr)
    print(json.dumps(built.manifest.to_dict(), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

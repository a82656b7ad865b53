"""From counted calls to projected times, by stage and device."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from bench.harness.host import machine
from bench.harness.summary import table
from bench.harness.svg_chart import Bar, stacked_bars
from bench.roofline.gpu_specs import DEVICES, Device
from bench.roofline.op_counter import Call, count
from bench.roofline.published import PAPER
from engines.checkpoints.checkpoint import Checkpoint, open_checkpoint
from engines.models.dcae import Autoencoder
from engines.models.folding import fold
from engines.models.gemma import GemmaBody, GemmaConfig
from engines.models.instruction import INSTRUCTION
from engines.models.pixels import PixelDecoder
from engines.models.text_encoder import TextEncoder, Tokens
from engines.models.transformer import SprintTransformer
from engines.pipeline.prompt_tokenizer import PromptTokenizer

META = torch.device("meta")
STAGES = ("text", "denoise", "decode")


@dataclass(frozen=True)
class Efficiency:
    """What kernels reach of a peak. Large dense products in cuBLAS and cuDNN reach 60 to 80 % of the arithmetic, plain
    streams 80 to 90 % of the memory; `launch` is what the host needs for one eager call, in seconds."""

    arithmetic: float = 0.6
    memory: float = 0.8
    launch: float = 5e-6


PEAK = Efficiency(arithmetic=1.0, memory=1.0, launch=0.0)


def seconds(calls: Sequence[Call], device: Device, efficiency: Efficiency, *, eight_bit: bool = False) -> float:
    """Of products and convolutions one after the other; see Device.seconds."""
    shares = {"arithmetic": efficiency.arithmetic, "memory": efficiency.memory}
    return sum(device.seconds(call, **shares, eight_bit=eight_bit) for call in calls if call.kind != "other")


def eager_seconds(calls: Sequence[Call], device: Device, efficiency: Efficiency) -> float:
    """Of all calls, each a kernel that reads and writes memory; the host launches the next meanwhile."""
    streams = sum(call.read + call.written for call in calls if call.kind == "other")
    busy = seconds(calls, device, efficiency) + streams / (device.bandwidth * efficiency.memory)
    return max(busy, len(calls) * efficiency.launch)


def on_meta(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return module.to(device=META, dtype=dtype).eval()


def workloads(
    checkpoint: Checkpoint, size: tuple[int, int], steps: int, batch: int, tokens: int
) -> dict[str, list[Call]]:
    """Calls by stage, and of two stages as upstream runs them: instruction, prompt and padding every time, and the
    decoder with upsampling not folded."""
    settings, dtype = checkpoint.settings, torch.bfloat16
    instruction = INSTRUCTION if settings.instruction else ""
    prefix = PromptTokenizer(checkpoint.load_tokenizer(), instruction, settings.max_prompt_tokens).prefix
    padded = len(prefix) + settings.max_prompt_tokens - 2 if instruction else settings.max_prompt_tokens
    start = padded - settings.max_prompt_tokens + 1
    with META:
        body = GemmaBody(GemmaConfig.from_dict(checkpoint.text)).to(dtype).eval()
    ours, upstream = TextEncoder(body, prefix), TextEncoder(body, prefix[:1])
    prompts = [Tokens((*prefix, *range(tokens)), min(start, len(prefix)))] * batch
    whole = [Tokens((*prefix[:1], *range(padded - 1)), 1)] * batch

    with META:
        transformer = on_meta(SprintTransformer(checkpoint.transformer), dtype)
        autoencoder = Autoencoder(checkpoint.autoencoder).to(dtype).eval()
    decoder = PixelDecoder(autoencoder)
    compression = checkpoint.autoencoder.compression
    latent = torch.empty(
        batch, checkpoint.transformer.in_channels, size[1] // compression, size[0] // compression, device=META
    )
    text = torch.empty(batch, tokens + 1, checkpoint.transformer.caption_channels, dtype=dtype, device=META)
    scalar = torch.empty(batch, device=META)
    decode_upstream = count(lambda: decoder(latent))
    fold(autoencoder.decoder)
    return {
        "text": count(lambda: ours.encode(prompts)),
        "denoise": count(lambda: transformer(latent.to(dtype), text, scalar, scalar)) * steps,
        "decode": count(lambda: decoder(latent)),
        "text upstream": count(lambda: upstream.encode(whole)),
        "decode upstream": decode_upstream,
    }


def project(
    calls: Mapping[str, Sequence[Call]], device: Device, efficiency: Efficiency, *, eight_bit: bool
) -> dict[str, dict[str, float | str | None]]:
    """By stage and in total, in milliseconds: floor, projected, eager (16 bits only); what binds most of the floor."""
    found: dict[str, dict[str, float | str | None]] = {}
    for stage, made in calls.items():
        narrow = eight_bit and stage in ("denoise", "decode")
        floor = 1000 * seconds(made, device, PEAK, eight_bit=narrow)
        endless = replace(device, bandwidth=float("inf"))
        arithmetic = 1000 * seconds(made, endless, PEAK, eight_bit=narrow)
        found[stage] = {
            "floor": round(floor, 3),
            "projected": round(1000 * seconds(made, device, efficiency, eight_bit=narrow), 3),
            "eager": None if eight_bit else round(1000 * eager_seconds(made, device, efficiency), 3),
            "bound": "arithmetic" if arithmetic > floor / 2 else "memory",
        }
    total = {
        key: round(sum(found[stage][key] for stage in STAGES), 3)  # type: ignore[misc]  # numbers where not fp8
        for key in ("floor", "projected", *(() if eight_bit else ("eager",)))
    }
    return {**found, "total": {"eager": None, "bound": None, **total}}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The JSON document. Milliseconds; operations and bytes of one batch."""
    checkpoint = open_checkpoint(options.model, options.decoder)
    size = options.size or checkpoint.settings.default_size
    calls = workloads(checkpoint, size, options.steps, options.batch, options.tokens)
    efficiency = Efficiency(options.arithmetic, options.memory)
    published = size == (1024, 1024) and options.batch == 1
    rows: list[dict[str, Any]] = []
    for device in DEVICES:
        for precision in ("fp16 or bf16", "fp8"):
            if precision == "fp8" and "fp8" not in device.matrix:
                continue
            for stage, times in project(calls, device, efficiency, eight_bit=precision == "fp8").items():
                shown = published and precision != "fp8"
                paper = PAPER.get((device.name, stage), {}).get(options.steps) if shown else None
                rows.append(
                    {"projection": True, "device": device.name, "precision": precision, "stage": stage, **times}
                    | {"paper": paper, "eager_over_paper": _over(times["eager"], paper)}
                )
    return {
        "program": "bench.roofline",
        "command": options.command,
        "projection": True,
        "model": options.model,
        "size": list(size),
        "steps": options.steps,
        "batch": options.batch,
        "prompt_tokens": options.tokens,
        "efficiency": asdict(efficiency),
        "machine": machine(),
        "devices": {device.name: device.source for device in DEVICES},
        "work": {
            stage: {
                "projection": True,
                "operations": sum(call.operations for call in made),
                "bytes_of_products": sum(call.read + call.written for call in made if call.kind != "other"),
                "bytes_of_all_calls": sum(call.read + call.written for call in made),
                "calls": len(made),
            }
            for stage, made in calls.items()
        },
        "rows": rows,
    }


def _over(eager: float | str | None, paper: str | None) -> float | None:
    """How the eager model compares with a plain number of the paper: below 1 it is too hopeful."""
    return round(float(eager) / float(paper), 2) if eager and paper and paper.isdecimal() else None


def show(found: dict[str, Any]) -> str:
    """The tables for people; every line says what it is."""
    mark = "projection"
    keys = ("operations", "bytes_of_products", "bytes_of_all_calls")
    work = [[mark, stage, *(one[key] / 1e9 for key in keys), one["calls"]] for stage, one in found["work"].items()]
    columns = ("device", "precision", "stage", "floor", "projected", "eager", "bound", "paper", "eager_over_paper")
    rows = [[mark, *(row[column] for column in columns)] for row in found["rows"]]
    head = (mark, *columns[:3], "floor, ms", "projected, ms", "eager, ms", "bound", "paper, ms", "eager / paper")
    width, height = found["size"]
    efficiency = found["efficiency"]
    parts = [
        f"projection of {found['model']}, {width}x{height}, {found['steps']} steps, batch {found['batch']}: "
        f"{efficiency['arithmetic']:.0%} of the peak arithmetic, {efficiency['memory']:.0%} of the peak memory rate.",
        'A projection of counted work, nothing measured here; the column "paper" is what the paper measured.',
        "",
        table((mark, "work of", "GFLOP", "GB, products", "GB, all calls", "calls"), work),
        "",
        table(head, rows),
    ]
    return "\n".join(parts)


def plot(found: dict[str, Any]) -> str:
    """Floor, projected and eager time of every device, stages apart, as SVG."""
    bars = []
    for device, precision in dict.fromkeys((row["device"], row["precision"]) for row in found["rows"]):
        for kind in ("floor", "projected", "eager"):
            stages = {
                row["stage"]: row[kind]
                for row in found["rows"]
                if (row["device"], row["precision"]) == (device, precision) and row["stage"] in STAGES
            }
            if None not in stages.values():
                bars.append(Bar(f"projection: {device}, {precision}, {kind}", stages))
    width, height = found["size"]
    return stacked_bars(f"Projection, not measured: {found['model']} at {width}x{height}", "ms", bars)

"""Projects counted calls to times, by stage and device."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from bench.harness.host import host_facts
from bench.harness.summary import STAGES, table
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
from engines.models.taesana import TaesanaDecoder
from engines.models.text_encoder import TextEncoder, Tokens
from engines.models.transformer import SprintTransformer
from engines.pipeline.prompt_tokenizer import PromptTokenizer

META = torch.device("meta")


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peak that kernels reach. `launch`: host seconds for one eager call.

    Large dense products in cuBLAS and cuDNN reach 60 to 80 % of the arithmetic, plain streams 80 to 90 % of the memory.
    """

    arithmetic: float = 0.6
    memory: float = 0.8
    launch: float = 5e-6


PEAK = Efficiency(arithmetic=1.0, memory=1.0, launch=0.0)


def seconds(calls: Sequence[Call], device: Device, efficiency: Efficiency, *, eight_bit: bool = False) -> float:
    """Returns the time of products and convolutions one after the other; see Device.seconds."""
    shares = {"arithmetic": efficiency.arithmetic, "memory": efficiency.memory}
    return sum(device.seconds(call, **shares, eight_bit=eight_bit) for call in calls if call.kind != "other")


def eager_seconds(calls: Sequence[Call], device: Device, efficiency: Efficiency) -> float:
    """Returns the time of all calls as separate kernels; the host launches the next one meanwhile."""
    streams = sum(call.read + call.written for call in calls if call.kind == "other")
    busy = seconds(calls, device, efficiency) + streams / (device.bandwidth * efficiency.memory)
    return max(busy, len(calls) * efficiency.launch)


def on_meta(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return module.to(device=META, dtype=dtype).eval()


def workloads(
    checkpoint: Checkpoint, size: tuple[int, int], steps: int, batch: int, tokens: int
) -> dict[str, list[Call]]:
    """Returns calls by stage, also of the text and decode stages as upstream runs them.

    Upstream encodes instruction, prompt and padding every time, and does not fold the decoder's upsampling.
    """
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
        taesana = None if checkpoint.taesana is None else TaesanaDecoder(checkpoint.taesana).to(dtype).eval()
    decoder = PixelDecoder(autoencoder if taesana is None else taesana)
    compression = checkpoint.autoencoder.compression
    latent = torch.empty(
        batch, checkpoint.transformer.in_channels, size[1] // compression, size[0] // compression, device=META
    )
    text = torch.empty(batch, tokens + 1, checkpoint.transformer.caption_channels, dtype=dtype, device=META)
    scalar = torch.empty(batch, device=META)
    decode_upstream = count(lambda: decoder(latent))
    if taesana is None:
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
    """Returns milliseconds by stage and in total: floor, projected, eager (16 bits only), and the floor's bound."""
    result: dict[str, dict[str, float | str | None]] = {}
    for stage, stage_calls in calls.items():
        narrow = eight_bit and stage in ("denoise", "decode")
        floor = 1000 * seconds(stage_calls, device, PEAK, eight_bit=narrow)
        endless = replace(device, bandwidth=float("inf"))
        arithmetic = 1000 * seconds(stage_calls, endless, PEAK, eight_bit=narrow)
        result[stage] = {
            "floor": round(floor, 3),
            "projected": round(1000 * seconds(stage_calls, device, efficiency, eight_bit=narrow), 3),
            "eager": None if eight_bit else round(1000 * eager_seconds(stage_calls, device, efficiency), 3),
            "bound": "arithmetic" if arithmetic > floor / 2 else "memory",
        }
    total = {
        key: round(sum(result[stage][key] for stage in STAGES), 3)  # type: ignore[misc]  # numbers where not fp8
        for key in ("floor", "projected", *(() if eight_bit else ("eager",)))
    }
    return {**result, "total": {"eager": None, "bound": None, **total}}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the JSON document. Milliseconds; operations and bytes of one batch."""
    checkpoint = open_checkpoint(options.model, options.decoder)
    size = options.size or checkpoint.settings.default_size
    calls = workloads(checkpoint, size, options.steps, options.batch, options.tokens)
    efficiency = Efficiency(options.arithmetic, options.memory)
    paper_applies = size == (1024, 1024) and options.batch == 1
    rows: list[dict[str, Any]] = []
    for device in DEVICES:
        for precision in ("fp16 or bf16", "fp8"):
            if precision == "fp8" and "fp8" not in device.matrix:
                continue
            for stage, times in project(calls, device, efficiency, eight_bit=precision == "fp8").items():
                in_paper = paper_applies and precision != "fp8"
                paper = PAPER.get((device.name, stage), {}).get(options.steps) if in_paper else None
                rows.append(
                    {"projection": True, "device": device.name, "precision": precision, "stage": stage, **times}
                    | {"paper": paper, "eager_over_paper": _ratio(times["eager"], paper)}
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
        "machine": host_facts(),
        "devices": {device.name: device.source for device in DEVICES},
        "work": {
            stage: {
                "projection": True,
                "operations": sum(call.operations for call in stage_calls),
                "bytes_of_products": sum(call.read + call.written for call in stage_calls if call.kind != "other"),
                "bytes_of_all_calls": sum(call.read + call.written for call in stage_calls),
                "calls": len(stage_calls),
            }
            for stage, stage_calls in calls.items()
        },
        "rows": rows,
    }


def _ratio(eager: float | str | None, paper: str | None) -> float | None:
    """Returns eager over the paper's plain number; below 1 the model is too optimistic."""
    return round(float(eager) / float(paper), 2) if eager and paper and paper.isdecimal() else None


def show(result: dict[str, Any]) -> str:
    """Returns the tables for people; every line says that it is a projection."""
    label = "projection"
    keys = ("operations", "bytes_of_products", "bytes_of_all_calls")
    work = [
        [label, stage, *(entry[key] / 1e9 for key in keys), entry["calls"]] for stage, entry in result["work"].items()
    ]
    columns = ("device", "precision", "stage", "floor", "projected", "eager", "bound", "paper", "eager_over_paper")
    rows = [[label, *(row[column] for column in columns)] for row in result["rows"]]
    head = (label, *columns[:3], "floor, ms", "projected, ms", "eager, ms", "bound", "paper, ms", "eager / paper")
    width, height = result["size"]
    efficiency = result["efficiency"]
    parts = [
        f"projection of {result['model']}, {width}x{height}, {result['steps']} steps, batch {result['batch']}: "
        f"{efficiency['arithmetic']:.0%} of the peak arithmetic, {efficiency['memory']:.0%} of the peak memory rate.",
        'A projection of counted work, nothing measured here; the column "paper" is what the paper measured.',
        "",
        table((label, "work of", "GFLOP", "GB, products", "GB, all calls", "calls"), work),
        "",
        table(head, rows),
    ]
    return "\n".join(parts)


def plot(result: dict[str, Any]) -> str:
    """Returns an SVG of floor, projected and eager time by device and stage."""
    bars = []
    for device, precision in dict.fromkeys((row["device"], row["precision"]) for row in result["rows"]):
        for kind in ("floor", "projected", "eager"):
            stages = {
                row["stage"]: row[kind]
                for row in result["rows"]
                if (row["device"], row["precision"]) == (device, precision) and row["stage"] in STAGES
            }
            if None not in stages.values():
                bars.append(Bar(f"projection: {device}, {precision}, {kind}", stages))
    width, height = result["size"]
    return stacked_bars(f"Projection, not measured: {result['model']} at {width}x{height}", "ms", bars)

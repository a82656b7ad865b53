"""The two pipelines that are compared, from one checkpoint: our engine and diffusers' SanaSprintPipeline.

Both run the same workload and return uint8 pixels and the seconds of each stage.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from bench.harness.errors import BenchError
from engines.checkpoints.checkpoint import Checkpoint
from engines.loader import load_engine
from engines.models.instruction import INSTRUCTION
from engines.types import Job, Pixels

GUIDANCE = 4.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Baseline = Literal["diffusers", "diffusers-compiled", "openvino", "openvino-static", "openvino-int8"]


@dataclass(frozen=True, slots=True)
class Workload:
    """One run's images: a prompt and a seed for each."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    width: int
    height: int
    steps: int


@dataclass(frozen=True, slots=True)
class TimedImages:
    """Images, and seconds by stage; "total" runs from prompts to uint8 pixels."""

    images: list[Pixels]
    seconds: dict[str, float]


class Pipeline(Protocol):
    @property
    def facts(self) -> dict[str, object]:
        """Backend, precision, device, and the reasons for them."""

    def run(self, workload: Workload) -> TimedImages: ...

    def close(self) -> None:
        """Frees what the pipeline holds; it cannot run afterwards."""


class EnginePipeline:
    """Our engine on diffusers' schedule, so that both make the same images."""

    def __init__(self, checkpoint: Checkpoint, **options: Any) -> None:
        self._engine = load_engine(checkpoint, schedule="diffusers", **options)
        if self._engine.info.device != "cpu":
            self._engine.warmup()  # captures graphs, as a server does before it is ready

    @property
    def facts(self) -> dict[str, object]:
        info = self._engine.info
        return {
            "backend": info.backend,
            "precision": info.precision,
            "device": info.device,
            "reasons": info.reasons,
            "versions": info.versions,
        }

    def run(self, workload: Workload) -> TimedImages:
        pairs = zip(workload.prompts, workload.seeds, strict=True)
        jobs = [Job(prompt, seed, workload.width, workload.height, workload.steps, GUIDANCE) for prompt, seed in pairs]
        began = time.perf_counter()
        images = self._engine.generate(jobs)
        total = time.perf_counter() - began
        if any(image.prompt_cached for image in images):
            raise BenchError("a prompt was measured twice: the text stage would count for nothing")
        stages = images[0].stages
        seconds = {"text": stages.text, "denoise": stages.denoise, "decode": stages.decode, "total": total}
        return TimedImages([image.pixels for image in images], seconds)

    def close(self) -> None:
        self._engine.close()


class DiffusersPipeline:
    """SanaSprintPipeline as documented, without binning of sizes.

    compiled: torch.compile of its three modules, as NVlabs and diffusers advise. Stage "decode" ends with the image;
    "denoise" is everything between text and decode.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        precision: str,
        device: torch.device,
        *,
        compiled: bool = False,
        guidance: float = GUIDANCE,
    ) -> None:
        settings = checkpoint.settings
        self._pipe = build_diffusers_pipeline(checkpoint, DTYPES[precision], device)
        self._compiled, self._precision, self._device, self._guidance = compiled, precision, device, guidance
        self._instruction = INSTRUCTION.split("\n") if settings.instruction else None
        self._max_tokens = settings.max_prompt_tokens
        if compiled:
            self._pipe.text_encoder.compile()
            self._pipe.transformer.compile()
            self._pipe.vae.decoder.compile()
        self._marks: dict[str, float] = {}
        self._pipe.encode_prompt = self._timed("text ended", self._pipe.encode_prompt, after=True)
        self._pipe.vae.decode = self._timed("decode began", self._pipe.vae.decode, after=False)

    @property
    def facts(self) -> dict[str, object]:
        import diffusers

        backend = "torch.compile" if self._compiled else "eager"
        versions = {"diffusers": diffusers.__version__, "torch": torch.__version__}
        return {"backend": backend, "precision": self._precision, "device": str(self._device), "versions": versions}

    def run(self, workload: Workload) -> TimedImages:
        began = self._time()
        images = self._pipe(
            prompt=list(workload.prompts),
            num_inference_steps=workload.steps,
            intermediate_timesteps=1.3 if workload.steps == 2 else None,
            guidance_scale=self._guidance,
            height=workload.height,
            width=workload.width,
            generator=[torch.Generator().manual_seed(seed) for seed in workload.seeds],
            max_sequence_length=self._max_tokens,
            complex_human_instruction=self._instruction,
            use_resolution_binning=False,
            output_type="pil",
        ).images
        ended = self._time()
        text, decode = self._marks["text ended"], self._marks["decode began"]
        seconds = {"text": text - began, "denoise": decode - text, "decode": ended - decode, "total": ended - began}
        return TimedImages([np.asarray(image) for image in images], seconds)

    def close(self) -> None:
        del self._pipe

    def _timed(self, mark: str, call: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            if not after:
                self._marks[mark] = self._time()
            answer = call(*arguments, **options)
            if after:
                self._marks[mark] = self._time()
            return answer

        return timed

    def _time(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def build_diffusers_pipeline(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """Builds a SanaSprintPipeline from upstream's classes and the checkpoint's weights, whose keys are identical."""
    import diffusers
    import transformers

    upstream: Any = diffusers  # both are untyped
    tokenizers: Any = transformers
    config = checkpoint.transformer
    # A positional embedding is a buffer that no checkpoint holds: those transformers, all small, are built for real.
    with torch.device("cpu" if config.interpolation_scale else "meta"):
        transformer = upstream.SanaTransformer2DModel.from_config(config.to_dict())
    with torch.device("meta"):
        vae = upstream.AutoencoderDC.from_config(checkpoint.autoencoder.to_dict())
    text_encoder = _text_encoder(checkpoint.text)
    checkpoint.weights.load_into("transformer", transformer, dtype, device)
    checkpoint.weights.load_into("vae", vae, dtype, device)
    checkpoint.weights.load_into("text_encoder", text_encoder, dtype, device)
    tokenizer = checkpoint.load_tokenizer()
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad")}
    absent = [token for token in special.values() if tokenizer.token_to_id(token) is None]
    if absent:
        raise BenchError(f"{checkpoint.name}: its tokenizer has no {', '.join(absent)}; a Gemma tokenizer is needed")
    created = upstream.SanaSprintPipeline(
        tokenizer=tokenizers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **special),
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=upstream.SCMScheduler(prediction_type="trigflow", sigma_data=0.5),
    )
    created.set_progress_bar_config(disable=True)
    return created


def _text_encoder(config: Mapping[str, object]) -> torch.nn.Module:
    """Builds transformers' Gemma2Model on the meta device, with the buffers that no checkpoint holds.

    Attention is eager: its logits are soft-capped, which the fused kernels do not support.
    """
    from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Model, Gemma2RotaryEmbedding

    parsed = Gemma2Config.from_dict(dict(config), attn_implementation="eager")
    with torch.device("meta"):
        body: torch.nn.Module = Gemma2Model(parsed)
    body.rotary_emb = Gemma2RotaryEmbedding(parsed)
    embed = body.get_submodule("embed_tokens")
    embed.register_buffer("embed_scale", torch.tensor(float(parsed.hidden_size) ** 0.5), persistent=False)
    return body

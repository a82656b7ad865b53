"""Runs optimum-intel's OVSanaSprintPipeline on a CPU, in an environment of its own (`make openvino`).

    python openvino_child.py FOLDER OUT [--int8] [--static]

FOLDER is a checkpoint in the diffusers layout; OUT keeps its OpenVINO models, which are exported if they are absent.
Then each line of stdin is a workload as JSON, and each line of stdout its result. Imports nothing of this project.

The export is optimum-cli's, part by part: at once it needs over 24 GB, since it traces the decoder at 2016x2016 pixels.
As there, a text encoder of over a billion parameters gets weights in 8 bits; --int8 gives them to every part. --static
fixes all shapes to those of the first workload: the pipeline's own reshape() doubles the transformer's batch, which
SANA-Sprint does not.
"""

import argparse
import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

LATENT_SIDE = 7  # cells at which the decoder is traced; its shapes stay dynamic
MANY_PARAMETERS = 1e9  # optimum-cli's bound for weights in 8 bits
PARTS = ("text_encoder", "transformer", "vae_decoder")


def export(folder: Path, out: Path, *, int8: bool) -> None:
    """Writes the OpenVINO models of a checkpoint, unless OUT holds them."""
    done = out / "exported.json"
    if done.exists():
        return
    import nncf
    import openvino
    from diffusers import SanaSprintPipeline
    from optimum.exporters.openvino.convert import export_models, get_diffusion_models_for_export_ext

    pipeline: Any = SanaSprintPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)  # type: ignore[no-untyped-call]  # untyped
    out.mkdir(parents=True, exist_ok=True)
    pipeline.scheduler.save_pretrained(out / "scheduler")
    pipeline.tokenizer.save_pretrained(out / "tokenizer")
    pipeline.save_config(out)
    _, parts = get_diffusion_models_for_export_ext(pipeline, exporter="openvino")
    for name in PARTS:
        module, config = parts.pop(name)
        (out / name).mkdir(exist_ok=True)
        if hasattr(module, "save_config"):
            module.save_config(out / name)
        else:
            module.config.save_pretrained(out / name)
        file = Path(name, "openvino_model.xml")
        shapes = {"height": LATENT_SIDE, "width": LATENT_SIDE} if name == "vae_decoder" else {}
        options: dict[str, Any] = {"stateful": False, "patch_16bit_model": True, "library_name": "diffusers"}
        export_models({name: (module, config)}, out, [str(file)], input_shapes=shapes, **options)
        if int8 or sum(weight.numel() for weight in module.parameters()) > MANY_PARAMETERS:
            mode = nncf.CompressWeightsMode.INT8_ASYM
            model = nncf.compress_weights(openvino.Core().read_model(out / file), mode=mode)
            openvino.save_model(model, out / name / "eight_bit.xml")
            for kind in ("xml", "bin"):
                (out / name / f"eight_bit.{kind}").replace((out / file).with_suffix(f".{kind}"))
        del module
    done.write_text(json.dumps({"int8": int8}))


class Rival:
    """The pipeline, and the moments at which its text stage ended and its decoder began."""

    def __init__(self, folder: Path, *, static: bool) -> None:
        from optimum.intel.openvino import OVSanaSprintPipeline

        self._pipe: Any = OVSanaSprintPipeline.from_pretrained(folder, compile=True)
        self._pipe.set_progress_bar_config(disable=True)
        self._marks: dict[str, float] = {}
        self._pipe.encode_prompt = self._timed("text ended", self._pipe.encode_prompt, after=True)
        self._pipe.vae.decode = self._timed("decode began", self._pipe.vae.decode, after=False)
        self._dynamic = static

    def run(self, workload: dict[str, Any]) -> dict[str, Any]:
        """Writes the images to workload["images"] (npy, uint8 [N, H, W, 3]).

        Returns seconds by stage, and the most memory of this process so far in bytes.
        """
        if self._dynamic:
            self._fix_shapes(workload)
        began = time.perf_counter()
        images = self._generate(workload)
        ended = time.perf_counter()
        np.save(workload["images"], np.stack([np.asarray(image) for image in images]))
        text, decode = self._marks["text ended"], self._marks["decode began"]
        seconds = {"text": text - began, "denoise": decode - text, "decode": ended - decode, "total": ended - began}
        return {"seconds": seconds, "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}

    def _generate(self, workload: dict[str, Any]) -> list[Any]:
        images: list[Any] = self._pipe(
            prompt=workload["prompts"],
            num_inference_steps=workload["steps"],
            intermediate_timesteps=1.3 if workload["steps"] == 2 else None,
            guidance_scale=workload["guidance"],
            height=workload["height"],
            width=workload["width"],
            generator=[torch.Generator().manual_seed(seed) for seed in workload["seeds"]],
            max_sequence_length=workload["max_tokens"],
            complex_human_instruction=workload["instruction"],
            use_resolution_binning=False,
            output_type="pil",
        ).images
        return images

    def _fix_shapes(self, workload: dict[str, Any]) -> None:
        """Records the shapes of one dynamic run, and compiles every part for them."""
        parts = [getattr(self._pipe, name) for name in PARTS]
        shapes: dict[int, dict[str, list[int]]] = {}
        for part in parts:
            part.request = _recorded(part.request, shapes.setdefault(id(part), {}))
        self._generate(workload)
        for part in parts:
            part.model.reshape(shapes[id(part)])
            part.request = None
            part.compile()
        self._dynamic = False

    def _timed(self, mark: str, call: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            if not after:
                self._marks[mark] = time.perf_counter()
            answer = call(*arguments, **options)
            if after:
                self._marks[mark] = time.perf_counter()
            return answer

        return timed


def _recorded(request: Callable[..., Any], shapes: dict[str, list[int]]) -> Callable[..., Any]:
    def run(inputs: dict[str, Any], **options: Any) -> Any:
        shapes.update({name: list(np.shape(value)) for name, value in inputs.items()})
        return request(inputs, **options)

    return run


def versions() -> dict[str, str]:
    """Returns the versions of the packages that matter."""
    from importlib.metadata import version

    return {name: version(name) for name in ("optimum-intel", "openvino", "nncf", "diffusers", "torch")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--static", action="store_true")
    options = parser.parse_args()
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        export(options.folder, options.out, int8=options.int8)
        rival = Rival(options.out, static=options.static)
        print(json.dumps({"versions": versions()}), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(rival.run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()

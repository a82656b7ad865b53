"""Seeded random weights at full size, for benchmarks and proofs without the published ones.

Every parameter affects the output (scale_shift_table ~ N(0, 1), so no gate is near zero). Activations keep their size
through all layers. The images are noise.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from engines.checkpoints.weights import Component, load_strict
from engines.models.instruction import INSTRUCTION

_CHUNK = 2**22  # numbers: 16 MiB beside the weights


@dataclass(frozen=True)
class RandomWeights:
    """A WeightSource from a seed: equal on every machine with the same torch. decoder: a name of --decoder."""

    seed: int = 0
    decoder: str = "full"

    def load_into(self, part: Component, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Draws in fp32 on the CPU and rounds to `dtype`. Each chunk has its own seed, so threads share the work."""
        shapes = module.state_dict()
        tensors = {key: torch.empty(like.shape, dtype=dtype, device=device) for key, like in shapes.items()}

        @torch.inference_mode()  # as the caller may be in, which threads do not inherit
        def draw(key: str, start: int) -> None:
            generator = torch.Generator().manual_seed(_seed(self.seed, part, key, start))
            chunk = tensors[key].view(-1)[start : start + _CHUNK]
            chunk.copy_(torch.empty(len(chunk)).normal_(*_distribution(part, key, shapes[key]), generator=generator))

        pending = list[Future[None]]()
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            for key, tensor in tensors.items():
                for start in range(0, tensor.numel(), _CHUNK):
                    pending.append(threads.submit(draw, key, start))
        for one in pending:
            one.result()
        load_strict(module, tensors, f"random {part}")
        module.to(device)

    def tokenizer(self) -> Tokenizer:
        """Returns a byte-level BPE trained on the instruction, which then has about as many tokens as with Gemma's."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=1000,
            show_progress=False,
            special_tokens=["<pad>", "<eos>", "<bos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(_lines(), trainer)
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
        return tokenizer

    def sha256(self) -> str:
        text = f"random weights by chunk, seed {self.seed}, torch {torch.__version__}"
        text += "" if self.decoder == "full" else f", decoder {self.decoder}"
        return hashlib.sha256(text.encode()).hexdigest()


def _lines() -> Iterator[str]:
    yield from INSTRUCTION.lower().split("\n")
    yield from INSTRUCTION.split("\n")


def _seed(seed: int, part: Component, key: str, start: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {part} {key} {start}".encode()).digest()[:8], "little") >> 1


def _distribution(part: Component, key: str, like: Tensor) -> tuple[float, float]:
    """Returns mean and standard deviation of one parameter."""
    if key.endswith("scale_shift_table"):
        return 0.0, 1.0
    if key.endswith("bias"):
        return 0.0, 0.02
    if like.ndim == 1:  # norms; Gemma's add 1 to their weight
        return (0.0 if part == "text_encoder" else 1.0), 0.1
    return 0.0, (like.shape[0] / like.numel()) ** 0.5  # 1 / sqrt(fan in)

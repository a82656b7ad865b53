"""Gemma-2 on a GPU: seven launches per layer, and one CUDA graph per (prompts, tokens).

Reading the weights bounds the time. So products of few rows have their own kernels, which read an MLP's weights in 8
bits if asked to, and one kernel does all work between two products. Results equal those of engines.models.gemma and
engines.models.text_encoder, which run prompts that fit no bucket.

Shapes: B prompts, L tokens to run, M = B*L rows, P prefix tokens, D hidden size, H query and K key heads of d.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.backends.cuda.graphs import WARM_UPS, GraphCapture, Replay, capture_missing
from engines.backends.cuda.mlp_weights import MlpWeight, give_up_wide
from engines.kernels.op import Ops
from engines.kernels.text.capped_attention import CAPPED_ATTENTION, MAX_CAP
from engines.kernels.text.gelu_gate import GELU_GATE
from engines.kernels.text.gemma_norm import GEMMA_NORM, SANDWICH_NORM
from engines.kernels.text.skinny_product import GATED_PRODUCT, MAX_ROWS, SKINNY_PRODUCT
from engines.models.gemma import GemmaBody, Layer, Norm, Past
from engines.models.text_encoder import TextEncoder, Tokens
from engines.types import smallest_fitting

BATCHES = (1, 2, 4, 8)
LENGTHS = (16, 32, 64, 128, 304)
# Up to about this many rows a product takes no longer than reading its weights, so further rows are free.
_FREE_ROWS = 256


@dataclass(frozen=True)
class _Layer:
    """Weights of one layer as the kernels read them; norms are 1 + weight [D] in fp32."""

    qkv: Tensor  # [(H + 2K)*d, D]
    out: Tensor  # [D, H*d]
    gate_up: MlpWeight  # [2 * MLP, D]
    down: MlpWeight  # [D, MLP]
    after_attention: Tensor
    before_mlp: Tensor
    after_mlp: Tensor
    key: Tensor  # [K, P, d]
    value: Tensor
    window: int


class CudaTextBody:
    """Runs a loaded body after a prefix.

    The module's weights become views of the fused matrices, so it computes as before and needs no further memory.
    past: keys and values of the prefix, [1, K, P, d] each. longest: most tokens of a prompt after the prefix.

    Raises ValueError for an architecture that the kernels do not support.
    """

    @torch.no_grad()
    def __init__(self, body: GemmaBody, past: Sequence[Past], ops: Ops, longest: int):
        config, weight = body.config, body.embed_tokens.weight
        if config.attn_logit_softcapping is None or config.attn_logit_softcapping > MAX_CAP:
            raise ValueError(
                f"attn_logit_softcapping: got {config.attn_logit_softcapping}, needed is at most {MAX_CAP}"
            )
        if weight.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"type of the text encoder: got {weight.dtype}, needed is bfloat16 or float32")
        self._ops, self._embedding, self._eps = ops, weight, config.rms_norm_eps
        self._cap, self._scale = config.attn_logit_softcapping, config.query_pre_attn_scalar**-0.5
        # Upstream rounds the scale to the weights' type before it multiplies.
        self._embed_scale = float(torch.tensor(config.hidden_size**0.5, dtype=weight.dtype))
        layers = [layer for layer in body.layers if isinstance(layer, Layer)]
        self._mlps = [layer.mlp for layer in layers]
        self._layers = [
            _layer_weights(layer, prefix, config.sliding_window if kind == "sliding_attention" else 2**30)
            for layer, prefix, kind in zip(layers, past, config.layer_types, strict=True)
        ]
        # The norm after a layer is the next layer's first norm, or the final norm.
        self._first, *rest = [_norm_weight(layer.input_layernorm) for layer in layers]
        self._next = [*rest, _norm_weight(body.norm)]
        even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=weight.device)
        position = torch.arange(past[0][0].shape[2] + longest, dtype=torch.float32, device=weight.device)
        angle = position[:, None] * (1.0 / config.rope_theta ** (even / config.head_dim))
        self._cosine, self._sine = angle.cos(), angle.sin()  # [positions, d/2]

    @torch.inference_mode()
    def to_fp8(self) -> None:
        """Rounds the MLPs' weights to e4m3 and frees the others; the module computes by the rounded ones too."""
        for index, (layer, mlp) in enumerate(zip(self._layers, self._mlps, strict=True)):
            self._layers[index] = narrow = replace(layer, gate_up=layer.gate_up.narrowed(), down=layer.down.narrowed())
            give_up_wide(mlp, narrow.gate_up, narrow.down)

    def __call__(self, ids: Tensor, shared: Tensor) -> Tensor:
        """Returns hidden states [B, L, D] of ids [B, L]; row b follows the first shared[b] tokens of the prefix."""
        ops, eps = self._ops, self._eps
        x = F.embedding(ids.flatten(), self._embedding) * self._embed_scale  # [M, D]
        h: Tensor = ops(GEMMA_NORM, x, self._first, eps)
        is_skinny = h.shape[0] <= MAX_ROWS
        afterwards = [*self._layers[1:], None]
        for layer, following, after in zip(self._layers, self._next, afterwards, strict=True):
            # With few rows, each small kernel also prefetches the weights that the next product reads.
            qkv = F.linear(h, layer.qkv).view(*ids.shape, -1)
            attended = ops(
                CAPPED_ATTENTION, qkv, layer.key, layer.value, shared, self._cosine, self._sine,
                self._scale, self._cap, layer.window, layer.out if is_skinny else None,
            )  # fmt: skip
            attended = attended.flatten(0, 1)
            y = (
                ops(SKINNY_PRODUCT, attended, layer.out) if is_skinny else F.linear(attended, layer.out)
            )  # [S, M, D] or [M, D]
            gate_up, down = layer.gate_up, layer.down
            ahead = gate_up.values if is_skinny else None
            x, h = ops(SANDWICH_NORM, y, x, layer.after_attention, layer.before_mlp, eps, ahead)
            if is_skinny:
                y = ops(SKINNY_PRODUCT, ops(GATED_PRODUCT, h, gate_up.values, down.values, gate_up.scale), *down)
            else:
                gated = ops(GELU_GATE, F.linear(h, gate_up.wide(ops, h.dtype)))
                y = F.linear(gated, down.wide(ops, h.dtype))
            x, h = ops(SANDWICH_NORM, y, x, layer.after_mlp, following, eps, after.qkv if is_skinny and after else None)
        return h.view(*ids.shape, -1)


def _layer_weights(layer: Layer, past: Past, window: int) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        qkv=_fuse(attention.q_proj, attention.k_proj, attention.v_proj),
        out=attention.o_proj.weight,
        gate_up=MlpWeight(_fuse(mlp.gate_proj, mlp.up_proj)),
        down=MlpWeight(mlp.down_proj.weight),
        after_attention=_norm_weight(layer.post_attention_layernorm),
        before_mlp=_norm_weight(layer.pre_feedforward_layernorm),
        after_mlp=_norm_weight(layer.post_feedforward_layernorm),
        key=past[0][0].contiguous(),
        value=past[1][0].contiguous(),
        window=window,
    )


def _fuse(*linears: nn.Linear) -> Tensor:
    """Concatenates the weights into one matrix; the modules' weights become views of it."""
    fused = torch.cat([linear.weight for linear in linears])
    first = 0
    for linear in linears:
        rows = linear.weight.shape[0]
        linear.weight = nn.Parameter(fused[first : first + rows], requires_grad=False)
        first += rows
    return fused


def _norm_weight(norm: Norm) -> Tensor:
    return 1.0 + norm.weight.float()


class TextKey(NamedTuple):
    """Shape of a captured graph."""

    prompts: int
    tokens: int


@dataclass(frozen=True)
class _Captured:
    replay: Replay
    hidden: Tensor  # [B, L, D], overwritten by each replay


class CudaTextEncoder:
    """Replaces the TextEncoder that it is made of.

    Captured buckets run as graphs, others eagerly; the TextEncoder runs a prompt longer than any bucket. `uncaptured`
    counts eager runs by bucket, with 0 prompts for a longer prompt. Not safe for concurrent calls.
    """

    @torch.inference_mode()
    def __init__(
        self, encoder: TextEncoder, ops: Ops, batches: Sequence[int] = BATCHES, lengths: Sequence[int] = LENGTHS
    ):
        self.prefix = encoder.prefix
        self._encoder = encoder
        self._batches, self._lengths = tuple(sorted(batches)), tuple(sorted(lengths))
        self._body = CudaTextBody(encoder.body, encoder._past, ops, self._lengths[-1])
        keys = [TextKey(batch, length) for batch in self._batches for length in self._lengths]
        self.capture_order = tuple(sorted(keys, key=lambda key: (key.prompts * key.tokens, key.tokens), reverse=True))
        # One copy transfers a batch: shared prefix lengths [B], then ids [B, L].
        self._device = encoder.body.embed_tokens.weight.device
        self._packed = torch.zeros(max(_size(key) for key in keys), dtype=torch.long, device=self._device)
        self._captured: dict[TextKey, _Captured] = {}
        self.uncaptured: Counter[TextKey] = Counter()

    def to_fp8(self) -> None:
        """Converts the body as CudaTextBody.to_fp8, before any graph is captured."""
        self._body.to_fp8()

    @property
    def ready(self) -> bool:
        return len(self._captured) == len(self.capture_order)

    @torch.inference_mode()
    def warm(self) -> None:
        """Runs every bucket once, largest first, so that each tile of each kernel is launched."""
        for key in self.capture_order:
            self._fill_by_example(key)
            self._run(key)

    @torch.inference_mode()
    def capture(self, recorder: GraphCapture) -> str | None:
        """Captures every missing bucket, largest first, until one fails. Returns the reason."""
        return capture_missing(self.capture_order, lambda key: self._capture(key, recorder), self._captured)

    @torch.inference_mode()
    def encode(self, prompts: Sequence[Tokens]) -> list[Tensor]:
        """Returns the hidden states of each prompt that the transformer reads: [T, D], T differing."""
        shared = [self._encoder._shared(prompt) for prompt in prompts]
        run_lengths = [max(1, len(prompt.ids) - start) for prompt, start in zip(prompts, shared, strict=True)]
        states: dict[int, Tensor] = {}
        fitting = [index for index, run in enumerate(run_lengths) if run <= self._lengths[-1]]
        for index in set(range(len(prompts))) - set(fitting):
            self.uncaptured[TextKey(0, run_lengths[index])] += 1
            [states[index]] = self._encoder.encode([prompts[index]])
        for key, members in self._groups({index: run_lengths[index] for index in fitting}):
            self._fill(key, [shared[index] for index in members], [prompts[index].ids for index in members])
            hidden = self._hidden(key)
            for row, index in enumerate(members):
                start, ids = shared[index], prompts[index].ids
                states[index] = torch.cat(
                    [self._encoder._first, hidden[row, prompts[index].start - start : max(0, len(ids) - start)]]
                )
        return [states[index] for index in range(len(prompts))]

    def _groups(self, run_lengths: dict[int, int]) -> Iterator[tuple[TextKey, list[int]]]:
        """Yields batches, longest prompts first; a shorter prompt joins while its padding costs nothing."""
        waiting = sorted(run_lengths, key=lambda index: run_lengths[index], reverse=True)
        while waiting:
            length = smallest_fitting(run_lengths[waiting[0]], self._lengths)
            members: list[int] = []
            for index in waiting[: self._batches[-1]]:
                batch = smallest_fitting(len(members) + 1, self._batches)
                if smallest_fitting(run_lengths[index], self._lengths) < length and batch * length > _FREE_ROWS:
                    break
                members.append(index)
            waiting = waiting[len(members) :]
            yield TextKey(smallest_fitting(len(members), self._batches), length), members

    def _fill(self, key: TextKey, shared: Sequence[int], ids: Sequence[Sequence[int]]) -> None:
        """Copies a batch to the device; rows beyond the prompts hold zeros, and their results are not read."""
        # A new pinned buffer per copy: torch's allocator reuses one only after its copy is done.
        packed = torch.zeros(_size(key), dtype=torch.long, pin_memory=self._device.type == "cuda")
        starts, rows = packed[: key.prompts], packed[key.prompts :].view(key)
        for row, (start, tokens) in enumerate(zip(shared, ids, strict=True)):
            starts[row] = start
            own = torch.tensor(tokens[start:], dtype=torch.long)
            rows[row, : len(own)] = own
        self._packed[: len(packed)].copy_(packed, non_blocking=True)

    def _hidden(self, key: TextKey) -> Tensor:
        """Returns hidden states [B, L, D] of the filled batch; copy them before the next replay."""
        captured = self._captured.get(key)
        if captured is None:
            self.uncaptured[key] += 1
            return self._run(key)
        captured.replay()
        return captured.hidden

    def _run(self, key: TextKey) -> Tensor:
        packed = self._packed[: _size(key)]
        return self._body(packed[key.prompts :].view(key), packed[: key.prompts])

    def _fill_by_example(self, key: TextKey) -> None:
        """Fills a batch with tokens of the prefix: those of an earlier batch would be read as prefix lengths."""
        ids = (*self.prefix, *islice(cycle(self.prefix), key.tokens))
        self._fill(key, [len(self.prefix)] * key.prompts, [ids] * key.prompts)

    def _capture(self, key: TextKey, recorder: GraphCapture) -> _Captured:
        self._fill_by_example(key)
        for _ in range(WARM_UPS):
            recorder.warm(lambda: self._run(key))
        replay, (hidden,) = recorder.record(lambda: (self._run(key),))
        return _Captured(replay, hidden)


def _size(key: TextKey) -> int:
    return key.prompts * (1 + key.tokens)

"""The GPU's Gemma-2 equals the module it is made of, by references and by interpreted kernels."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
from small_checkpoint import randomise_weights
from torch import Tensor

from engines.artifacts.native.storages import storages_of
from engines.backends.cuda.graphs import EagerReplay
from engines.backends.cuda.text import CudaTextBody, CudaTextEncoder, TextKey
from engines.errors import CaptureError
from engines.kernels.op import Launcher, Ops, sqnr_db
from engines.models.gemma import GemmaBody, GemmaConfig
from engines.models.text_encoder import TextEncoder, Tokens
from engines.pipeline.prompt_tokenizer import PromptTokenizer
from engines.pipeline.text_stage import TextStage

CONFIG = GemmaConfig(
    vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, query_pre_attn_scalar=16, sliding_window=7, rms_norm_eps=1e-4,
)  # fmt: skip
PREFIX = (2, *(5 * at % 61 + 3 for at in range(19)))


def gemma_body(dtype: torch.dtype = torch.float32, config: GemmaConfig = CONFIG) -> GemmaBody:
    body = randomise_weights(GemmaBody(config))
    with torch.no_grad():
        for layer in body.layers:  # so that the cap changes the logits
            layer.self_attn.q_proj.weight.mul_(6)
    return body.to(dtype).requires_grad_(False)


def some_ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(length))


def run_module(body: GemmaBody, ids: Tensor, shared: Sequence[int]) -> Tensor:
    """Runs the module itself, row by row."""
    with torch.inference_mode():
        _, past = body(torch.tensor([PREFIX]))
        rows = [
            body(row[None], [(key[:, :, :count], value[:, :, :count]) for key, value in past])[0]
            for row, count in zip(ids, shared, strict=True)
        ]
    return torch.cat(rows)


def cuda_body(body: GemmaBody, ops: Ops) -> CudaTextBody:
    with torch.inference_mode():
        return CudaTextBody(body, body(torch.tensor([PREFIX]))[1], ops, longest=100)


@pytest.mark.parametrize("window", [7, 4096])
@pytest.mark.parametrize("shared", [[19], [20, 3, 11]])
@pytest.mark.parametrize("length", [1, 16, 90])
def test_body_equals_the_module(length: int, shared: list[int], window: int) -> None:
    """Up to 64 rows use the skinny products, more use PyTorch's."""
    body = gemma_body(config=GemmaConfig(**{**vars(CONFIG), "sliding_window": window}))
    ids = some_ids(len(shared), length)
    expected = run_module(body, ids, shared)
    actual = cuda_body(body, Ops(None))(ids, torch.tensor(shared, dtype=torch.int32))
    assert sqnr_db(expected, actual) > 90
    # The module computes as before, from the same memory.
    assert torch.equal(run_module(body, ids, shared), expected)
    attention = body.layers[0].self_attn
    assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.v_proj.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize(("batch", "length"), [(2, 16), (2, 40)])
def test_kernels_equal_the_module(batch: int, length: int) -> None:
    body, shared = gemma_body(), [19, 4][:batch]
    ids = some_ids(batch, length)
    expected = run_module(body, ids, shared)
    assert sqnr_db(expected, cuda_body(body, Ops(Launcher(tma=False, processors=3)))(ids, torch.tensor(shared))) > 90


def test_as_near_to_fp32_in_bf16_as_the_module_is() -> None:
    ids, shared = some_ids(2, 24), [19, 4]
    expected = run_module(gemma_body(), ids, shared)
    body = gemma_body(torch.bfloat16)
    module_error = (run_module(body, ids, shared) - expected).abs().mean()
    ours = cuda_body(body, Ops(None))(ids, torch.tensor(shared))
    assert ours.dtype == torch.bfloat16
    assert (ours - expected).abs().mean() <= 1.2 * module_error


@pytest.mark.parametrize(
    ("changed", "dtype", "message"),
    [
        ({"attn_logit_softcapping": None}, torch.float32, "attn_logit_softcapping: got None"),
        ({"attn_logit_softcapping": 80.0}, torch.float32, "attn_logit_softcapping: got 80"),
        ({}, torch.float16, "float16, needed is bfloat16"),
    ],
)
def test_what_the_kernels_do_not_compute_is_refused(
    changed: dict[str, object], dtype: torch.dtype, message: str
) -> None:
    body = gemma_body(dtype, GemmaConfig(**{**vars(CONFIG), **changed}))
    with pytest.raises(ValueError, match=message):
        cuda_body(body, Ops(None))


START = 19  # prompts share 20 tokens, of which the transformer reads the last
PROMPTS = {
    "short": Tokens((*PREFIX, 9, 8, 7), START),
    "longer": Tokens((*PREFIX, *range(3, 30)), START),
    "nothing of its own": Tokens(PREFIX, START),
    "cut before anything is kept": Tokens(PREFIX[:11], START),
    "joins with the prefix": Tokens((*PREFIX[:17], 60, 61, 62, 63), START),
    "another from the third token": Tokens((*PREFIX[:2], *range(40, 60)), START),
    "short again": Tokens((*PREFIX, 30), START),
    "keeps all but the prefix's start": Tokens((*PREFIX, 11, 12), 3),
    "longer than any bucket": Tokens((*PREFIX, *(range(3, 63))), START),
}
BATCHES, LENGTHS = (1, 2, 4), (8, 16, 32)


@pytest.fixture
def reference() -> TextEncoder:
    return TextEncoder(gemma_body(), PREFIX)


@pytest.fixture
def encoder(reference: TextEncoder) -> CudaTextEncoder:
    return CudaTextEncoder(reference, Ops(None), BATCHES, LENGTHS)


def assert_equal(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> None:
    for want, got in zip(expected, actual, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("captured", [False, True])
def test_encodes_as_the_text_encoder(encoder: CudaTextEncoder, reference: TextEncoder, captured: bool) -> None:
    assert encoder.prefix == PREFIX
    if captured:
        encoder.warm()
        encoder.capture(EagerReplay())
    assert encoder.ready is captured
    prompts = list(PROMPTS.values())
    expected = reference.encode(prompts)
    assert_equal(expected, encoder.encode(prompts))
    assert_equal(expected[::-1], encoder.encode(prompts[::-1]))
    for want, prompt in zip(expected, prompts, strict=True):
        assert_equal([want], encoder.encode([prompt]))
    assert encoder.encode([]) == []
    too_long = TextKey(0, len(prompts[-1].ids) - START)
    assert (set(encoder.uncaptured) == {too_long}) is captured
    assert encoder.uncaptured[too_long] == 3


def test_no_warm_up_reads_beyond_the_prefix(encoder: CudaTextEncoder) -> None:
    """A batch that ran before has token ids where a larger bucket has prefix lengths, by which kernels read memory."""
    encoder.encode([PROMPTS["longer"]])
    body, seen = encoder._body, list[int]()

    def spy(ids: Tensor, shared: Tensor) -> Tensor:
        seen.append(int(shared.max()))
        return body(ids, shared)

    encoder._body = spy  # type: ignore[assignment]  # the same call
    encoder.capture(EagerReplay())
    encoder.warm()
    assert len(seen) > 3 * len(encoder.capture_order) - 1
    assert set(seen) == {len(PREFIX)}


def test_results_are_the_callers_own(encoder: CudaTextEncoder) -> None:
    encoder.capture(EagerReplay())
    [first] = encoder.encode([PROMPTS["short"]])
    before = first.clone()
    encoder.encode([PROMPTS["longer"]])
    encoder.encode([Tokens((*PREFIX, 40, 41, 42), START)])
    assert torch.equal(first, before)


def run_keys(encoder: CudaTextEncoder, runs: Sequence[int]) -> list[TextKey]:
    """Returns the buckets in which prompts with `runs` own tokens run."""
    encoder.uncaptured.clear()
    encoder.encode([Tokens((*PREFIX[:START], *[60] * run), START) for run in runs])
    return sorted(encoder.uncaptured.elements())


@pytest.mark.parametrize(
    ("runs", "keys"),
    [
        ([1], [(1, 8)]),
        ([8], [(1, 8)]),
        ([9], [(1, 16)]),
        ([32], [(1, 32)]),
        ([5, 9], [(2, 16)]),
        ([5, 5, 5], [(4, 8)]),
        ([5] * 9, [(1, 8), (4, 8), (4, 8)]),
    ],
)
def test_buckets(runs: list[int], keys: list[tuple[int, int]], encoder: CudaTextEncoder) -> None:
    assert run_keys(encoder, runs) == keys


def test_a_long_prompt_makes_no_padding_for_short_ones(reference: TextEncoder) -> None:
    encoder = CudaTextEncoder(reference, Ops(None), (1, 2, 4), (8, 64, 300))
    assert run_keys(encoder, [300, 4, 3]) == [(1, 300), (2, 8)]
    assert run_keys(encoder, [60, 60, 4, 3, 2]) == [(1, 8), (4, 64)]
    assert run_keys(encoder, [299, 4, 300]) == [(1, 8), (2, 300)]


def test_captures_largest_first_and_once(encoder: CudaTextEncoder) -> None:
    sizes: list[int] = []

    class Counting(EagerReplay):
        def record(self, launch: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
            replay, outputs = super().record(launch)
            sizes.append(outputs[0].numel() // CONFIG.hidden_size)
            return replay, outputs

    encoder.capture(Counting())
    encoder.capture(Counting())
    assert sizes == sorted(sizes, reverse=True)
    assert Counter(sizes) == Counter(batch * length for batch in BATCHES for length in LENGTHS)


def test_without_graphs_it_encodes_the_same(encoder: CudaTextEncoder, reference: TextEncoder) -> None:
    class Refusing(EagerReplay):
        def record(self, _: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
            raise CaptureError("not captured")

    stage = TextStage(cast(PromptTokenizer, None), encoder)
    assert stage.capture(Refusing()) == "not captured"
    assert stage.capture(Refusing()) == "not captured", "told to each engine that shares the stage"
    assert not encoder.ready
    assert_equal(reference.encode([PROMPTS["short"]]), encoder.encode([PROMPTS["short"]]))
    assert sum(encoder.uncaptured.values()) == 1


# Compiles at Gemma-2 2B's sizes and 32 tokens, because the compiler has limits that the interpreter lacks: 99 KB of
# shared memory per program on compute capability 8.9, and three programs of a product at once on 9.0.
COMPILING = """
from compiling import compiled
from engines.kernels.text import capped_attention, gemma_norm, skinny_product, widened_weight

def made(kernel, signature, constants, warps, stages):
    found = compiled(kernel, signature, constants, target, warps, stages)
    print(kernel.__name__, target, found)
    assert not found.spills, found
    return found.shared

b, f, i = "*bf16", "*fp32", "i32"
for target in (90, 89):
    step = int(target == 90)
    norm = dict(y=f, x=b, post=f, pre=f, x_new=b, h=b, ahead=b, lines=i, M=i, D=i, eps="fp32")
    made(gemma_norm._gemma_norm, norm, dict(PARTS=8, BD=4096, STEP=step, FETCHERS=96), 8, 3)
    product = dict(x=b, scale=f, lines=i, M=i, N=i, K=i, span=i)
    tiles = dict(EVEN=True, BM=32, BN=64, BK=128)
    parts, gated = dict(GATED=False, STEP=0), dict(GATED=True, STEP=step)
    for w, scaled in ((b, False), ("*fp8e4nv", True)):
        types = product | dict(w=w, ahead=w)
        tiles["SCALED"] = scaled
        for out, constants in ((f, parts), (b, gated)):
            assert made(skinny_product._skinny_product, types | dict(out=out), tiles | constants, 4, 3) <= 75 * 1024
    types = dict(narrow="*fp8e4nv", scale=f, out=b, N=i, K=i)
    assert made(widened_weight._widened_weight, types, dict(BN=32, BK=256), 4, 3) <= 4096
    types = dict(
        qkv=b, past_key=b, past_value=b, shared="*i64", cosine=f, sine=f, out=b, ahead=b, lines=i, L=i, P=i,
        positions=i, scale="fp32", cap="fp32", B=i,
    )
    sizes = dict(H=8, G=2, DIM=256, WINDOW=0, BM=16, HALF=128, BV=128, STEP=step)
    tiles = dict(BN=64, BL=32) if target == 90 else dict(BN=32, BL=16)
    assert made(capped_attention._capped_attention, types, sizes | tiles, 4, 3) <= (227 if target == 90 else 99) * 1024
"""


def test_kernels_compile_without_spills() -> None:
    root = Path(__file__).parents[4]
    paths = os.pathsep.join((str(root / "tests" / "helpers"), str(root)))
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    completed = subprocess.run(
        [sys.executable, "-c", COMPILING], env={**environment, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr[-2000:]


def test_8_bits_are_near_and_the_same_for_few_rows_and_many() -> None:
    exact, narrow = (cuda_body(gemma_body(torch.bfloat16), Ops(None)) for _ in range(2))
    narrow.to_fp8()
    ids, shared = some_ids(6, 16), torch.tensor([20] * 6)
    # 32 rows read weights in e4m3, 96 the same values, widened to bf16.
    (exact_alone, exact_together), (alone, together) = (
        (b(ids[:2], shared[:2]), b(ids, shared)) for b in (exact, narrow)
    )
    assert 20 < sqnr_db(exact_together, together) < 32
    assert sqnr_db(together[:2], alone) > sqnr_db(exact_together[:2], exact_alone) - 2


@pytest.mark.parametrize("prompts", [2, 14], ids=["few rows", "many"])
def test_8_bits_by_kernels_give_the_same(prompts: int) -> None:
    ids, shared = some_ids(prompts, 5), torch.tensor([20, 7] * (prompts // 2))
    by_reference, by_kernels = (cuda_body(gemma_body(), ops) for ops in (Ops(None), Ops(Launcher(False, 3))))
    for body in (by_reference, by_kernels):
        body.to_fp8()
    assert sqnr_db(by_reference(ids, shared), by_kernels(ids, shared)) > 90


def test_8_bits_keep_no_wider_weights_of_an_mlp(reference: TextEncoder) -> None:
    fast = CudaTextEncoder(reference, Ops(None), (1,), (8,))
    layers, inner, width = CONFIG.num_hidden_layers, CONFIG.intermediate_size, CONFIG.hidden_size
    values, rows = layers * 3 * inner * width, layers * (2 * inner + width)

    def held() -> int:
        return sum(storage.bytes for storage in storages_of(fast))

    before = held()
    fast.to_fp8()
    assert held() == before - 4 * values + values + 4 * rows, "fp32 goes, e4m3 and a scale for each row come"
    fast.to_fp8()
    assert held() == before - 3 * values + 4 * rows, "it is converted once"


def test_an_encoder_in_8_bits_encodes_long_prompts_by_the_same_weights(reference: TextEncoder) -> None:
    fast = CudaTextEncoder(reference, Ops(None), (1,), (8, 16))
    prompts = [Tokens((*PREFIX, *some_ids(1, count)[0].tolist()), len(PREFIX)) for count in (6, 16, 20)]
    exact = fast.encode(prompts)
    fast.to_fp8()
    for before, after in zip(exact, fast.encode(prompts), strict=True):
        assert 20 < sqnr_db(before, after) < 40
    assert fast.uncaptured[TextKey(0, 20)] == 2

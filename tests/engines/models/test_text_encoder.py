"""The text path equals SanaSprintPipeline.encode_prompt, which runs instruction, prompt and padding in full."""

import inspect
from pathlib import Path

import pytest
import torch
from diffusers import SanaSprintPipeline
from small_checkpoint import byte_level_tokenizer, randomise_weights
from tokenizers import Tokenizer, models, processors, trainers
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from engines.checkpoints.checkpoint import open_checkpoint
from engines.errors import CheckpointError
from engines.models.gemma import GemmaBody, GemmaConfig
from engines.models.instruction import INSTRUCTION
from engines.models.text_encoder import TextEncoder, Tokens
from engines.pipeline.prompt_tokenizer import PromptTokenizer

UPSTREAM = inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default

PROMPTS = {
    "short": "a red circle",
    "one character": "a",
    "leading and trailing spaces": "  a cat, sleeping \n",
    "upper case": "A RED CIRCLE To The LEFT",
    "quotes": "a sign that says \"Hello, it's 'me'\"",
    "multilingual": "一只猫 на окне مع زهور ĐẸP İstanbul straße",
    "emoji": "👩‍🚀🌈 floating ❤️",
    "starts with punctuation": "...and then? {curly} <tags> \\n",
    "special tokens": "<bos>a<eos> cat<pad>",
    "blank": "   ",
    "just fits": "cat " * 60,
    "longer than 300 tokens": "a small, fluffy white cat sleeping " * 60,
    "far longer": "红色的圆圈 " * 400,
}


def reference(pipeline: SanaSprintPipeline, prompt: str, instruction: list[str] | None, limit: int = 300) -> Tensor:
    """Returns upstream's embedding without masked positions: [T, D]."""
    with torch.no_grad():
        states, mask = pipeline.encode_prompt(
            prompt, max_sequence_length=limit, complex_human_instruction=instruction, device=torch.device("cpu")
        )
    return states[0, mask[0].bool()]


def text_path(folder: Path, instruction: str = INSTRUCTION, limit: int = 300) -> tuple[PromptTokenizer, TextEncoder]:
    checkpoint = open_checkpoint(str(folder))
    tokenizer = PromptTokenizer(checkpoint.load_tokenizer(), instruction, limit)
    body = checkpoint.load_text_body(torch.float32, torch.device("cpu"))
    return tokenizer, TextEncoder(body, tokenizer.prefix)


@pytest.fixture(scope="module")
def ours(folder: Path) -> tuple[PromptTokenizer, TextEncoder]:
    return text_path(folder)


def test_instruction_is_upstreams_to_the_character() -> None:
    assert "\n".join(UPSTREAM) == INSTRUCTION


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_equals_upstream(prompt: str, ours: tuple[PromptTokenizer, TextEncoder], upstream: SanaSprintPipeline) -> None:
    tokenizer, encoder = ours
    [states] = encoder.encode([tokenizer.encode(prompt).tokens])
    torch.testing.assert_close(states, reference(upstream, prompt, UPSTREAM), rtol=0, atol=1e-4)


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_equals_upstream_without_instruction(prompt: str, upstream: SanaSprintPipeline, folder: Path) -> None:
    tokenizer, encoder = text_path(folder, instruction="", limit=24)
    [states] = encoder.encode([tokenizer.encode(prompt).tokens])
    torch.testing.assert_close(states, reference(upstream, prompt, None, limit=24), rtol=0, atol=1e-4)


def test_only_the_prompts_own_tokens_are_run(ours: tuple[PromptTokenizer, TextEncoder]) -> None:
    tokenizer, encoder = ours
    lengths = []
    hook = encoder.body.embed_tokens.register_forward_hook(lambda _, given, __: lengths.append(given[0].shape))
    tokens = tokenizer.encode("a red circle").tokens
    encoder.encode([tokens])
    hook.remove()
    assert lengths == [(1, len(tokens.ids) - tokens.start)]
    assert tokens.start > 200 > lengths[0][1]


def test_batch_of_all_lengths_equals_one_by_one(ours: tuple[PromptTokenizer, TextEncoder]) -> None:
    tokenizer, encoder = ours
    tokens = [tokenizer.encode(prompt).tokens for prompt in PROMPTS.values()]
    for together, one in zip(encoder.encode(tokens), tokens, strict=True):
        torch.testing.assert_close(together, encoder.encode([one])[0], rtol=0, atol=1e-5)


def test_says_when_a_prompt_was_cut(ours: tuple[PromptTokenizer, TextEncoder]) -> None:
    tokenizer, encoder = ours
    cut = {name for name, prompt in PROMPTS.items() if tokenizer.encode(prompt).truncated}
    assert cut == {"longer than 300 tokens", "far longer"}
    [states] = encoder.encode([tokenizer.encode(PROMPTS["far longer"]).tokens])
    assert len(states) == 300


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a BPE without pre-tokenisation, so that several merges cross the end of the instruction."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False, special_tokens=["<pad>", "<eos>", "<bos>"])
    tokenizer.train_from_iterator(["draw: a red circle", "draw: a cat", "xdraw: a catz a red"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>")


@pytest.mark.parametrize("prompt", ["a cat", "a red circle", "cat", "", "zzz", "a", "a cat a cat a cat a cat a cat"])
@pytest.mark.parametrize("instruction", ["xdraw: ", "x", "draw: a"])
def test_tokens_that_join_across_the_boundary(prompt: str, instruction: str, upstream: SanaSprintPipeline) -> None:
    wrapped = merging_tokenizer()
    pipeline = SanaSprintPipeline(
        wrapped, upstream.text_encoder, upstream.vae, upstream.transformer, upstream.scheduler
    )
    # A copy, because upstream sets truncation and padding in its own tokenizer.
    tokenizer = PromptTokenizer(Tokenizer.from_str(wrapped.backend_tokenizer.to_str()), instruction, 6)
    encoder = TextEncoder(same_weights(upstream.text_encoder), tokenizer.prefix)
    [states] = encoder.encode([tokenizer.encode(prompt).tokens])
    torch.testing.assert_close(states, reference(pipeline, prompt, [instruction], limit=6), rtol=0, atol=1e-4)


def test_a_prompt_that_leaves_the_prefix_early_is_exact(ours: tuple[PromptTokenizer, TextEncoder]) -> None:
    _, encoder = ours
    ids = (*encoder.prefix[:5], 9, 8, 7)
    [states] = encoder.encode([Tokens(ids, start=3)])
    with torch.no_grad():
        full = encoder.body(torch.tensor([ids]))[0][0]
    torch.testing.assert_close(states, torch.cat([full[:1], full[3:]]), rtol=0, atol=1e-5)


def test_tokenizer_without_bos_is_refused() -> None:
    bare = byte_level_tokenizer().backend_tokenizer
    bare.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(CheckpointError, match="BOS"):
        PromptTokenizer(bare, INSTRUCTION, 300)


def same_weights(upstream_body: Gemma2Model) -> GemmaBody:
    body = GemmaBody(GemmaConfig.from_dict(upstream_body.config.to_dict()))
    body.load_state_dict(upstream_body.state_dict())
    return body.eval()


SMALL = {
    "vocab_size": 32, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "query_pre_attn_scalar": 16, "sliding_window": 4, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"attn_logit_softcapping": None},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "rms_norm_eps": 1e-2, "sliding_window": 3},
        {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    ],
    ids=lambda changed: next(iter(changed), "as published"),
)
def test_body_equals_transformers(changed: dict[str, object]) -> None:
    """Runs whole, and in two pieces with a past; in bf16 the error to fp32 is near upstream's own."""
    upstream_body = randomise_weights(Gemma2Model(Gemma2Config(**{**SMALL, **changed}, attn_implementation="eager")))
    with torch.no_grad():
        for layer in upstream_body.layers:  # so that the cap changes the logits
            layer.self_attn.q_proj.weight.mul_(12)
    ours = same_weights(upstream_body)
    ids = torch.randint(0, 32, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = upstream_body(ids).last_hidden_state
        whole, _ = ours(ids)
        first, past = ours(ids[:, :7])
        second, _ = ours(ids[:, 7:], past)
        torch.testing.assert_close(whole, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.cat([first, second], dim=1), expected, rtol=0, atol=1e-4)
        distance = (upstream_body.bfloat16()(ids).last_hidden_state - expected).abs().mean()
        assert (ours.bfloat16()(ids)[0] - expected).abs().mean() <= 1.5 * distance


def test_config_as_older_releases_wrote_it() -> None:
    config = {
        "model_type": "gemma2", "architectures": ["Gemma2Model"], "torch_dtype": "bfloat16", "rope_theta": 500.0,
        "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid", **SMALL,
    }  # fmt: skip
    parsed = GemmaConfig.from_dict(config)
    assert (parsed.rope_theta, parsed.hidden_size) == (500.0, 24)
    assert parsed.layer_types == ("sliding_attention", "full_attention", "sliding_attention")


def test_defaults_are_gemma_2_2b() -> None:
    published = GemmaConfig.from_dict({"model_type": "gemma2"})
    assert published == GemmaConfig.from_dict(Gemma2Config().to_dict())
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in GemmaBody(published).parameters())
    assert count == 2_614_341_888


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "t5"}, "model_type: got 't5', supported: 'gemma2'"),
        ({"attention_bias": True}, "attention_bias: got True, supported: False"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"hidden_activation": "relu"}, "hidden_activation: got 'relu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'default'"),
        ({"hidden_size": "wide"}, "hidden_size: got 'wide'"),
        ({"head_dim": None}, "head_dim: got None"),
        ({"num_key_value_heads": 3}, "needed is a multiple of num_key_value_heads"),
        ({"layer_types": ["full_attention"]}, "layer_types: got"),
        ({"layer_types": 3}, "layer_types: got 3"),
    ],
)
def test_config_that_is_not_supported_is_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GemmaConfig.from_dict({"model_type": "gemma2", **changed})

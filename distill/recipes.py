"""Recipes: every number of a training run, as frozen dataclasses. Each recipe is a function that returns a `Recipe`.

`tiny` and then `tiny_again` train the shipped checkpoint on two CPU cores, `smoke` runs all stages in minutes, and
`sprint_0_6b` has the paper's values (section 3, appendix F; the released configs/sana_sprint_config) for GPUs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from distill.world.rendering import World
from engines.models.controlnet import Injection
from engines.models.dcae import AutoencoderConfig, BlockType
from engines.models.taesana import TaesanaConfig
from engines.models.transformer import TransformerConfig


@dataclass(frozen=True)
class AutoencoderStageConfig:
    """Reconstruction of rendered scenes: crops first (cheap), whole images last."""

    architecture: AutoencoderConfig
    steps: int
    decoder_steps: int  # of the decoder alone, behind the frozen encoder
    batch: int
    crop: int  # pixels; a crop costs (crop / image_size)^2 of an image
    whole_fraction: float = 0.15  # of the steps, at the end, on whole images in batches of the same pixel count
    learning_rate: float = 2e-3
    edge_weight: float = 0.5
    square_weight: float = 0.5
    moment_weight: float = 0.02  # keeps every latent channel near mean 0 and variance 1
    latent_noise: float = 0.1  # standard deviation added before decoding, for tolerance of the student's errors
    ema: float = 0.998
    sharpen_steps: int = 0  # of the decoder alone, at the very end, on the student's predictions
    sharpen_batch: int = 6  # whole images
    sharpen_rate: float = 1.5e-3
    predicted_times: tuple[float, float] = (0.1, 0.6)  # flow times from which the student predicts


@dataclass(frozen=True)
class TextEncoderConfig:
    """A small Gemma-2, trained with the teacher and frozen for the student."""

    width: int
    layers: int
    heads: int
    max_tokens: int


@dataclass(frozen=True)
class TeacherStageConfig:
    """Flow matching with a dense time embedding (t in [0, 1], not times 1000) and QK-norm from the start."""

    architecture: TransformerConfig
    text: TextEncoderConfig
    latents: int  # images encoded once; the paper trains on pre-encoded latents too
    steps: int
    batch: int
    learning_rate: float  # AdamW: embeddings, norms, biases, depthwise kernels
    matrix_learning_rate: float  # Muon: the matrices of the blocks
    time_shift: float = 3.0  # t' = s t / (1 + (s - 1) t): composition is decided near t = 1
    caption_dropout: float = 0.1
    layout_weight: float = 5.0  # of the auxiliary channels' squared error
    warmup: int = 200
    decay_fraction: float = 0.3  # of the steps, at the end, linear to zero
    ema: float = 0.998
    compile: bool = True
    score_every: int = 500
    narrow_steps: int = 0  # on the world itself, after the wide world (Recipe.wide_world)
    narrow_latents: int = 0
    narrow_rate: float = 0.5  # of both learning rates, decayed to zero over these steps


@dataclass(frozen=True)
class DistilStageConfig:
    """sCM + LADD (paper sections 3.2 and 3.3). Comments give the names in the released yaml."""

    steps: int
    batch: int
    learning_rate: float
    discriminator_learning_rate: float
    guidance: tuple[float, ...] = (4.0, 4.5, 5.0)  # scm_cfg_scale: inputs of the student's guidance embedding
    guidance_gain: float = 1.0  # the teacher runs at 1 + gain (w - 1); plain worlds need less than photographs
    scm_weight: float = 1.0  # scm_lambda
    adversarial_weight: float = 0.5  # adv_lambda
    tangent_warmup: int = 4000  # tangent_warmup_steps
    tangent_constant: float = 0.1
    student_mean: float = 0.2  # logit_mean
    student_std: float = 1.6  # logit_std
    discriminator_mean: float = -0.6  # logit_mean_discriminator
    discriminator_std: float = 1.0  # logit_std_discriminator
    max_time_probability: float = 0.5  # largest_timestep_prob
    heads: tuple[int, ...] = (2, 8, 14, 20, 27)  # head_block_ids: blocks whose outputs the discriminator reads
    adversarial_every: int = 2  # one generator step with the adversarial loss, one discriminator step, in turn
    adversarial_from: int = 0  # steps of sCM alone before
    matrix_learning_rate: float | None = None  # Muon for the blocks' matrices; None: AdamW for all, as the paper
    gradient_clip: float = 0.1
    warmup: int = 5000
    decay_fraction: float = 0.0
    ema: float = 0.999
    score_every: int = 500
    flow_to_trigflow: bool = True  # False only in the ablation
    bfloat16: bool = True  # autocast; twice as slow as float32 on a CPU without bf16 instructions
    seed: int = 7


@dataclass(frozen=True)
class ControlStageConfig:
    """A ControlNet on the frozen student (paper 3.4)."""

    steps: int
    batch: int
    images: int  # rendered and encoded once, with their drawings
    copies: int  # of the student's first blocks
    learning_rate: float  # AdamW: embeddings, norms, biases, projections
    matrix_learning_rate: float  # Muon: the matrices of the blocks
    injection: Injection = "nvlabs"
    mean: float = 0.2  # of the angles, as DistilStage.student_mean
    std: float = 1.6
    max_time_probability: float = 0.5
    empty_probability: float = 0.1  # of a drawing without strokes
    warmup: int = 50
    decay_fraction: float = 0.4
    ema: float = 0.998
    sheet_every: int = 500
    seed: int = 7


@dataclass(frozen=True)
class LoraStageConfig:
    """A LoRA that teaches the finished student one more shape, under a word unknown to its text encoder."""

    shape: str
    rank: int
    steps: int
    batch: int
    images: int  # with the shape, and as many without it
    learning_rate: float
    old_fraction: float = 0.33  # of a batch: captions without the shape, trained towards the unadapted student
    mean: float = 0.2  # of the angles, as DistilStage.student_mean
    std: float = 1.6
    max_time_probability: float = 0.7
    warmup: int = 20
    decay_fraction: float = 0.5
    ema: float = 0.99
    seed: int = 7


@dataclass(frozen=True)
class SmallDecoderStageConfig:
    """A TAESANA decoder that copies the autoencoder's."""

    architecture: TaesanaConfig
    images: int  # student latents with their images
    steps: int
    batch: int
    learning_rate: float


@dataclass(frozen=True)
class Recipe:
    """A whole run. Without `autoencoder` and `teacher` it distils a published teacher on real images."""

    name: str
    image_size: int
    autoencoder: AutoencoderStageConfig | None
    teacher: TeacherStageConfig | None
    distil: DistilStageConfig
    students: int = 1  # trained with seeds of their own; their weights are averaged
    control: ControlStageConfig | None = None
    lora: LoraStageConfig | None = None
    small_decoder: SmallDecoderStageConfig | None = None
    world: World = field(default_factory=World)
    wide_world: World | None = None  # for autoencoder and teacher at first: the same words with wider ranges
    teacher_guidance: float = 4.5
    teacher_sampling_steps: int = 20
    teacher_sampling_shift: float = 2.0
    seed: int = 7

    def __post_init__(self) -> None:
        if self.wide_world and self.teacher and not (self.teacher.narrow_steps and self.teacher.narrow_latents):
            raise ValueError(
                f"recipe {self.name}: wide_world needs narrow_steps and narrow_latents above 0, or be None"
            )


def _tiny_autoencoder() -> AutoencoderConfig:
    blocks: tuple[BlockType, ...] = ("ResBlock",) * 5 + ("EfficientViTBlock",)
    scales: tuple[tuple[int, ...], ...] = ((), (), (), (), (), (5,))
    return AutoencoderConfig(
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8, 32, 64, 64, 128),
        decoder_block_out_channels=(16, 16, 32, 64, 128, 128),
        encoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        scaling_factor=1.0,
    )


def _tiny_transformer(width: int, layers: int, text_width: int) -> TransformerConfig:
    return TransformerConfig(
        num_attention_heads=width // 32,
        num_layers=layers,
        num_cross_attention_heads=width // 32,
        cross_attention_head_dim=32,
        caption_channels=text_width,
        sample_size=8,
        interpolation_scale=1.0,
        guidance_embeds=True,
        qk_norm="rms_norm_across_heads",
    )


def _wide_world() -> World:
    """The same world with more sizes, positions and angles, and a gray as dark as the things."""
    return World(
        backgrounds=(("white", (255, 255, 255)), ("black", (12, 12, 14)), ("gray", (134, 136, 140))),
        sizes=(("small", (0.22, 0.28)), ("big", (0.62, 0.72))),
        single_size=(0.42, 0.54),
        pair_size=(0.28, 0.36),
        count_size=(0.25, 0.30),
        single_jitter=0.12,
        pair_jitter=0.08,
        pair_offset=0.04,
        count_jitter=0.03,
        max_angle=8.0,
        category_weights=(0.14, 0.16, 0.18, 0.12, 0.24, 0.16),
        background_named=0.4,
    )


def tiny() -> Recipe:
    """The shipped checkpoint's first run: 256x256 through an f32c32 autoencoder, 64 tokens."""
    return Recipe(
        name="tiny",
        image_size=256,
        wide_world=_wide_world(),
        autoencoder=AutoencoderStageConfig(
            _tiny_autoencoder(), steps=3200, decoder_steps=2000, sharpen_steps=1000, batch=16, crop=128
        ),
        teacher=TeacherStageConfig(
            architecture=_tiny_transformer(160, 6, 128),
            text=TextEncoderConfig(width=128, layers=2, heads=4, max_tokens=24),
            latents=40_000,
            steps=2600,
            narrow_steps=1200,
            narrow_latents=32_000,
            batch=64,
            learning_rate=1e-3,
            matrix_learning_rate=0.005,
        ),
        teacher_guidance=1.7,
        distil=DistilStageConfig(
            steps=600,
            batch=24,
            learning_rate=3e-4,
            matrix_learning_rate=5e-4,
            discriminator_learning_rate=2e-3,
            guidance=(3.0, 4.0, 4.5, 5.0, 6.0),
            guidance_gain=0.2,
            adversarial_weight=5.0,
            adversarial_from=300,
            tangent_warmup=100,
            heads=(1, 3, 5),
            gradient_clip=1.0,
            warmup=20,
            decay_fraction=1.0,
            ema=0.995,
        ),
        control=ControlStageConfig(
            steps=300, batch=48, images=8_000, copies=2, learning_rate=1e-3, matrix_learning_rate=0.003
        ),
        lora=LoraStageConfig("diamond", rank=4, steps=700, batch=24, images=1500, learning_rate=3e-3),
        small_decoder=SmallDecoderStageConfig(
            TaesanaConfig(32, (64, 64, 32, 16, 8, 6), (2, 1, 1, 1, 1, 1)), 2048, steps=3000, batch=4, learning_rate=2e-3
        ),
    )


def tiny_again() -> Recipe:
    """Distils the checkpoint of `tiny` once more: the mean of four short students, adversarial from the first step."""
    distil = replace(tiny().distil, steps=80, adversarial_from=0, decay_fraction=0.5, bfloat16=False)
    return replace(tiny(), name="tiny_again", distil=distil, students=4)


def smoke() -> Recipe:
    """All stages in under three minutes, to test that the parts fit; its images are noise."""
    whole = tiny()
    assert whole.autoencoder is not None
    return Recipe(
        name="smoke",
        image_size=128,
        wide_world=_wide_world(),
        autoencoder=AutoencoderStageConfig(
            whole.autoencoder.architecture,
            steps=12,
            decoder_steps=4,
            sharpen_steps=2,
            sharpen_batch=2,
            batch=4,
            crop=64,
        ),
        teacher=TeacherStageConfig(
            architecture=_tiny_transformer(64, 2, 64),
            text=TextEncoderConfig(width=64, layers=1, heads=2, max_tokens=24),
            latents=64,
            steps=16,
            narrow_steps=4,
            narrow_latents=64,
            batch=8,
            learning_rate=1e-3,
            matrix_learning_rate=0.005,
            warmup=2,
            compile=False,
            score_every=10,
        ),
        distil=DistilStageConfig(
            steps=12,
            batch=4,
            learning_rate=3e-4,
            discriminator_learning_rate=5e-4,
            tangent_warmup=4,
            matrix_learning_rate=1e-3,
            heads=(0, 1),
            gradient_clip=1.0,
            warmup=2,
            score_every=6,
        ),
        control=ControlStageConfig(
            steps=6, batch=4, images=16, copies=1, learning_rate=1e-3, matrix_learning_rate=0.003, sheet_every=3
        ),
        lora=LoraStageConfig("diamond", rank=2, steps=4, batch=4, images=8, learning_rate=1e-3),
        small_decoder=SmallDecoderStageConfig(TaesanaConfig(32, (16, 8, 8, 8, 8, 8), (1,) * 6), 8, 3, 2, 1e-3),
    )


def sprint_0_6b() -> Recipe:
    """The paper's run (20,000 iterations, global batch 512, 32 A100) with published teacher and autoencoder."""
    return Recipe(
        name="sprint_0_6b",
        image_size=1024,
        autoencoder=None,
        teacher=None,
        distil=DistilStageConfig(steps=20_000, batch=16, learning_rate=2e-6, discriminator_learning_rate=2e-6),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {make.__name__: make for make in (tiny, tiny_again, smoke, sprint_0_6b)}

"""Preset `small` learns with the fused kernels as it does with the reference kernels.

Two hundred optimizer steps from equal weights on equal clips with equal noise; bf16 weights beside fp32 masters, as
DeepSpeed keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualforce.config import LossConfig, ModelConfig, NoiseConfig
from dualforce.diffusion.frame_noise import draw, mix
from dualforce.losses.total import loss_counts, loss_masks
from dualforce.model.path import ChunkRule, FullPath
from dualforce.presets import LATENT_CHANNELS, build_model_config
from dualforce.train.train_module import StepInput, TrainModule
from dualforce.types import STRUCT_TOKENS, ClipBatch, FrameSpan, audio_frames_of, struct_pixels
from megatron_ext.kernels.kernel_set import KernelSet, KernelsUnavailable, select_kernels

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
SPAN = FrameSpan(0, 9)
SIZE = 32  # latent height and width: 256 tokens a frame
CLIPS, BATCH = 6, 2
STEPS, WINDOW = 200, 20
STRUCT_DIM, AUDIO_DIM, TEXT_TOKENS = 32, 80, 4
LEARNING_RATE, WARMUP = 3e-4, 20
LOSS = LossConfig(flame=0.0, lip_sync=0.0)


def config() -> ModelConfig:
    return build_model_config("small", struct_dim=STRUCT_DIM, audio_dim=AUDIO_DIM)


@pytest.fixture(scope="module")
def fused() -> KernelSet:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    try:
        return select_kernels("fused", DEVICE, torch.bfloat16, config().head_dims)
    except KernelsUnavailable as error:
        pytest.skip(str(error))


def waves(source: torch.Generator, time: Tensor, channels: int) -> Tensor:
    """Slow sinusoids of variance 1 over `time` [...], [CLIPS,...,channels]."""
    shape = (CLIPS, *[1] * time.dim(), channels)
    rate, phase = (torch.rand(shape, generator=source) for _ in range(2))
    return math.sqrt(2) * torch.sin(0.3 * rate * time[..., None] + 2 * math.pi * phase)


def pictures(source: torch.Generator) -> Tensor:
    """Latents of variance 1 from three drifting waves of at most two periods a picture, [CLIPS,F,C,H,W]."""
    place = torch.arange(SIZE) / SIZE
    total = torch.zeros(CLIPS, SPAN.length, LATENT_CHANNELS, SIZE, SIZE)
    for _ in range(3):
        down, across = torch.randint(0, 3, (2, CLIPS, 1, 1, 1, 1), generator=source)
        phase, drift = torch.rand(2, CLIPS, 1, LATENT_CHANNELS, 1, 1, generator=source)
        frame = torch.arange(SPAN.length)[:, None, None, None]
        turns = down * place[:, None] + across * place + phase + 0.1 * drift * frame
        total += torch.cos(2 * math.pi * turns)
    return total * math.sqrt(2 / 3)


def clips() -> ClipBatch:
    """Six clips that can be learned by heart."""
    source = torch.Generator("cpu").manual_seed(7)
    model, frames = config(), SPAN.length
    video = pictures(source)
    return ClipBatch(
        video=video,
        struct=waves(source, struct_pixels(SPAN).float(), STRUCT_DIM),
        audio=waves(source, audio_frames_of(SPAN, model.audio.context).float(), AUDIO_DIM),
        flame=torch.zeros(CLIPS, frames, STRUCT_TOKENS, 1),
        flame_valid=torch.zeros(CLIPS, frames, STRUCT_TOKENS, dtype=torch.bool),
        voiced=torch.zeros(CLIPS, frames, dtype=torch.bool),
        reference=video[:, 0],
        text=torch.randn(CLIPS, TEXT_TOKENS, model.video.text_dim, generator=source),
        valid=torch.ones(CLIPS, frames, dtype=torch.bool),
        keys=tuple(map(str, range(CLIPS))),
        position=tuple((0, clip) for clip in range(CLIPS)),
    )


def step_input(whole: ClipBatch, step: int) -> StepInput:
    """Two clips with noise that the step keys, as the trainer draws it."""
    rows = [(BATCH * step + i) % CLIPS for i in range(BATCH)]
    tensors = {name: x[rows] for name, x in whole._asdict().items() if isinstance(x, Tensor)}
    batch = whole._replace(**tensors, keys=tuple(map(str, rows)), position=tuple((step, row) for row in rows))
    drawn = draw(batch, NoiseConfig(), 0, config().frames_per_chunk)
    masks = loss_masks(drawn.sigma, batch.valid, batch.flame_valid, batch.voiced, LOSS.lip.max_sigma)
    noised, target, cond = mix(batch, drawn)
    counts = loss_counts(masks, drawn.sigma)
    return on_device(StepInput(noised, target, cond, batch.struct, batch.flame, masks, counts))


def on_device(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else type(value)(*map(on_device, value))


@pytest.fixture(scope="module")
def steps(fused: KernelSet) -> list[StepInput]:
    whole = clips()
    return [step_input(whole, step) for step in range(STEPS)]


def build(kernels: KernelSet) -> nn.Module:
    with torch.device(DEVICE):
        return TrainModule(config(), LOSS, kernels, flame_dim=None)


def start() -> list[Tensor]:
    """The weights that every run starts from, in fp32."""
    torch.manual_seed(0)
    return [p.detach() for p in build(select_kernels("reference", DEVICE, torch.bfloat16)).parameters()]


def off_by_a_rounding(weights: Sequence[Tensor]) -> list[Tensor]:
    """Every weight moved by about 2^-9 of itself."""
    source = torch.Generator(DEVICE).manual_seed(1)
    return [w * (1 + 2**-9 * torch.randn(w.shape, generator=source, device=DEVICE)) for w in weights]


def losses(kernels: KernelSet, weights: Sequence[Tensor], steps: Sequence[StepInput]) -> Tensor:
    """Total loss of every step, [STEPS] on the CPU."""
    module = build(kernels).to(torch.bfloat16)
    parameters, masters = list(module.parameters()), [w.clone() for w in weights]
    adam = torch.optim.AdamW(masters, weight_decay=0.01, fused=True)
    rule = ChunkRule(config().frames_per_chunk, None, 0)
    path, found = FullPath(rule, kernels, SPAN), []
    for step, inputs in enumerate(steps):
        with torch.no_grad():
            torch._foreach_copy_(parameters, masters)
        total = module(inputs, path, step, 1).terms.total
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = None if gradient is None else gradient.float()
        nn.utils.clip_grad_norm_(masters, 1.0)
        adam.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP)
        adam.step()
        found.append(total.detach())
    return torch.stack(found).double().cpu()


def windows(curve: Tensor) -> Tensor:
    """Means over windows of twenty steps: what the noise levels of single steps do is the same in every run."""
    return curve.unflatten(0, (-1, WINDOW)).mean(1)


@pytest.fixture(scope="module")
def curves(fused: KernelSet, steps: list[StepInput]) -> dict[str, Tensor]:
    """Means of the loss with the reference kernels, with them from perturbed weights, and with the fused kernels."""
    plain = select_kernels("reference", DEVICE, torch.bfloat16)
    weights = start()
    runs = {"reference": (plain, weights), "perturbed": (plain, off_by_a_rounding(weights)), "fused": (fused, weights)}
    found = {name: windows(losses(*how, steps)) for name, how in runs.items()}
    for name, curve in found.items():
        print(f"{name:>9}", " ".join(f"{x:.4f}" for x in curve.tolist()))
    return found


# With an output of zero the velocity e - x0 of data of variance 1 costs 2 for the video, and 2 for the structure at
# weight 0.5: 3 at the first step. Copying the noise out of the noisy input alone brings that down to the variance of
# the data, 1.5; less needs the clips themselves. The first window still holds the warm-up, near 2.9. Narrower models of
# this kind fall by 2.0 (width 256) and 2.3 (width 512) in as many steps.
FALL = 1.8


@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_it_learns(curves: dict[str, Tensor], kernels: str) -> None:
    curve = curves[kernels]
    assert torch.isfinite(curve).all()
    assert curve[-1] < curve[0] / FALL, curve.tolist()


# Two correct runs part company: every rounding that falls otherwise is a small change of the weights, and training
# amplifies it. How far is measured, not guessed: the reference once more from weights that are off by one rounding of
# bf16. The fused kernels round otherwise in every step and not only once, and one pair of runs is one draw, hence three
# times the largest parting of the pair, and 1 % of the loss for windows where that is small by chance. A kernel with a
# wrong gradient or a mask that leaks moves the curve by far more.
TIMES, FLOOR = 3.0, 0.01


def test_fused_learns_as_the_reference_does(curves: dict[str, Tensor]) -> None:
    wanted = curves["reference"]
    noise, found = ((curves[name] / wanted - 1).abs() for name in ("perturbed", "fused"))
    print("perturbed", [f"{x:.2%}" for x in noise.tolist()])
    print("fused    ", [f"{x:.2%}" for x in found.tolist()])
    assert found.max() <= TIMES * noise.max() + FLOOR

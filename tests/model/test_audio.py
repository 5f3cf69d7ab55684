"""Which audio a token hears, against the index algebra of the model reference (sections 1 and 7)."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_model import kernels, randomise, tiny_config

from dualforce.data.windows import audio_windows
from dualforce.model.audio import AudioAttention, AudioProjector, struct_slots, video_slots
from dualforce.types import AUDIO_FRAMES, FrameSpan

CPU = torch.device("cpu")
CLIP = 6  # latent frames
LAST = 8 * CLIP - 7  # of the 50 Hz frames 0 .. 8F - 7


def numbered(context: int) -> torch.Tensor:
    """Windows [F,8+2c] whose content is the number of the 50 Hz frame."""
    track = torch.tensor([[max(0, 8 * j - 6 + a) for a in range(8)] for j in range(CLIP)])
    return audio_windows(track[..., None], CLIP, context)[..., 0]


@pytest.mark.parametrize("context", range(5))
@pytest.mark.parametrize("span", [FrameSpan(0, CLIP), FrameSpan(0, 1), FrameSpan(2, 3)])
def test_a_pixel_frame_hears_its_own_sound_and_the_context(span: FrameSpan, context: int) -> None:
    windows = numbered(context)[span.start : span.stop]
    slots = struct_slots(span, context, CPU)
    assert slots.shape == (span.length, 4, 2 + 2 * context)
    assert slots.min() >= 0 and slots.max() < AUDIO_FRAMES + 2 * context
    for place, frame in enumerate(span.frames):
        for slot in range(4):
            pixel = max(0, 4 * frame - 3 + slot)
            wanted = [min(max(0, i), LAST) for i in range(2 * pixel - context, 2 * pixel + 2 + context)]
            assert windows[place, slots[place, slot]].tolist() == wanted, (frame, slot)


@pytest.mark.parametrize("context", [0, 2, 4])
def test_a_latent_frame_hears_its_window(context: int) -> None:
    windows = numbered(context)
    slots = video_slots(FrameSpan(0, CLIP), context, CPU)
    assert slots.shape == (CLIP, 1, AUDIO_FRAMES + 2 * context)
    for frame in range(CLIP):
        wanted = [min(max(0, i), LAST) for i in range(8 * frame - 6 - context, 8 * frame + 2 + context)]
        assert windows[frame, slots[frame, 0]].tolist() == wanted


@pytest.mark.parametrize(("tokens", "make"), [(6, video_slots), (4, struct_slots)], ids=["video", "struct"])
def test_attention_hears_just_its_slots(tokens: int, make: object) -> None:
    """Changing one audio frame of one window changes the tokens whose slots hold it, and no other."""
    config = tiny_config().audio
    layer = randomise(AudioAttention(16, config, 1e-6, kernels())).requires_grad_(False)
    slots = make(FrameSpan(1, 3), config.context, CPU)  # type: ignore[operator]
    x, audio = torch.randn(2, 3, tokens, 16), torch.randn(2, 3, AUDIO_FRAMES + 2 * config.context, config.width)
    before = layer(x, audio, slots)
    group = tokens // slots.shape[1]
    for heard in range(audio.shape[2]):
        other = audio.clone()
        other[1, 2, heard] += 1.0
        changed = (layer(x, other, slots) != before).any(-1)
        wanted = torch.zeros_like(changed)
        for token in range(tokens):
            wanted[1, 2, token] = heard in slots[2, token // group].tolist()
        assert torch.equal(changed, wanted), heard


def test_attention_against_plain_softmax() -> None:
    config = tiny_config().audio
    layer = randomise(AudioAttention(16, config, 1e-6, kernels(torch.float64)).double()).requires_grad_(False)
    slots = struct_slots(FrameSpan(0, 2), config.context, CPU)
    x, audio = torch.randn(2, 2, 4, 16).double(), torch.randn(2, 2, 12, config.width).double()
    found = layer(x, audio, slots)

    def normed(y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight).unflatten(-1, (4, -1))

    for clip in range(2):
        for frame in range(2):
            for token in range(4):
                heard = audio[clip, frame, slots[frame, token]]
                k, v = layer.kv(heard).chunk(2, -1)
                q = normed(layer.q(layer.norm(x[clip, frame, token])), layer.norm_q.weight)
                scores = torch.einsum("nk,lnk->nl", q, normed(k, layer.norm_k.weight)) / 4**0.5
                mixed = torch.einsum("nl,lnk->nk", scores.softmax(-1), v.unflatten(-1, (4, -1))).flatten()
                torch.testing.assert_close(found[clip, frame, token], layer.o(mixed))


def test_dropped_audio_is_the_learned_null() -> None:
    config = tiny_config().audio
    projector = randomise(AudioProjector(config)).requires_grad_(False)
    audio = torch.randn(2, 3, 12, config.dim)
    out = projector(audio, torch.tensor([True, False]))
    assert torch.equal(out[1], projector.null.expand(3, 12, -1))
    assert not torch.equal(out[0], out[1])
    assert torch.equal(out[:1], projector(audio[:1], torch.tensor([True])))

"""The whole model through the fused kernels in bf16: right, frame-causal to the bit, cached as full, repeatable.

Every site of frame-causal attention with every kind of tile is here: head sizes 128 (video) and 64 (structure), both
directions of the bridge, tokens a frame that fill whole tiles (256) and that do not (100), with and without a window.

Autograd is on even where nothing is differentiated: flash-attn-4 compiles a kernel anew for each kind of call, and
without gradients the forward is another kind, as it then writes no log-sum-exp.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from helpers.tiny_model import random_inputs, randomise, tiny_config
from torch import Tensor

from dualforce.config import ModelConfig
from dualforce.data.windows import audio_windows
from dualforce.model.dual_tower import DualTower
from dualforce.model.kv_cache import KVCache
from dualforce.model.path import CachedPath, FullPath
from dualforce.types import AUDIO_FRAMES, Conditioning, FrameSigma, FrameSpan, Noised, Velocity
from megatron_ext.kernels.kernel_set import KernelSet, KernelsUnavailable, select_kernels

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
BATCH, CHUNK = 2, 2
SPAN = FrameSpan(0, 9)  # chunks 0, 1-2, 3-4, 5-6, 7-8: with window 2 and sink 1 the last two do not see chunk 1
CHUNKS = [FrameSpan(0, 1), *(FrameSpan(start, CHUNK) for start in range(1, SPAN.stop, CHUNK))]


class Case(NamedTuple):
    """Latent height and width (twice that of the patches), window and sink."""

    size: int
    window: int | None = None
    sink: int = 0


WHOLE, RAGGED, WHOLE_WINDOW, RAGGED_WINDOW = Case(32), Case(20), Case(32, 2, 1), Case(20, 2, 1)


def name(case: Case) -> str:
    return f"{(case.size // 2) ** 2}-window-{case.window}"


def config(case: Case) -> ModelConfig:
    """Three layers, head sizes 128 and 64, a bridge in every layer, text, and audio in two layers."""
    return tiny_config(
        video={"dim": 256, "heads": 2, "ffn": 512, "in_dim": 36, "out_dim": 16, "text_dim": 64, "freq_dim": 64},
        struct={"dim": 128, "heads": 2, "ffn": 256, "in_dim": 64, "out_dim": 64, "text_dim": 64, "freq_dim": 64},
        bridge={"layers": "full"},
        audio={"dim": 64, "width": 128, "inner": 256, "heads": 2},
        frames_per_chunk=CHUNK, window=case.window, sink=case.sink,
    )  # fmt: skip


@pytest.fixture(scope="module")
def fused() -> KernelSet:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    try:
        return select_kernels("fused", DEVICE, torch.bfloat16, config(WHOLE).head_dims)
    except KernelsUnavailable as error:
        pytest.skip(str(error))


def reference(dtype: torch.dtype) -> KernelSet:
    return select_kernels("reference", DEVICE, dtype)


class Model:
    """All parameters random, and exact in bf16, so that every dtype has the same ones; one path over the span."""

    def __init__(self, case: Case, kernels: KernelSet) -> None:
        tower = randomise(DualTower(config(case), kernels)).to(torch.bfloat16)
        self.tower, self.kernels = tower.to(DEVICE, kernels.dtype), kernels
        self._path = FullPath(tower.rule, kernels, SPAN)

    def __call__(self, noised: Noised, cond: Conditioning) -> Velocity:
        return self.tower(noised, cond, SPAN, self._path)

    def detached(self, noised: Noised, cond: Conditioning) -> Velocity:
        return Velocity(*(x.detach() for x in self(noised, cond)))


def on_device(value: Any) -> Any:
    """Nested NamedTuples of tensors, floats made exact in bf16."""
    if isinstance(value, Tensor):
        return (value.bfloat16().float() if value.is_floating_point() else value).to(DEVICE)
    return type(value)(*map(on_device, value))


def inputs(case: Case, seed: int = 0) -> tuple[Noised, Conditioning]:
    """In fp32; the audio of the second clip is dropped, for the null token."""
    noised, cond = random_inputs(config(case), BATCH, SPAN.length, case.size, case.size, seed)
    cond = cond._replace(audio_keep=torch.tensor([True, False]))
    return on_device(noised), on_device(cond)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def values_and_gradients(model: Model, case: Case) -> dict[str, Tensor]:
    """Both outputs, and the gradient of every parameter of a random combination of them, for BATCHES inputs."""
    found: dict[str, list[Tensor]] = {}
    parameters = dict(model.tower.named_parameters())
    for seed in range(BATCHES):
        out = model(*inputs(case, seed))
        source = torch.Generator("cpu").manual_seed(seed)
        weights = [torch.randn(x.shape, generator=source).to(DEVICE) for x in out]
        total = sum((x * weight).sum() for x, weight in zip(out, weights, strict=True))
        values = zip(Velocity._fields, out, strict=True)
        gradients = zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True)
        for name, x in (*values, *gradients):
            found.setdefault(name, []).append(x.detach())
    return {name: torch.stack(x) for name, x in found.items()}


# Both sets of kernels compute inside in fp32 and round the same tensors to bf16 between them, so against fp32 both have
# the same rounding, accumulated to a few times 2^-9, and differ only in how it falls. Where the gradient of a query is
# what is left of nearly equal terms, one shared direction holds most of the error: a handful of independent numbers,
# whose norm may differ by a factor of two between two correct kernels. So 32 inputs are taken together: a norm of n
# independent errors varies by 1 / sqrt(2 n) of itself, 10 % at n = 50, and half as much again is far outside. The
# floor, two roundings, is for plain sums over all tokens, whose own error is not more than that.
BATCHES = 32
FACTOR, FLOOR = 1.5, 2**-8


def test_values_and_gradients_are_as_good_as_the_reference(fused: KernelSet) -> None:
    case = RAGGED_WINDOW
    wide, narrow, found = (
        values_and_gradients(Model(case, kernels), case)
        for kernels in (reference(torch.float32), reference(torch.bfloat16), fused)
    )
    errors = {name: (relative(found[name], x), relative(narrow[name], x)) for name, x in wide.items()}
    for name, x in wide.items():
        assert x.norm() > 0, f"{name} is zero: nothing is compared"
        assert torch.isfinite(found[name]).all(), name
    worst = sorted(errors, key=lambda name: errors[name][0] / (FACTOR * errors[name][1] + FLOOR))[-5:]
    print(*(f"{name}: fused {errors[name][0]:.2e}, reference {errors[name][1]:.2e}" for name in worst), sep="\n")
    wrong = {name: pair for name, pair in errors.items() if not pair[0] <= FACTOR * pair[1] + FLOOR}
    assert not wrong  # (fused, reference)


def changed(x: Tensor, frame: int) -> Tensor:
    """Everything from `frame` on is other; a level stays within 0 and 1."""
    return torch.cat((x[:, :frame], 0.9 - 0.5 * x[:, frame:]), dim=1)


def perturbed(noised: Noised, cond: Conditioning, frame: int) -> dict[str, tuple[Noised, Conditioning]]:
    sigma = noised.sigma
    return {
        "video": (noised._replace(video=changed(noised.video, frame)), cond),
        "struct": (noised._replace(struct=changed(noised.struct, frame)), cond),
        "sigma of video": (noised._replace(sigma=sigma._replace(video=changed(sigma.video, frame))), cond),
        "sigma of struct": (noised._replace(sigma=sigma._replace(struct=changed(sigma.struct, frame))), cond),
        "audio": (noised, cond._replace(audio=changed(cond.audio, frame))),
    }


@pytest.mark.parametrize("case", [WHOLE, RAGGED, WHOLE_WINDOW, RAGGED_WINDOW], ids=name)
def test_later_chunks_do_not_change_a_bit(fused: KernelSet, case: Case) -> None:
    model, (noised, cond) = Model(case, fused), inputs(case)
    before = model.detached(noised, cond)
    for chunk in (1, 3):
        first = CHUNKS[chunk].start
        for name, given in perturbed(noised, cond, first).items():
            after = model.detached(*given)
            pairs = list(zip(Velocity._fields, before, after, strict=True))
            for stream, old, new in pairs:
                assert torch.equal(old[:, :first], new[:, :first]), f"{name} of chunk {chunk} reaches earlier {stream}"
            assert any(not torch.equal(old, new) for _, old, new in pairs), f"{name} changes nothing at all"


def audio_track(case: Case, changed_from: int | None) -> Tensor:
    """Audio windows of both clips cut from one 50 Hz track, negated from frame `changed_from` on."""
    heard = config(case).audio
    source = torch.Generator("cpu").manual_seed(5)
    track = torch.randn(2 + AUDIO_FRAMES * (SPAN.length - 1), heard.dim, generator=source)
    if changed_from is not None:
        track[changed_from:] *= -1
    stored = torch.cat((track[:1].expand(AUDIO_FRAMES - 2, -1), track)).unflatten(0, (SPAN.length, AUDIO_FRAMES))
    return audio_windows(stored, SPAN.length, heard.context).expand(BATCH, -1, -1, -1).to(DEVICE)


def test_audio_reaches_exactly_the_declared_look_ahead(fused: KernelSet) -> None:
    """The last 50 Hz frame that the last latent frame of a chunk hears is heard; the next one changes no bit."""
    case = RAGGED_WINDOW
    model, (noised, cond) = Model(case, fused), inputs(case)
    last = CHUNKS[2].stop - 1
    beyond = AUDIO_FRAMES * last + 1 + config(case).audio.context + 1
    before, same, other = (
        model.detached(noised, cond._replace(audio=audio_track(case, start))) for start in (None, beyond, beyond - 1)
    )
    for old, new, heard in zip(before, same, other, strict=True):
        assert torch.equal(old[:, : last + 1], new[:, : last + 1])
        assert not torch.equal(old[:, : last + 1], heard[:, : last + 1])


def test_gradients_of_later_inputs_are_exactly_zero(fused: KernelSet) -> None:
    case = RAGGED_WINDOW
    model, (noised, cond) = Model(case, fused), inputs(case)
    leaves = {
        "video": noised.video, "struct": noised.struct, "audio": cond.audio,
        "sigma of video": noised.sigma.video, "sigma of struct": noised.sigma.struct,
    }  # fmt: skip
    for leaf in leaves.values():
        leaf.requires_grad_()
    out = model(noised, cond)
    stop = CHUNKS[2].stop
    source = torch.Generator("cpu").manual_seed(1)
    weights = [torch.randn(x[:, :stop].shape, generator=source).to(DEVICE) for x in out]
    sum((x[:, :stop] * weight).sum() for x, weight in zip(out, weights, strict=True)).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all(), name
        assert torch.count_nonzero(leaf.grad[:, stop:]) == 0, f"later {name} has a gradient"
        assert torch.count_nonzero(leaf.grad[:, :stop]) > 0, f"{name} has no gradient at all"


def cut(noised: Noised, cond: Conditioning, span: FrameSpan, sigma: FrameSigma) -> tuple[Noised, Conditioning]:
    own = slice(span.start, span.stop)
    part = Noised(noised.video[:, own], noised.struct[:, own], FrameSigma(*(x[:, own] for x in sigma)))
    return part, cond._replace(audio=cond.audio[:, own])


def clean_before(sigma: FrameSigma, frame: int) -> FrameSigma:
    return FrameSigma(*(torch.cat((torch.zeros_like(x[:, :frame]), x[:, frame:]), dim=1) for x in sigma))


def cached_chunks(model: Model, noised: Noised, cond: Conditioning, case: Case, commit_clean: bool) -> list[Velocity]:
    """Each chunk at its own level against the chunks that the cache has kept, as in generation."""
    cache, found = KVCache(CHUNK, case.window, case.sink), []
    clean = clean_before(noised.sigma, SPAN.stop)
    for span in CHUNKS:
        path = CachedPath(cache, model.kernels, span)
        out = model.tower(*cut(noised, cond, span, noised.sigma), span, path)
        found.append(Velocity(*(x.detach() for x in out)))
        if commit_clean:
            model.tower(*cut(noised, cond, span, clean), span, path)
        cache.commit(span)
    return found


def full_chunk(model: Model, noised: Noised, cond: Conditioning, span: FrameSpan) -> Velocity:
    """The same chunk of the full forward with earlier chunks at level 0; what comes later has no influence."""
    out = model.detached(noised._replace(sigma=clean_before(noised.sigma, span.start)), cond)
    return Velocity(*(x[:, span.start : span.stop] for x in out))


# Two computations in bf16 with other tiles: sums are taken in another order and probabilities rounded against another
# running maximum. Each is off from fp32 by 5e-3 to 6e-3 of the output of this model; if the two errors were independent
# the results would differ by sqrt(2) times as much, 8e-3, and as many roundings agree it is less (4e-3 to 5e-3).
CACHED_TOLERANCE = 1e-2


@pytest.mark.parametrize("case", [WHOLE, RAGGED_WINDOW], ids=name)
def test_cached_equals_full(fused: KernelSet, case: Case) -> None:
    model, (noised, cond) = Model(case, fused), inputs(case)
    cached = cached_chunks(model, noised, cond, case, commit_clean=True)
    stale = cached_chunks(model, noised, cond, case, commit_clean=False)
    for index, span in enumerate(CHUNKS):
        full = full_chunk(model, noised, cond, span)
        for stream, wanted, found, wrong in zip(Velocity._fields, full, cached[index], stale[index], strict=True):
            assert relative(found, wanted) <= CACHED_TOLERANCE, (stream, span)
            # Keys of noisy chunks in the cache are another matter: the tolerance is not just wide.
            assert index == 0 or relative(wrong, wanted) > 3 * CACHED_TOLERANCE, (stream, span)


@pytest.mark.parametrize("case", [WHOLE, RAGGED_WINDOW], ids=name)
def test_repeated_forwards_are_bit_identical(fused: KernelSet, case: Case) -> None:
    model, given = Model(case, fused), inputs(case)
    first = model.detached(*given)
    for _ in range(3):
        for old, new in zip(first, model.detached(*given), strict=True):
            assert torch.equal(old, new)

"""Parameter counts of the presets, on the meta device, against the tables of the model reference (12 and 15.1)."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_model import kernels
from pydantic import ValidationError
from torch import nn

from dualforce.config import ModelOverrides, TowerConfig
from dualforce.model.block import Block, Head
from dualforce.model.bridge import bridge_layers
from dualforce.model.dual_tower import DualTower
from dualforce.model.path import Site
from dualforce.model.tower import TowerEmbedding
from dualforce.presets import PRESETS, build_model_config


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def parts(preset: str, struct_dim: int, audio_dim: int) -> dict[str, int]:
    with torch.device("meta"):
        model = DualTower(build_model_config(preset, struct_dim=struct_dim, audio_dim=audio_dim), kernels())
    named = by_part(model)
    rest = sum(number for name, number in named.items() if name not in ("video", "struct", "bridge"))
    return {**{name: named[name] for name in ("video", "struct", "bridge")}, "audio": rest, "total": count(model)}


def by_part(model: DualTower) -> dict[str, int]:
    """Parameters of `video`, `struct`, `bridge`, .. over all layers and outside of them."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        path = name.split(".")
        part = path[2] if path[0] == "layers" else path[1]
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


# (struct_dim, audio_dim), then the counts; the model reference rounds them to 0.1 M. `tiny` is counted and frozen.
EXACT = {
    "tiny": ((70, 80), (998_592, 265_606, 150_528, 383_840, 1_798_566)),
    "small": ((70, 1024), (214_705_216, 54_889_030, 18_923_520, 21_414_400, 309_932_166)),
    "mova-lite": ((70, 1024), (954_712_640, 197_306_182, 63_811_584, 47_076_608, 1_262_907_014)),
    "mova-360p": ((70, 1024), (14_288_901_184, 1_419_015_238, 2_659_737_600, 252_080_640, 18_619_734_662)),
}
TABLE_MILLIONS = {
    "tiny": (1.0, 0.27, 0.14, 0.5, 2),  # "about": the audio width is the shards' own
    "small": (214.7, 54.9, 18.9, 21.4, 310),
    "mova-lite": (954.7, 197.3, 63.8, 47.1, 1263),
    "mova-360p": (14_289, 1_419, 2_660, 252, 18_620),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_counts(preset: str) -> None:
    (struct_dim, audio_dim), expected = EXACT[preset]
    found = parts(preset, struct_dim, audio_dim)
    assert tuple(found.values()) == expected
    tolerance = 0.3 if preset == "tiny" else 0.002
    assert tuple(n / 1e6 for n in expected) == pytest.approx(TABLE_MILLIONS[preset], rel=tolerance)


@pytest.mark.parametrize(
    ("name", "sizes", "channels", "patch", "expected"),
    [
        ("Wan2.1-T2V-1.3B", (1536, 12, 8960, 30), (16, 16), 2, 1_418_996_800),
        ("Wan2.1-T2V-14B", (5120, 40, 13824, 40), (16, 16), 2, 14_288_491_584),
        ("MOVA image-to-video", (5120, 40, 13824, 40), (36, 16), 2, 14_288_901_184),
        ("MOVA audio tower", (1536, 12, 8960, 30), (128, 128), 1, 1_419_193_472),
    ],
)
def test_tower_has_the_size_of_published_models(
    name: str, sizes: tuple[int, int, int, int], channels: tuple[int, int], patch: int, expected: int
) -> None:
    dim, heads, ffn, layers = sizes
    config = TowerConfig(
        dim=dim, heads=heads, ffn=ffn, layers=layers, in_dim=channels[0], out_dim=channels[1], patch=patch
    )
    with torch.device("meta"):
        blocks = layers * count(Block(config, kernels(), Site("video", 0)))
        head = Head(dim, config.out_dim * patch**2, config.eps, kernels())
        assert count(TowerEmbedding(config)) + blocks + count(head) == expected


def test_full_bridge_has_the_size_of_movas() -> None:
    with torch.device("meta"):
        model = DualTower(build_model_config("mova-360p", struct_dim=70, audio_dim=1024), kernels())
    assert by_part(model)["bridge"] == 2_659_737_600
    to_video, to_struct = model.layers[0].bridge.struct_to_video, model.layers[0].bridge.video_to_struct
    assert (count(to_video), count(to_struct)) == (68_191_232, 20_466_688)


def test_sequence_parallel_degrees_divide_the_heads() -> None:
    legal = {
        name: [sp for sp in range(1, 9) if row.video[1] % sp == row.struct[1] % sp == 0]
        for name, row in PRESETS.items()
    }
    assert legal == {"tiny": [1, 2, 4], "small": [1, 2, 4], "mova-lite": [1, 2, 3, 4, 6], "mova-360p": [1, 2, 4]}


def test_overrides_change_only_what_they_name() -> None:
    plain = build_model_config("small", struct_dim=70, audio_dim=1024)
    same = build_model_config("small", struct_dim=70, audio_dim=1024, overrides=ModelOverrides())
    assert plain == same
    assert (plain.window, plain.sink, plain.frames_per_chunk, plain.bridge.layers) == (None, 0, 2, 4)
    changed = build_model_config(
        "small",
        struct_dim=70,
        audio_dim=1024,
        overrides=ModelOverrides(
            bridge_layers=[1, 3], bridge_directions="s2v", frames_per_chunk=3, window=4, sink=1, text=False
        ),
    )
    assert bridge_layers(changed) == (1, 3)
    assert (changed.bridge.directions, changed.window, changed.sink, changed.frames_per_chunk) == ("s2v", 4, 1, 3)
    assert not changed.video.text and not changed.struct.text
    assert changed.video.model_copy(update={"text": True}) == plain.video
    assert changed.audio == plain.audio


def test_without_text_each_block_drops_its_cross_attention() -> None:
    with torch.device("meta"):
        with_text, without = (
            DualTower(
                build_model_config("tiny", struct_dim=6, audio_dim=5, overrides=ModelOverrides(text=text)), kernels()
            )
            for text in (True, False)
        )
    dim, layers, text_dim = 128, 4, 64
    block = 4 * (dim * dim + dim) + 2 * dim + 2 * dim  # q k v o, two norms of q and k, norm3
    embedding = text_dim * dim + dim + dim * dim + dim
    assert by_part(with_text)["video"] - by_part(without)["video"] == layers * block + embedding


def test_a_width_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValidationError, match="in_dim"):
        build_model_config("tiny", struct_dim=0, audio_dim=5)

"""The key table: public names, completeness, and the way back."""

from __future__ import annotations

import pytest
import torch
from helpers.random_model import random_model

from dualforce.config import ModelConfig, ModelOverrides
from dualforce.presets import build_model_config
from dualforce.weights.keys import WeightsError, check_names, key_table, parameter_shapes, to_public


def wan_names(layers: int) -> set[str]:
    """The list of the model reference, section 2.7, written out independently of the table."""
    both = ("weight", "bias")
    names = {f"patch_embedding.{kind}" for kind in both} | {f"head.head.{kind}" for kind in both} | {"head.modulation"}
    names |= {f"{name}.{i}.{kind}" for name in ("text_embedding", "time_embedding") for i in (0, 2) for kind in both}
    names |= {f"time_projection.1.{kind}" for kind in both}
    for i in range(layers):
        block = {f"{attn}.{x}.{kind}" for attn in ("self_attn", "cross_attn") for x in "qkvo" for kind in both}
        block |= {f"{attn}.{norm}.weight" for attn in ("self_attn", "cross_attn") for norm in ("norm_q", "norm_k")}
        block |= {f"{name}.{kind}" for name in ("norm3", "ffn.0", "ffn.2") for kind in both} | {"modulation"}
        names |= {f"blocks.{i}.{name}" for name in block}
    return names


def with_layers(preset: str, layers: int) -> ModelConfig:
    config = build_model_config(preset, struct_dim=70, audio_dim=1024)
    return config.model_copy(update={"video": config.video.model_copy(update={"layers": layers})})


def public_names(config: ModelConfig) -> list[str]:
    return [name for rule in key_table(config) for name in rule.public]


@pytest.mark.parametrize(("layers", "count"), [(30, 825), (40, 1095)])
def test_video_names_are_wans(layers: int, count: int) -> None:
    config = with_layers("mova-360p", layers)
    video = [name.removeprefix("video_dit.") for name in public_names(config) if name.startswith("video_dit.")]
    assert len(video) == count and set(video) == wan_names(layers)


@pytest.mark.parametrize("preset", ["tiny", "small", "mova-lite", "mova-360p"])
def test_table_covers_every_parameter_once(preset: str) -> None:
    config = build_model_config(preset, struct_dim=70, audio_dim=1024)
    table = key_table(config)
    inner, public = [rule.inner for rule in table], public_names(config)
    assert sorted(inner) == sorted(parameter_shapes(config))
    assert len(set(inner)) == len(inner) and len(set(public)) == len(public)


def test_public_shapes_are_wans() -> None:
    config = build_model_config("mova-lite", struct_dim=70, audio_dim=1024)
    shapes = parameter_shapes(config)
    public = {name: rule.public_shape(shapes[rule.inner]) for rule in key_table(config) for name in rule.public}
    expected = {
        "video_dit.patch_embedding.weight": (1536, 36, 1, 2, 2),
        "video_dit.text_embedding.0.weight": (1536, 4096),
        "video_dit.time_embedding.0.weight": (1536, 256),
        "video_dit.time_projection.1.weight": (6 * 1536, 1536),
        "video_dit.blocks.19.modulation": (1, 6, 1536),
        "video_dit.blocks.0.self_attn.q.weight": (1536, 1536),
        "video_dit.blocks.0.cross_attn.v.bias": (1536,),
        "video_dit.blocks.0.self_attn.norm_q.weight": (1536,),
        "video_dit.blocks.0.ffn.0.weight": (8960, 1536),
        "video_dit.head.head.weight": (64, 1536),
        "video_dit.head.modulation": (1, 2, 1536),
        "struct_dit.patch_embedding.weight": (768, 70, 1),
        "struct_dit.head.head.weight": (70, 768),
        "dual_tower_bridge.struct_to_video_conditioners.5.inner.k.weight": (1536, 768),
        "dual_tower_bridge.struct_to_video_conditioners.0.y_norm.weight": (768,),
        "dual_tower_bridge.video_to_struct_conditioners.0.inner.v.weight": (768, 1536),
        "dual_tower_bridge.video_to_struct_conditioners.0.inner.norm_q.weight": (768,),
    }
    assert {name: public[name] for name in expected} == expected


@pytest.mark.parametrize(
    "overrides",
    [
        None,
        ModelOverrides(bridge_directions="s2v"),
        ModelOverrides(bridge_directions="none"),
        ModelOverrides(text=False),
    ],
    ids=["both", "s2v", "none", "no-text"],
)
def test_there_and_back_is_bitwise(overrides: ModelOverrides | None) -> None:
    model = random_model(overrides=overrides)
    state = model.state_dict()
    public = to_public(state, model.config)
    for rule in key_table(model.config):
        back = rule.to_inner([public[name] for name in rule.public], tuple(state[rule.inner].shape))
        assert torch.equal(back, state[rule.inner]), rule


def test_packed_parts_are_q_k_v_in_order() -> None:
    model = random_model()
    public = to_public(model.state_dict(), model.config)
    d, block = model.config.video.dim, model.layers[1].video
    for i, letter in enumerate("qkv"):
        part = block.self_attn.qkv.weight[i * d : (i + 1) * d]
        assert torch.equal(public[f"video_dit.blocks.1.self_attn.{letter}.weight"], part)
    for i, letter in enumerate("kv"):
        part = block.cross_attn.kv.bias[i * d : (i + 1) * d]
        assert torch.equal(public[f"video_dit.blocks.1.cross_attn.{letter}.bias"], part)


def test_patch_embedding_is_a_convolution() -> None:
    from dualforce.model.tower import patchify

    model = random_model()
    public = to_public(model.state_dict(), model.config)
    x = torch.randn(1, 3, 36, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.conv3d(
        x.transpose(1, 2), public["video_dit.patch_embedding.weight"], public["video_dit.patch_embedding.bias"],
        stride=(1, 2, 2),
    )  # fmt: skip
    found = model.embedding.video.patch_embedding(patchify(x, 2))
    torch.testing.assert_close(found, expected.flatten(3).permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


def test_missing_and_unmapped_keys_are_listed() -> None:
    with pytest.raises(WeightsError) as caught:
        check_names(["a", "x"], ["a", "b", "c"], "here")
    assert str(caught.value) == "here: missing b, c, unmapped x: expected the 3 keys of the model's config"
    model = random_model()
    state = {**model.state_dict(), "heads.tau": torch.zeros(())}
    del state["layers.0.struct.modulation"]
    with pytest.raises(WeightsError, match=r"missing layers\.0\.struct\.modulation, unmapped heads\.tau"):
        to_public(state, model.config)

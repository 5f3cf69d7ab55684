"""The table between the parameter names inside `DualTower` and the public names of exported files.

Public names of the towers are those of Wan and MOVA (`video_dit.`, `struct_dit.`), those of the bridge MOVA's with
"audio" read as "struct" (`dual_tower_bridge.`). Inside, q, k and v (or k and v) are one packed weight, stacked on dim
0, and the patch embedding is a matrix whose columns are in the order of the convolution's weight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dualforce.config import ModelConfig, TowerConfig
from dualforce.model.bridge import bridge_layers
from dualforce.model.dual_tower import DualTower
from megatron_ext.kernels.kernel_set import select_kernels

Shape = tuple[int, ...]

LISTED = 6  # names that an error spells out


class WeightsError(ValueError):
    """Weights that cannot be written or read; the message is one line for the user."""


class Rule(NamedTuple):
    """One inner parameter and the public tensors it is made of, equal parts stacked on dim 0 in this order.

    `view` is the public shape where it differs from the inner one.
    """

    inner: str
    public: tuple[str, ...]
    view: Shape | None = None

    def public_shape(self, inner: Shape) -> Shape:
        """Shape of each public tensor."""
        return self.view or (inner[0] // len(self.public), *inner[1:])

    def to_public(self, tensor: Tensor) -> dict[str, Tensor]:
        """Inner tensor -> public tensors, as views."""
        shape = self.public_shape(tuple(tensor.shape))
        parts = tensor.chunk(len(self.public))
        return {name: part.view(shape) for name, part in zip(self.public, parts, strict=True)}

    def to_inner(self, parts: list[Tensor], shape: Shape) -> Tensor:
        """Public tensors in the rule's order -> inner tensor of `shape`."""
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(shape)


def key_table(config: ModelConfig) -> list[Rule]:
    """One rule for every parameter of the model, in the order of the files."""
    return [
        *_tower("video", "video_dit.", config.video, (1, config.video.patch, config.video.patch)),
        *_tower("struct", "struct_dit.", config.struct, (1,)),
        *_bridge(config),
        *_audio(config),
        *_dual_sigma(),
    ]


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shape of every inner parameter, from a model without memory."""
    with torch.device("meta"):
        model = DualTower(config, select_kernels("reference", torch.device("meta"), torch.float32))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_names(found: Collection[str], expected: Collection[str], origin: str) -> None:
    """Raise WeightsError that lists the names missing from `found` and those it has too many."""
    have, want = set(found), set(expected)
    missing = [name for name in expected if name not in have]
    unknown = [name for name in found if name not in want]
    parts = [f"{kind} {_listed(names)}" for kind, names in (("missing", missing), ("unmapped", unknown)) if names]
    if parts:
        raise WeightsError(f"{origin}: {', '.join(parts)}: expected the {len(expected)} keys of the model's config")


def to_public(state: Mapping[str, Tensor], config: ModelConfig, origin: str = "weights") -> dict[str, Tensor]:
    """Inner state -> public state; WeightsError lists keys that are missing or that no rule maps."""
    table = key_table(config)
    check_names(list(state), [rule.inner for rule in table], origin)
    return {name: part for rule in table for name, part in rule.to_public(state[rule.inner]).items()}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _layer(inner: str, *public: str, bias: bool = True) -> Iterator[Rule]:
    """Weight and bias of one layer, packed from the public layers."""
    for kind in ("weight", "bias") if bias else ("weight",):
        yield Rule(f"{inner}.{kind}", tuple(f"{name}.{kind}" for name in public))


def _tower(stream: str, public: str, config: TowerConfig, kernel: Shape) -> Iterator[Rule]:
    inner = f"embedding.{stream}."
    patch = "patch_embedding.weight"
    yield Rule(inner + patch, (public + patch,), (config.dim, config.in_dim, *kernel))
    yield Rule(f"{inner}patch_embedding.bias", (f"{public}patch_embedding.bias",))
    text = ("text_embedding.0", "text_embedding.2") if config.text else ()
    for name in (*text, "time_embedding.0", "time_embedding.2", "time_projection.1"):
        yield from _layer(inner + name, public + name)
    for i in range(config.layers):
        yield from _block(f"layers.{i}.{stream}.", f"{public}blocks.{i}.", config.text)
    yield from _layer(f"ends.{stream}.head", f"{public}head.head")
    yield Rule(f"ends.{stream}.modulation", (f"{public}head.modulation",))


def _block(inner: str, public: str, text: bool) -> Iterator[Rule]:
    yield Rule(f"{inner}modulation", (f"{public}modulation",))
    yield from _attention(f"{inner}self_attn.", f"{public}self_attn.", ("qkv",))
    if text:
        yield from _attention(f"{inner}cross_attn.", f"{public}cross_attn.", ("q", "kv"))
        yield from _layer(f"{inner}norm3", f"{public}norm3")
    for name in ("ffn.0", "ffn.2"):
        yield from _layer(inner + name, public + name)


def _attention(inner: str, public: str, packs: tuple[str, ...]) -> Iterator[Rule]:
    """Projections (each pack's letters are its public layers), output, and the norms of q and k."""
    for pack in packs:
        yield from _layer(inner + pack, *(public + letter for letter in pack))
    yield from _layer(f"{inner}o", f"{public}o")
    for name in ("norm_q", "norm_k"):
        yield from _layer(inner + name, public + name, bias=False)


def _bridge(config: ModelConfig) -> Iterator[Rule]:
    directions = {
        "both": ("struct_to_video", "video_to_struct"),
        "s2v": ("struct_to_video",),
        "v2s": ("video_to_struct",),
    }
    for direction in directions.get(config.bridge.directions, ()):
        for i in bridge_layers(config):
            inner, public = f"layers.{i}.bridge.{direction}.", f"dual_tower_bridge.{direction}_conditioners.{i}."
            yield from _layer(f"{inner}y_norm", f"{public}y_norm")
            yield from _attention(f"{inner}inner.", f"{public}inner.", ("q", "kv"))


def _audio(config: ModelConfig) -> Iterator[Rule]:
    yield Rule("embedding.audio_projector.null", ("audio.projector.null",))
    for name in ("norm", "mlp.0", "mlp.2"):
        yield from _layer(f"embedding.audio_projector.{name}", f"audio.projector.{name}")
    for stream in ("video", "struct"):
        for i in range(config.audio.layers):
            inner, public = f"layers.{i}.audio_{stream}.", f"audio.{stream}.{i}."
            yield from _layer(f"{inner}norm", f"{public}norm")
            yield from _attention(inner, public, ("q", "kv"))


def _dual_sigma() -> Iterator[Rule]:
    for stream in ("video", "struct"):
        for name in ("hidden", "out"):
            yield from _layer(f"embedding.dual_sigma_{stream}.{name}", f"dual_sigma.{stream}.{name}")

"""Several shard sets in one run: what they must share, what is pooled, and what the loader makes of them."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_shards import write_fake_shards
from helpers.people_shards import write_people
from helpers.shard_edits import locate, rewrite_manifest

from data_shards.edit import drop, merge, split
from data_shards.moments import StreamMoments
from data_shards.reader import ShardSet
from data_shards.schema import ShardError
from dualforce.config import ConfigError, DataConfig
from dualforce.data.buckets import Buckets
from dualforce.data.loader import StepLoader
from dualforce.data.statistics import StreamStatistics, pooled_statistics
from dualforce.data.steps import Deal
from dualforce.types import ClipBatch

LENGTHS = [3, 5, 5]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> list[ShardSet]:
    """Six large clips of five frames, of which three are used; four small ones, two small ones."""
    root = tmp_path_factory.mktemp("sets")
    shapes = {"large": (6, 5, 8), "small": (4, 5, 4), "few": (2, 7, 4)}
    return [
        ShardSet.open(write_fake_shards(root / name, clips=clips, frames=frames, height=side, width=side, seed=clips))
        for name, (clips, frames, side) in shapes.items()
    ]


def test_what_follows_from_all_sets(opened: list[ShardSet]) -> None:
    found = Buckets(opened, LENGTHS)
    assert found.geometry() == {
        "pixel_size": 64, "latent": [16, 8, 8], "frames": 5,
        "buckets": [{"pixel_size": 64, "frames": 3}, {"pixel_size": 32, "frames": 5}, {"pixel_size": 32, "frames": 5}],
    }  # fmt: skip
    assert found.tokens(2) == (3 * (16 + 4), 5 * (4 + 4), 5 * (4 + 4))
    assert found.names() == ("64px-3f", "32px-5f-1", "32px-5f-2")
    assert found.extractors == opened[0].manifest["extractors"]
    alone = Buckets(opened[:1], [3])
    assert alone.hash == opened[0].hash and alone.statistics() == opened[0].manifest["statistics"]
    assert len({found.hash, alone.hash, Buckets(opened[::-1], LENGTHS[::-1]).hash}) == 3


@pytest.mark.parametrize("flame", [False, True])
def test_pooled_statistics_are_those_of_the_merged_set(tmp_path: Path, flame: bool) -> None:
    """Sets of one size can be merged, which takes the moments over all clips anew, in fp64 too."""
    roots = [
        write_fake_shards(tmp_path / str(seed), clips=clips, frames=5, seed=seed, flame=flame)
        for seed, clips in ((0, 3), (9, 8))
    ]
    merge(tmp_path / "both", roots, prefix=True)
    pooled = Buckets([ShardSet.open(root) for root in roots], [5, 5]).statistics()
    whole = ShardSet.open(tmp_path / "both").manifest["statistics"]
    assert pooled.keys() == whole.keys()
    for stream in whole:
        for kind in ("mean", "std"):
            # Sums of at most 1e5 numbers of size 1 in another order: 1e5 x 1e-16, and as much again.
            torch.testing.assert_close(
                torch.tensor(pooled[stream][kind], dtype=torch.float64),
                torch.tensor(whole[stream][kind], dtype=torch.float64), rtol=1e-10, atol=1e-10,
            )  # fmt: skip


def test_pooled_statistics_of_clips_of_any_size_are_those_of_all_values(opened: list[ShardSet]) -> None:
    """Sizes and lengths that no set could hold together, against one pass over all clips."""
    moments = StreamMoments()
    for one in opened:
        reader = one.split("train")
        for index in range(len(reader)):
            moments.add(reader.read(index))
    whole, pooled = moments.statistics("test"), Buckets(opened, LENGTHS).statistics()
    for stream, kind in itertools.product(whole, ("mean", "std")):
        torch.testing.assert_close(torch.tensor(pooled[stream][kind]), torch.tensor(whole[stream][kind]))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("flame"), r"1/manifest.json: statistics.flame: absent: .*dualforce data upgrade OLD NEW"),
        (lambda s: s["flame"].pop("slots"), r"1/manifest.json: statistics.flame.slots: None: expected a whole number"),
        (lambda s: s["flame"].update(slots=10**6), r"1/manifest.json: statistics.flame.slots: 1000000: expected"),
        (lambda s: s["flame"].update(mean=[0.0], std=[1.0]), r"1/manifest.json: statistics.flame: 1 channels: expect"),
    ],
    ids=["absent", "no-slots", "many-slots", "width"],
)
def test_flame_that_cannot_be_standardised_names_the_set(tmp_path: Path, change: Any, named: str) -> None:
    roots = [write_fake_shards(tmp_path / str(seed), clips=3, frames=5, seed=seed, flame=True) for seed in (0, 1)]
    rewrite_manifest(roots[1], lambda manifest: change(manifest["statistics"]))
    with pytest.raises(ShardError, match=named) as error:
        Buckets([ShardSet.open(root) for root in roots], [5, 5]).statistics()
    assert "\n" not in str(error.value)


def test_flame_that_is_nowhere_valid_is_pooled(tmp_path: Path) -> None:
    parts = [({"flame": {"mean": [0.0], "std": [1.0]}}, {"flame": (count,)}) for count in (0, 0)]
    assert pooled_statistics(parts) == {"flame": {"mean": [0.0], "std": [1.0]}}
    some = ({"flame": {"mean": [3.0], "std": [2.0]}}, {"flame": (7,)})
    assert pooled_statistics([*parts, some]) == {"flame": {"mean": [3.0], "std": [2.0]}}


def test_large_latents_weigh_by_their_pixels(opened: list[ShardSet]) -> None:
    """Every value counts once, as within a set; structure and sound do not grow with the picture."""
    parts = [one.manifest["statistics"] for one in opened[:2]]
    pooled = Buckets(opened[:2], LENGTHS[:2]).statistics()
    for row in (0, 1):
        a, b, both = (torch.tensor(p["video"]["mean"][row]) for p in (*parts, pooled))
        weights = (6 * 64, 4 * 16)  # clips x pixels; both sets have as many frames
        torch.testing.assert_close(both, (weights[0] * a + weights[1] * b) / sum(weights))
    a, b, both = (torch.tensor(p["struct"]["mean"]) for p in (*parts, pooled))
    torch.testing.assert_close(both, (6 * a + 4 * b) / 10)
    assert pooled_statistics([(parts[0], {})]) == parts[0]


@pytest.mark.parametrize(("stream", "key"), [("video", "tag"), ("video", "channels"), ("motion", "tag"),
                                             ("audio", "width"), ("flame", "tag")])  # fmt: skip
def test_other_extractors_are_refused_with_both_values(opened: list[ShardSet], stream: str, key: str) -> None:
    ours = opened[0].manifest["extractors"].get(stream, {}).get(key)
    foreign = copy.copy(opened[1])
    foreign.manifest = copy.deepcopy(foreign.manifest)
    foreign.manifest["extractors"].setdefault(stream, {})[key] = "x-v1"
    named = rf"small: extractors\.{stream}\.{key}: 'x-v1': expected {ours!r}, as in .*large"
    with pytest.raises(ShardError, match=named):
        Buckets([opened[0], foreign], LENGTHS[:2])


def test_nobody_is_trained_on_in_one_set_and_held_out_in_another(tmp_path: Path) -> None:
    """As two builds of the same videos in two sizes may leave it: each deals the people that it could use."""
    sets = [
        ShardSet.open(write_people(tmp_path / "small", train=("ann", "bob"), validation=("cyd",))),
        ShardSet.open(write_people(tmp_path / "large", train=("dan", "cyd"), validation=("eva",), height=8, width=8)),
    ]
    named = r"large: identity 'cyd' is in train, but in validation of .*small: expected one split"
    with pytest.raises(ShardError, match=named):
        Buckets(sets, [3, 3])
    split(tmp_path / "large", tmp_path / "dealt", validation=0.5, seed=1)
    split(tmp_path / "small", tmp_path / "too", validation=0.5, seed=1)
    Buckets([ShardSet.open(tmp_path / name) for name in ("dealt", "too")], [3, 3])


def test_a_clip_in_two_sets_is_refused(tmp_path: Path) -> None:
    write_people(tmp_path / "all")
    drop(tmp_path / "all", tmp_path / "some", identities=["ann"])
    sets = [ShardSet.open(tmp_path / name) for name in ("all", "some")]
    with pytest.raises(ShardError, match=r"some: sample '.*-w\d': clip: .*: expected one that is not in .*all"):
        Buckets(sets, [3, 3])
    larger = ShardSet.open(write_people(tmp_path / "larger", height=8, width=8))
    Buckets([sets[0], larger], [3, 3])  # the same video in another size


def test_a_set_given_twice_is_refused(opened: list[ShardSet]) -> None:
    with pytest.raises(ShardError, match=r"small: the same clips as .*small: expected once"):
        Buckets([opened[1], opened[0], opened[1]], [5, 3, 5])


def loader(opened: list[ShardSet], **changes: Any) -> StepLoader:
    settings: dict[str, Any] = {"shards": [str(one.source) for one in opened], "frames": LENGTHS[: len(opened)],
                                "clips_per_step": 4, "workers": changes.pop("workers", 0),
                                "max_damaged": changes.pop("max_damaged", 0)}  # fmt: skip
    ranks = {"dp_rank": 0, "dp_size": 1, "micro_batch": 2, **changes}
    statistics = StreamStatistics.from_manifest(Buckets(opened, LENGTHS[: len(opened)]).statistics())
    steps = ranks.pop("start", 0), ranks.pop("stop", 8)
    deal = Deal(statistics, DataConfig(**settings), context=2, text_dim=4, seed=3, **ranks)
    return StepLoader(opened, deal, *steps, lambda batches: batches)


def clips_of(batches: list[ClipBatch]) -> list[tuple[str, tuple[int, int], tuple[int, ...]]]:
    return [
        (key, place, tuple(batch.video.shape[1:]))
        for batch in batches
        for key, place in zip(batch.keys, batch.position, strict=True)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_is_of_one_bucket_in_every_layout(opened: list[ShardSet], workers: int) -> None:
    alone = [clips_of(step) for step in loader(opened)]
    sizes = [{shape for _, _, shape in step} for step in alone]
    assert all(len(size) == 1 for size in sizes)
    assert sizes[0] == {(3, 16, 8, 8)}  # the largest first
    assert set().union(*sizes) == {(3, 16, 8, 8), (5, 16, 4, 4)}
    ranks = [[clips_of(step) for step in loader(opened, dp_rank=r, dp_size=2, workers=workers)] for r in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == alone
    later = [clips_of(step) for step in loader(opened, start=3, micro_batch=4, workers=workers)]
    assert later == alone[3:]
    made = loader(opened)
    assert [[8, 4, 4][made.bucket_of_step(step)] for step in range(8)] == [shape[-1] for (shape,) in sizes]


def test_clips_are_what_their_set_holds(opened: list[ShardSet]) -> None:
    """Found by key and shape in the set's own reader, normalised by the statistics of all."""
    statistics = StreamStatistics.from_manifest(Buckets(opened, LENGTHS).statistics())
    made = loader(opened)
    for step, batches in enumerate(made):
        number = made.bucket_of_step(step)
        reader = opened[number].split("train")
        for batch in batches:
            for row, key in enumerate(batch.keys):
                clip = reader.read(reader.keys.index(key))
                wanted = statistics.normalise_video(clip.video[: LENGTHS[number]])
                assert torch.equal(batch.video[row], wanted)


@pytest.mark.parametrize("sides", [(4, 8), (8, 4)])
def test_damage_is_replaced_from_the_same_bucket_and_told_with_it(tmp_path: Path, sides: tuple[int, int]) -> None:
    """Keys of two sets may be alike: one recording at two sizes."""
    sets = [
        ShardSet.open(write_fake_shards(tmp_path / str(side), clips=4, frames=5, height=side, width=side))
        for side in sides
    ]
    for one in sets:
        tar = one.root / "train-000000.tar"
        data = bytearray(tar.read_bytes())
        data[locate(one.root)[1].tensors["video"].offset] ^= 1
        tar.write_bytes(data)
    made = loader(sets, max_damaged=2, micro_batch=4)
    shapes = [{shape for _, _, shape in clips_of(step)} for step in made]
    assert all(len(shape) == 1 for shape in shapes) and len(set().union(*shapes)) == 2
    assert sorted((one.bucket, one.key) for one in made.damaged) == [(0, "train-0001"), (1, "train-0001")]
    with pytest.raises(ShardError, match="1 before it: expected no more than"):
        list(loader(sets, max_damaged=1, micro_batch=4))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"shards": ["a", "b"], "frames": [5]}, r"frames \[5\]: expected one number, or one for each of 2 sets"),
        ({"shards": []}, r"shards \[\]: expected the name of at least one set"),
        ({"shards": ["a", ""]}, r"none empty"),
        ({"frames": [0]}, r"greater than 0"),
    ],
)
def test_bad_lists(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**data)


def test_a_crop_longer_than_the_clips_of_its_set_names_the_set(opened: list[ShardSet]) -> None:
    deal = Deal(
        StreamStatistics.from_manifest(opened[0].manifest), DataConfig(shards=["a", "b"], frames=[3, 7]), 2, 4, 0,
        dp_rank=0, dp_size=1, micro_batch=8,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"data\.frames: 7: expected at most 5, .* clips in .*small"):
        deal.check([one.split("train") for one in opened[:2]])

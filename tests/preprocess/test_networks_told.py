"""What a build says of the networks behind it is what it did itself."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from dualforce import __version__
from dualforce.codecs import face_landmarker
from dualforce.preprocess.content_id import ContentHashes
from dualforce.preprocess.networks import networks_of
from dualforce.preprocess.options import BuildOptions


@pytest.mark.parametrize("tag", [face_landmarker.TAG, "liveportrait-63-0123456789ab-v1", "rendered-head-v1"])
@pytest.mark.parametrize("sidecars", [True, False])
def test_motion_of_sidecars_has_no_version_of_the_code_here(tag: str, sidecars: bool) -> None:
    """It was computed elsewhere, at some time, whatever its tag says; nothing of it ran in the build."""
    extractors = {"video": {"tag": "dct-4x8x8-16-v1"}, "motion": {"tag": tag}}
    found = {entry["part"]: entry for entry in networks_of(BuildOptions(), extractors, None, sidecars, ContentHashes())}
    own = ("mediapipe", version("mediapipe")) if tag == face_landmarker.TAG else ("dualforce", __version__)
    assert (found["motion"]["package"], found["motion"]["version"]) == ((None, None) if sidecars else own)
    assert (found["video"]["package"], found["video"]["version"]) == ("dualforce", __version__)

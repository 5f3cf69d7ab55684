"""What a build is asked for."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from dualforce.codecs.protocols import VIDEO_STRIDE
from dualforce.preprocess.errors import BuildError
from dualforce.preprocess.quality import Limits

MAX_SIZE = 2048  # 44 MiB of latents, in a clip of at most 64 MiB (data_shards.schema)


@dataclass(frozen=True)
class BuildOptions:
    """`size`: edge of the crops in pixels; `audio_encoder`: folder of a pretrained speech encoder (None: logmel);
    `video_codec`: folder of a pretrained video codec (None: dct); `text_encoder`: that of a text encoder, for the texts
    of the JSON file `captions` (None: a set without texts);
    `motion_extractor`: LivePortrait's checkpoint (None: motion by `face_landmarker`);
    `flame_encoder`: DECA's or EMOCA's checkpoint (None: no FLAME);
    `face_detector`: insightface's, which then finds the face (None: `face_landmarker` does, or the sidecar says);
    `identities`: JSON file of who is in which video (None: as sidecars say, or each a person of its own); `workers`:
    processes, dealt to the `devices` in turn; `validation_share` of the identities is held out; `licence` is that of
    videos whose sidecar names none, `origin` says where the videos come from; `work`: folder in which finished videos
    are kept for later builds (None: in the folder of the shards, until they are written)."""

    size: int = 128
    face_landmarker: Path | None = None
    audio_encoder: Path | None = None
    video_codec: Path | None = None
    text_encoder: Path | None = None
    captions: Path | None = None
    motion_extractor: Path | None = None
    flame_encoder: Path | None = None
    face_detector: Path | None = None
    identities: Path | None = None
    workers: int = 1
    validation_share: float = 0.2
    limits: Limits = field(default_factory=Limits)
    devices: tuple[str, ...] = ("cpu",)
    licence: str | None = None
    origin: str | None = None
    work: Path | None = None

    def check(self) -> None:
        """Raise BuildError for a value that cannot work."""
        for package in ("av", "scenedetect", "silero_vad"):
            if importlib.util.find_spec(package) is None:
                raise BuildError(f"{package} is not installed: pip install 'dualforce[data]'")
        edge = 2 * VIDEO_STRIDE
        if self.size < edge or self.size % edge:
            raise BuildError(f"--size {self.size}: expected a multiple of {edge}, as latents are patched by 2")
        if self.size > MAX_SIZE:
            raise BuildError(f"--size {self.size}: expected at most {MAX_SIZE}, as a clip has room for no more")
        if (self.captions is None) != (self.text_encoder is None):
            given, other = ("captions", "text-encoder DIR") if self.captions else ("text-encoder", "captions FILE")
            raise BuildError(f"--{given} {self.captions or self.text_encoder}: needs --{other}")
        if self.workers < 1:
            raise BuildError(f"--workers {self.workers}: expected at least 1")
        if self.workers < len(self.devices):
            raise BuildError(f"--workers {self.workers}: expected at least {len(self.devices)}, one for each device")
        if not 0 < self.validation_share < 1:
            raise BuildError(f"--validation-share {self.validation_share}: expected more than 0 and less than 1")

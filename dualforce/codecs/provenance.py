"""Where the frozen extractors come from, the licence of their published weights, and the package that runs them: for
model cards, manifests and reports."""

from __future__ import annotations

# By the start of a tag.
ORIGINS = {
    "dct-": "fixed orthonormal transform, part of DualForce (Apache-2.0), no weights",
    "wan2.1-": "video VAE of Wan 2.1 by Alibaba (Apache-2.0)",
    "logmel-": "log-mel spectrum, part of DualForce (Apache-2.0), no weights",
    "hubert-": "HuBERT; as published by Meta, Apache-2.0",
    "whisper-": "Whisper; as published by OpenAI, MIT or Apache-2.0",
    "umt5-": "umT5; as published by Google, Apache-2.0",
    "rendered-head-": "known motion of rendered heads, part of DualForce (Apache-2.0), no weights",
    "mediapipe-face-landmarker-": "MediaPipe FaceLandmarker, face_landmarker.task by Google (Apache-2.0)",
    "liveportrait-": "LivePortrait motion extractor, motion_extractor.pth by KwaiVGI (MIT)",
    "deca-": "DECA, FLAME parameters (for non-commercial use, after registration)",
    "emoca-": "EMOCA, FLAME parameters (for non-commercial use, after registration)",
    "silero-vad-": "Silero VAD, weights of the package silero-vad by the Silero Team (MIT)",
    "pyscenedetect-": "PySceneDetect (BSD-3-Clause), no weights",
    "insightface-detector-": "face detector of insightface (published models: for non-commercial research only)",
}


def origin_of(tag: str) -> str:
    """Origin and licence of the extractor with this tag."""
    return next((text for start, text in ORIGINS.items() if tag.startswith(start)), "see the terms of its owner")


# Packages whose code computes the networks; all others with an origin are computed by DualForce's own.
PACKAGES = {
    "wan2.1-": "diffusers",
    "hubert-": "transformers",
    "whisper-": "transformers",
    "umt5-": "transformers",
    "mediapipe-face-landmarker-": "mediapipe",
    "silero-vad-": "silero-vad",
    "pyscenedetect-": "scenedetect",
    "insightface-detector-": "insightface",
}


def package_of(tag: str) -> str | None:
    """The package that computes what an extractor with this tag gives; None for motion that others have computed."""
    own = "dualforce" if any(tag.startswith(start) for start in ORIGINS) else None
    return next((package for start, package in PACKAGES.items() if tag.startswith(start)), own)

"""Video, sound and image files through PyAV: the one package that imports `av`.

Clock: time zero of a video file is the presentation time of its first video frame. Pixel frame k is the picture on
screen k / 25 s later, whatever the file's own frame rate, and sound sample n is heard n / 16000 s after the same zero.
Pictures come out upright (rotation flag applied) with square pixels, whole where they were interlaced, and as BT.709
colours in uint8 RGB whatever the file has (HDR, wide gamut, matrix, range, bits); alpha is not looked at.
"""

from dualforce.codecs.media.clip import Video, read_video
from dualforce.codecs.media.container import MediaError, duration, opened
from dualforce.codecs.media.pictures import MediaInfo, iter_frames, probe, read_image
from dualforce.codecs.media.sound import read_audio, read_sound, stored_sound
from dualforce.codecs.media.treatment import Treatment
from dualforce.codecs.media.writing import encode_jpeg, write_video

__all__ = [
    "MediaError", "MediaInfo", "Treatment", "Video", "duration", "encode_jpeg", "iter_frames", "opened", "probe",
    "read_audio", "read_image", "read_sound", "read_video", "stored_sound", "write_video",
]  # fmt: skip

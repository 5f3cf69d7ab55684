"""Reading an ONNX file that someone else made: its bytes, once they are known to need no other file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dualforce.codecs.protocols import CodecError

MAX_BYTES = 1 << 30  # half of what the format can hold; the largest published detector has 0.1 GB


def read_onnx(file: Path, option: str) -> bytes:
    """Bytes of a network whose weights are all inside. Run these, not the file, which may change.

    An ONNX file may name other files as the place of its weights, and a reader would open them; such a file is refused.
    Raises CodecError, which names the command line's `option`, for that, a file that cannot be read or is larger than
    MAX_BYTES, another format, and without onnx (extra `faces`).
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise CodecError("onnx is not installed: pip install 'dualforce[faces]'") from error
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise CodecError(f"{option} {file}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise CodecError(f"{option} {file}: more than {MAX_BYTES} bytes: expected a detector's ONNX file")
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise CodecError(f"{option} {file}: not an ONNX file, or damaged") from error
    if not model.graph.node or not model.opset_import:  # text can pass as a message without fields
        raise CodecError(f"{option} {file}: not an ONNX file: no network in it")
    for part in _messages(model):
        if isinstance(part, onnx.TensorProto) and (part.external_data or part.data_location):
            places = [entry.value for entry in part.external_data if entry.key == "location"]
            raise CodecError(
                f"{option} {file}: weight {part.name!r} lies in another file, {', '.join(places)!r}: expected all "
                "weights inside"
            )
    return data


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all those inside it, subgraphs and attributes included."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(part)

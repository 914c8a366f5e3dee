"""One picture, one row: read and decoded, then scored. Nothing here knows of Ray."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from efficientad.archive.manifest import resolved
from efficientad.data.decoding import ImageError, naming_errors
from efficientad.fast.frame_inputs import FramePredictor, read_frame
from efficientad.results.prediction import is_anomalous
from efficientad.utils.checks import ValueRange
from efficientad.utils.files import plain_text
from efficientad.utils.prefetch import ahead

MOST_BYTES = 1 << 30  # of a picture's file
FRAME_BYTES = 64 << 20  # of decoded pictures that are handed on at once
READERS = 4  # files that are read at once by one decoder

FRAMES = pa.schema(  # beside the manifest's columns
    [
        ("frame", pa.large_binary()), ("height", pa.int32()), ("width", pa.int32()),
        ("decode_ms", pa.float32()), ("error", pa.string()),
    ]
)  # fmt: skip
RESULTS = pa.schema(  # beside the manifest's columns
    [
        ("score", pa.float64()), ("is_anomalous", pa.bool_()), ("threshold", pa.float64()),
        ("model", pa.string()), ("width", pa.int32()), ("height", pa.int32()),
        ("decode_ms", pa.float32()), ("score_ms", pa.float32()), ("error", pa.string()),
    ]
)  # fmt: skip


def decoded(
    pictures: pa.Table, root: str, value_range: ValueRange | None = None
) -> Iterator[pa.Table]:
    """The pictures of manifest rows, decoded as `predict` does, some at a time.

    A picture that cannot be read or decoded has an `error` in the place of its frame.

    Args:
        pictures: rows of a `Manifest`. root: its root. value_range: the detector's.

    Yields:
        The rows with the columns FRAMES, in their order; `frame` is uint8 (height, width, 3).
    """
    paths = pictures["path"].to_pylist()
    made: list[dict[str, Any]] = []
    first = size = 0
    loaded = ahead(lambda path: _timed_bytes(path, root), paths, workers=READERS, depth=2 * READERS)
    for place, (data, seconds) in enumerate(loaded):
        made.append(_frame(data, seconds, value_range))
        size += len(made[-1]["frame"] or b"")
        if size >= FRAME_BYTES or place + 1 == len(paths):
            rows = pictures.slice(first, len(made))
            yield _beside(rows, pa.Table.from_pylist(made, FRAMES))
            first, size, made = place + 1, 0, []


def scored(frames: pa.Table, predictor: FramePredictor, model: str) -> pa.Table:
    """The verdicts of decoded pictures.

    Args:
        frames: rows of `decoded`. predictor: a FastPredictor. model: its detector's digest.

    Returns:
        The rows with the columns RESULTS in place of FRAMES. Without a verdict `error` says why.
    """
    rows = []
    height, width = frames["height"].to_pylist(), frames["width"].to_pylist()
    errors, values = frames["error"].to_pylist(), _bytes_of(frames["frame"])
    good = [i for i, error in enumerate(errors) if error is None]
    pixels = [values[i].reshape(height[i], width[i], 3) for i in good]
    found = dict(zip(good, _scores(predictor, pixels), strict=True))
    for i, milliseconds in enumerate(frames["decode_ms"].to_pylist()):
        score, took, problem = found.get(i, (None, None, errors[i]))
        rows.append(
            {
                "score": score,
                "is_anomalous": None if score is None else is_anomalous(score, predictor.threshold),
                "threshold": predictor.threshold,
                "model": model,
                "width": width[i],
                "height": height[i],
                "decode_ms": milliseconds,
                "score_ms": took,
                "error": problem,
            }
        )
    kept = [name for name in frames.column_names if name not in FRAMES.names]
    return _beside(frames.select(kept), pa.Table.from_pylist(rows, RESULTS))


def picture_bytes(path: str, root: str) -> bytes:
    """A picture's file, from a path or a URL. Raises ImageError for whatever goes wrong."""
    place = resolved(path, root)
    with naming_errors(path):
        if "://" in place:
            import fsspec

            opened = fsspec.open(place, "rb")
        else:
            opened = open(place, "rb")
        with opened as stream:
            data = stream.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"its file has more than {MOST_BYTES >> 20} MiB")
    return data


def _timed_bytes(path: str, root: str) -> tuple[bytes | str, float]:
    """The file, or why there is none, and the seconds that it took."""
    start = time.perf_counter()
    try:
        data: bytes | str = picture_bytes(path, root)
    except ImageError as error:
        data = error.reason
    except MemoryError:
        data = "there is no memory for its file"
    return data, time.perf_counter() - start


def _frame(data: bytes | str, seconds: float, value_range: ValueRange | None) -> dict[str, Any]:
    """The columns FRAMES of one picture."""
    row: dict[str, Any] = dict.fromkeys(FRAMES.names)
    start = time.perf_counter()
    if isinstance(data, str):
        row["error"] = plain_text(data)
    else:
        try:
            frame = np.asarray(read_frame(data, value_range))
            row |= {"height": frame.shape[0], "width": frame.shape[1], "frame": frame.tobytes()}
        except ImageError as error:
            row["error"] = plain_text(error.reason)
        except MemoryError:
            row["error"] = "there is no memory for its pixels"
    return row | {"decode_ms": 1e3 * (seconds + time.perf_counter() - start)}


def _bytes_of(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The bytes of each value of a column `frame` as uint8, not copied; none of a null."""
    found = []
    for chunk in column.chunks:
        _, places, data = chunk.buffers()
        ends = np.frombuffer(places, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        values = np.empty(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
        found += [values[start:end] for start, end in itertools.pairwise(ends.tolist())]
    return found


def _scores(
    predictor: FramePredictor, frames: list[np.ndarray]
) -> list[tuple[float | None, float, str | None]]:
    """(score, milliseconds, error) of each frame; one that cannot be computed fails alone."""
    if not frames:
        return []
    start = time.perf_counter()
    try:
        found = predictor.predict_frames(frames, map_size=None, batched=True).cpu()
    except ValueError as error:
        if len(frames) > 1:
            return [_scores(predictor, [frame])[0] for frame in frames]
        return [(None, 1e3 * (time.perf_counter() - start), plain_text(error))]
    each = 1e3 * (time.perf_counter() - start) / len(frames)
    return [(float(score), each, None) for score in found.score]


def _beside(left: pa.Table, right: pa.Table) -> pa.Table:
    return pa.table(
        [*left.columns, *right.columns], schema=pa.schema([*left.schema, *right.schema])
    )

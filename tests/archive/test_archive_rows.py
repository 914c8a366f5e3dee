"""One picture, one row: the same verdict as from `predict`, and a reason where there is none."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="an archive needs the extra efficientad[archive]")

import pyarrow as pa
from helpers_archive import Mean
from PIL import Image

from efficientad.archive import rows
from efficientad.archive.rows import FRAMES, RESULTS, decoded, scored
from efficientad.data.decoding import read_image


def judging(threshold: float | None) -> Mean:
    predictor = Mean()
    predictor.threshold = threshold
    return predictor


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for i, size in enumerate(((40, 50, 3), (300, 200, 3), (64, 64))):
        Image.fromarray(generator.integers(0, 256, size, np.uint8)).save(tmp_path / f"{i}.png")
    deep = Image.fromarray((generator.integers(0, 4096, (32, 32))).astype(np.uint16))
    deep.save(tmp_path / "deep.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:900])
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


def table(*paths: str, **more):
    return pa.table({"id": np.arange(len(paths)), "path": list(paths), **more})


def frames_of(found) -> list[np.ndarray]:
    return [
        np.frombuffer(row["frame"], np.uint8).reshape(row["height"], row["width"], 3)
        for row in found.to_pylist()
    ]


def test_pictures_are_decoded_as_predict_does(folder):
    names = ["0.png", "1.png", "2.png", "deep.png"]
    for value_range in (None, (0.0, 4095.0)):
        (found,) = decoded(table(*names), str(folder), value_range)
        assert found.schema == pa.schema([("id", pa.int64()), ("path", pa.string()), *FRAMES])
        for frame, name in zip(frames_of(found), names, strict=True):
            np.testing.assert_array_equal(frame, read_image(folder / name, value_range))
        assert all(value >= 0 for value in found["decode_ms"].to_pylist())


def test_a_url_is_read_through_fsspec(folder):
    import fsspec

    with fsspec.open("memory://pictures/0.png", "wb") as file:
        file.write((folder / "0.png").read_bytes())
    (found,) = decoded(table("memory://pictures/0.png"), "/nowhere")
    np.testing.assert_array_equal(frames_of(found)[0], read_image(folder / "0.png"))


def test_what_cannot_be_read_is_a_row_with_its_reason(folder, monkeypatch):
    monkeypatch.setenv("EFFICIENTAD_MAX_MEGAPIXELS", "0.05")
    names = ["0.png", "gone.png", "cut.png", "text.png", "1.png", ".", "memory://no.png", "2.png"]
    (found,) = decoded(table(*names), str(folder))
    errors = found["error"].to_pylist()
    assert [error is None for error in errors] == [name in ("0.png", "2.png") for name in names]
    for place, reason in (
        (1, "no such file"), (2, "truncated"), (3, "it is a text"),
        (4, "the limit is 0.05"), (5, "a folder"), (6, "no such file"),
    ):  # fmt: skip
        assert reason in errors[place]
    result = scored(found, Mean(), "digest").to_pylist()
    assert [row["id"] for row in result] == list(range(8))
    assert [row["error"] for row in result] == errors
    for row in result:
        if row["error"] is not None:
            assert row["score"] is row["is_anomalous"] is row["score_ms"] is row["width"] is None
        else:
            assert row["score"] is not None


def test_too_large_a_file_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(rows, "MOST_BYTES", 1 << 20)
    (folder / "large.png").write_bytes(bytes((1 << 20) + 1))
    (found,) = decoded(table("large.png", "0.png"), str(folder))
    assert found["error"].to_pylist() == ["its file has more than 1 MiB", None]


def test_decoded_pictures_are_handed_on_some_at_a_time(folder, monkeypatch):
    monkeypatch.setattr(rows, "FRAME_BYTES", 40 * 50 * 3 + 1)
    found = list(decoded(table(*["0.png"] * 5, label=list("abcde")), str(folder)))
    assert [part["id"].to_pylist() for part in found] == [[0, 1], [2, 3], [4]]
    assert [part["label"].to_pylist() for part in found] == [["a", "b"], ["c", "d"], ["e"]]


def test_scores_and_verdicts_are_the_predictors(folder):
    names = ["0.png", "1.png", "2.png"]
    (found,) = decoded(table(*names, label=[1, 0, 1]), str(folder))
    result = scored(found, Mean(), "digest")
    kept = [("id", pa.int64()), ("path", pa.string()), ("label", pa.int64())]
    assert result.schema == pa.schema([*kept, *RESULTS])
    alone = [float(np.float32(read_image(folder / name).mean())) for name in names]
    assert result["score"].to_pylist() == alone
    middle = sorted(alone)[1]
    verdicts = scored(found, judging(middle), "digest")
    assert verdicts["is_anomalous"].to_pylist() == [score > middle for score in alone]
    assert set(verdicts["threshold"].to_pylist()) == {middle}
    assert set(result["model"].to_pylist()) == {"digest"}
    assert list(zip(*(result[c].to_pylist() for c in ("width", "height")), strict=True)) == [
        (50, 40), (200, 300), (64, 64),
    ]  # fmt: skip


class Odd(Mean):
    """Has no number for black pictures, and cannot compute white ones."""

    def predict_frames(self, frames, **options):
        if any(frame.max() == 255 for frame in frames):
            raise ValueError("too white")
        super().predict_frames(frames, **options)
        self.score[self.score == 0] = math.nan
        return self


def test_one_that_cannot_be_computed_fails_alone_and_nan_is_anomalous(tmp_path):
    for name, value in (("black", 0), ("grey", 7), ("white", 255)):
        Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(tmp_path / f"{name}.png")
    names = ["white.png", "black.png", "grey.png", "white.png"]
    (found,) = decoded(table(*names), str(tmp_path))
    result = scored(found, Odd(), "digest").to_pylist()
    assert [row["error"] for row in result] == ["too white", None, None, "too white"]
    assert [row["is_anomalous"] for row in result] == [None, True, False, None]
    assert math.isnan(result[1]["score"])
    assert result[0]["width"] == 4


def test_without_a_threshold_there_is_a_score_and_no_verdict(folder):
    (found,) = decoded(table("0.png"), str(folder))
    (row,) = scored(found, judging(None), "digest").to_pylist()
    assert row["score"] is not None
    assert row["is_anomalous"] is row["threshold"] is None


def test_frames_are_not_copied_out_of_the_table(folder):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), 3).save(stream, "PNG")
    (folder / "one.png").write_bytes(stream.getvalue())
    (found,) = decoded(table("one.png"), str(folder))
    address = found["frame"].chunk(0).buffers()[2].address
    seen = []

    class Looks(Mean):
        def predict_frames(self, frames, **options):
            seen.append(frames[0].__array_interface__["data"][0])
            return super().predict_frames(frames, **options)

    scored(found, Looks(), "digest")
    assert seen == [address]

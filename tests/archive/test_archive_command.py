"""`efficientad archive` around its cluster: what is checked before, what is said and left after."""

from __future__ import annotations

import json
import sys
import types

import pytest

pytest.importorskip("ray", reason="an archive needs the extra efficientad[archive]")

import pyarrow as pa
from helpers_archive import light_detector
from PIL import Image
from pyarrow import parquet as pq

import efficientad as ead
from efficientad.archive import running
from efficientad.archive.cluster import OWN, Processes, processes
from efficientad.archive.output import Summary
from efficientad.archive.rows import RESULTS
from efficientad.archive.running import Running, WorkerError, archive, reason_of
from efficientad.cli import archive as command
from efficientad.cli import main as command_line
from efficientad.data.opening import LIMIT


@pytest.fixture(scope="module")
def detector():
    return light_detector()


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"path": [f"{i}.png" for i in range(6)]}), path)
    return path


class Cluster:
    """In the place of the cluster: writes a row for each id that the checkpoint lacks."""

    def __init__(self, most: int = 100, failed: tuple[int, ...] = (), error=None) -> None:
        self.most, self.failed, self.error = most, failed, error
        self.asked: list[int] = []

    def __call__(self, places, manifest, detector, digest, how) -> None:
        done = {i for f in places.checkpoint.iterdir() for i in pq.read_table(f)["id"].to_pylist()}
        table = pq.read_table(places.manifest)
        left = [row for row in table.to_pylist() if row["id"] not in done]
        self.asked.append(len(left))
        rows = [
            row
            | dict.fromkeys(RESULTS.names)
            | ({"error": "why"} if row["id"] in self.failed else {"is_anomalous": row["id"] == 1})
            for row in left[: self.most]
        ]
        if rows:
            schema = pa.schema([*table.schema, *RESULTS])
            name = places.rows / f"{len(self.asked)}-{left[0]['id']}.parquet"
            pq.write_table(pa.Table.from_pylist(rows, schema), name)
        if self.error is not None:
            raise self.error


@pytest.fixture
def cluster(monkeypatch):
    def put(*arguments, **options) -> Cluster:
        made = Cluster(*arguments, **options)
        monkeypatch.setattr(running, "_compute", made)
        return made

    return put


def test_a_run_goes_on_where_it_was_stopped(cluster, detector, manifest, tmp_path):
    out, stopped = tmp_path / "out", []
    put = cluster(most=4, failed=(2,), error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        archive(manifest, detector, "abc", out, stopped=stopped.append)
    assert stopped == [Summary(6, 3, 1, 2, 1, 0, 0)]
    put.error = None
    assert archive(manifest, detector, "abc", out) == Summary(6, 5, 1, 0, 1, 4, 0)
    assert put.asked == [6, 2]
    assert archive(manifest, detector, "abc", out) == Summary(6, 5, 1, 0, 1, 6, 0)
    assert put.asked == [6, 2]  # nothing left, no cluster
    put.failed = ()
    assert archive(manifest, detector, "abc", out, retry_failed=True) == Summary(
        6, 6, 0, 0, 1, 5, 0
    )
    assert put.asked == [6, 2, 1]


def test_a_manifest_that_grew_is_gone_on_with(cluster, detector, manifest, tmp_path):
    put = cluster()
    archive(manifest, detector, "abc", tmp_path / "out")
    pq.write_table(pa.table({"path": [f"{i}.png" for i in range(8)]}), manifest)
    assert archive(manifest, detector, "abc", tmp_path / "out").scored == 8
    assert put.asked == [6, 2]
    pq.write_table(pa.table({"path": ["new.png", "1.png"]}), manifest)
    with pytest.raises(ValueError, match=r"another path, id 0 as 0\.png and not new\.png"):
        archive(manifest, detector, "abc", tmp_path / "out")


def test_another_model_is_refused_and_changes_nothing(cluster, detector, manifest, tmp_path):
    put = cluster()
    archive(manifest, detector, "abc", tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"of other settings: model abc \(now def\)"):
        archive(manifest, detector, "def", tmp_path / "out")
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert put.asked == [6]


def test_what_is_wrong_leaves_no_folder(cluster, detector, manifest, tmp_path):
    put = cluster()
    pq.write_table(pa.table({"id": [1, 1], "path": ["a", "b"]}), manifest)
    with pytest.raises(ValueError, match="1 values that occurred before"):
        archive(manifest, detector, "abc", tmp_path / "out")
    with pytest.raises(ead.UncalibratedError):
        archive(manifest, ead.EfficientAD("S"), "abc", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert put.asked == []


def test_progress_is_told_by_the_files(detector, manifest, tmp_path, monkeypatch):
    told = []

    def slow(places, *others):
        put(places, *others)
        while not told:
            pass

    put = Cluster(most=5)
    monkeypatch.setattr(running, "_compute", slow)
    monkeypatch.setattr(running, "_SECONDS", 0.01)
    archive(manifest, detector, "abc", tmp_path / "out", progress=lambda *now: told.append(now))
    assert told[0] == (5, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:1"}, "device is 'cuda:1'; it must be one of auto, cpu, cuda"),
        ({"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'; it must be auto, float32"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"dtype": "float16", "device": "cpu"}, "dtype is float16 and the device a CPU"),
        ({"batch_size": 0}, "batch_size is 0; it must be an integer >= 1"),
        ({"workers": 0}, "workers is 0"),
        ({"scorers": -1}, "scorers is -1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Running(**options)


@pytest.mark.parametrize(
    ("has", "share"),
    [
        ((4, 0), (1, 1, 1, 0)),
        ((5, 0), (1, 1, 2, 0)),  # what is started on two cores: the scoring has them both
        ((4, 0, 1, 1), (1, 1, 1, 0)),
        ((18, 0), (2, 4, 3, 0)),
        ((66, 0), (8, 14, 4, 0)),
        ((18, 1), (8, 1, 1, 1)),
        ((8, 4), (2, 4, 1, 1)),
        ((18, 2, 3, 1), (3, 1, 1, 1)),
        ((10, 0, 2, 6), (2, 6, 1, 0)),
    ],
)
def test_a_cluster_is_shared_out(has, share):
    found = processes(*has)
    assert found == Processes(*share)
    assert found.decoders + found.scorers * found.scorer_cpus + OWN <= has[0]


@pytest.mark.parametrize(
    ("has", "message"),
    [
        ((3, 0), "1 decoding and 1 scoring processes need 4 CPUs, 2 of them for Ray"),
        ((8, 0, 5, 2), "need 9 CPUs"),
        ((8, 1, 1, 2), "scorers is 2; the cluster has 1 GPUs"),
    ],
)
def test_too_small_a_cluster_is_refused(has, message):
    with pytest.raises(ValueError, match=message):
        processes(*has)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "The actor died: \x1b[36mray::X()\n  File x\nValueError: dtype is x",
            "ValueError: dtype is x",
        ),
        (
            'ray::X()\n  File "rows.py", line 1\nRuntimeError: no memory\nmore\n\n'
            "The above exception was the direct cause of the following exception:\n\n"
            "ray.exceptions.UserCodeException: UDF failed",
            "RuntimeError: no memory",
        ),
        ("The node died\nwith all it had", "with all it had"),
        ("", "no reason given"),
    ],
)
def test_the_reason_is_taken_out_of_rays_traceback(text, reason):
    assert reason_of(text) == reason


def test_the_limit_of_pixels_goes_along(tmp_path, monkeypatch):
    from efficientad.archive.pipeline import Decoder

    monkeypatch.setenv(LIMIT, "300")  # and is put back afterwards
    Image.new("RGB", (400, 100)).save(tmp_path / "0.png")
    rows = pa.table({"id": [0], "path": ["0.png"]})
    for limit, refused in (("0.01", True), ("1", False)):
        (found,) = Decoder(str(tmp_path), None, limit)(rows)
        assert (found["error"][0].as_py() is not None) == refused


# ---- the command -----------------------------------------------------------------------------


@pytest.fixture
def run(detector, manifest, tmp_path, monkeypatch):
    """Runs the command on the manifest and the detector."""
    model = tmp_path / "plate.safetensors"
    model.write_bytes(b"a detector")
    monkeypatch.setattr(command, "load_detector", lambda path, device: detector)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def call(*words: str) -> int:
        arguments = ["archive", manifest, model, "--out", tmp_path / "out", *words]
        return command_line.main([str(word) for word in arguments])

    return call


def test_the_sums_are_printed_and_give_the_exit_code(run, cluster, capsys, tmp_path):
    put = cluster(failed=(2, 3))
    assert run() == 1
    printed = capsys.readouterr().out
    assert "6 pictures = 4 scored + 2 failed\n1 anomalous\n" in printed
    assert f"rows: {tmp_path / 'out' / 'rows'}" in printed
    put.failed = ()
    assert run("--retry-failed") == 0
    assert (
        "6 pictures = 6 scored + 0 failed; 4 of them were there before" in capsys.readouterr().out
    )
    assert run("--fail-on-anomaly") == 3
    settings = json.loads((tmp_path / "out" / "archive.json").read_text())["settings"]
    assert settings["threshold"] == 100
    assert len(settings["model"]) == 64


def test_ctrl_c_says_what_is_left(run, cluster, capsys):
    put = cluster(most=2, error=KeyboardInterrupt())
    assert run() == 130
    said = capsys.readouterr()
    assert "6 pictures = 2 scored + 0 failed + 4 left" in said.out
    assert "the same command again goes on with those left" in said.out
    assert said.err == "efficientad archive: stopped\n"
    put.error, put.most = None, 100
    assert run() == 0


def test_a_cluster_that_fails_is_an_error_not_a_traceback(run, cluster, capsys):
    cluster(most=2, error=WorkerError("the processes of the cluster failed: no space left"))
    assert run() == 2
    assert capsys.readouterr().err.endswith(
        "archive: error: the processes of the cluster failed: no space left\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--threshold", "nan"), "--threshold is nan"),
        (("--device", "cuda:0"), "device is 'cuda:0'"),
        (("--workers", "0"), "workers is 0"),
    ],
)
def test_wrong_usage_is_named_and_leaves_nothing(run, cluster, capsys, tmp_path, words, message):
    put = cluster()
    assert run(*words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert put.asked == []


def test_verdicts_need_a_threshold(run, cluster, capsys, monkeypatch, detector):
    cluster()
    bare = types.SimpleNamespace(calibrated=True, threshold=None, score="max")
    monkeypatch.setattr(command, "load_detector", lambda path, device: bare)
    assert run("--fail-on-anomaly") == 2
    assert "--fail-on-anomaly needs a threshold" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["ray.data", "pyarrow", "fsspec"])
def test_a_missing_extra_is_named(run, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert run() == 2
    assert f"archive needs {package}: pip install 'efficientad[archive]'" in capsys.readouterr().err

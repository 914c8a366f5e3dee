"""Contenders in processes of their own: what is asked of them, and what a row says of each."""

from __future__ import annotations

import json
import os
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_timing import thin_networks

from bench import record
from bench.predictor import peers, peers_packages, peers_torch, prepared, processes, worker
from bench.predictor.prepared import prepare, read_pictures
from bench.predictor.processes import AUTO, Failed, options_of
from bench.predictor.worker import Built, Worker
from bench.report.processes import processes_table
from efficientad.benchmark.contenders import as_images, reference
from efficientad.checkpoint.native_file import save
from efficientad.model.synthetic import frames, random_detector

FLOAT, PEER = "FastPredictor float32", "onnxruntime"
MS = {AUTO: 10.0, FLOAT: 20.0, PEER: 40.0}  # of the stubs' calls


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What `prepare` leaves, of a detector with random weights, and all verdicts in doubt."""
    path = tmp_path_factory.mktemp("prepared")
    pictures = frames(3)
    with thin_networks():
        detector = random_detector()
        scores, maps = reference(detector, pictures)
        detector.threshold = float(scores.median())
        save(detector, path / "S.safetensors")
        arrays = {"scores": scores.numpy(), "maps": maps.numpy(), "good": frames(2, seed=1)}
        arrays["threshold"] = detector.threshold
        np.savez(path / "S.npz", frames=pictures, **arrays)
    return path


@pytest.fixture
def folder(made):
    """The same, while networks are as thin as its detector's."""
    with thin_networks():
        yield made


class Stub:
    """A contender without a process: its scores are float32's and `shift`, its calls take MS."""

    shift, busy, broken, dtype = 0.0, 1.0, None, "float32"
    log: list = []  # noqa: RUF012

    def __init__(self, name, folder, threads):
        self.name, self.folder, self.alive = name, folder, True
        self.log.append((name, "start"))

    def ask(self, method, *arguments):
        self.log.append((self.name, method, *arguments))
        if self.broken == (self.name, method):
            self.alive = False
            raise Failed("failed: RuntimeError: no memory")
        if method == "time":
            return [MS[self.name] * self.busy] * arguments[0]
        known = read_pictures(self.folder, arguments[0], arguments[2])
        shift = self.shift if self.name == PEER else 0.0
        scores, maps = known.scores.numpy() + shift, known.maps.numpy()
        return Built(self.dtype, "stub", 0.1, None, scores, maps)

    def end(self):
        self.log.append((self.name, "end"))


@pytest.fixture
def stubs(monkeypatch):
    monkeypatch.setattr(processes, "Contender", Stub)
    monkeypatch.setattr(processes, "PAUSE", 0.0)
    monkeypatch.setattr(Stub, "log", [])
    monkeypatch.setattr(record, "about", lambda device: {"device": device})
    return Stub


def measured(folder, *more, contenders=(AUTO, FLOAT, PEER)):
    """The rows by contender, of S at batch 2."""
    options = options_of([
        "--folder", str(folder), "--sizes", "S", "--batches", "2", "--seconds", "0.1",
        "--rounds", "2", "--pictures", "3", "--busy", "0", "--contenders", *contenders, *more,
    ])  # fmt: skip
    measurement = processes.Measurement(options)
    measurement.run()
    return {row["name"]: row for row in measurement.rows.values()}


def test_every_contender_is_measured_alone_and_then_in_turn(folder, stubs, tmp_path):
    rows = measured(folder, "--json", str(tmp_path / "found.json"))
    assert [rows[name]["p50_ms"] for name in MS] == list(MS.values())
    assert [rows[name]["alone_ms"] for name in MS] == list(MS.values())
    assert [rows[name]["ratio"] for name in MS] == [1.0, 2.0, 4.0]
    assert all(row["among_ratio"] == 1 and row["no_time"] is None for row in rows.values())
    assert all(row["flips"] == 0 and row["map_error"] == 0 for row in rows.values())
    # Nobody else is there while one is alone; then all are, and a new round begins with another.
    ends = [i for i, entry in enumerate(stubs.log) if entry[1] == "end"]
    places = [stubs.log[a:b] for a, b in zip([0, *(i + 1 for i in ends)], ends, strict=False)]
    assert [{name for name, *_ in place} for place in places[:3]] == [{name} for name in MS]
    among = places[3]
    assert [entry[1] for entry in among[:3]] == ["start"] * 3
    turns = [entry[0] for entry in among if entry[1] == "time"]
    assert turns == [AUTO, FLOAT, PEER, AUTO, FLOAT, PEER, FLOAT, PEER, AUTO]
    found = record.read(tmp_path / "found.json")
    assert [row["key"] for row in found["rows"]] == [f"process/S/256/b2/{name}" for name in MS]
    assert found["about"]["waiting"]["OMP_WAIT_POLICY"] == "PASSIVE"


def test_calls_follow_the_pace_and_short_ones_settle(folder, stubs):
    measured(folder, "--seconds", "1")
    blocks = [entry[2:] for entry in stubs.log if entry[:2] == (PEER, "time")]
    assert blocks == [(1, True), (12, True), (12, True)] * 2  # 25 calls of 40 ms in two rounds


def test_verdicts_that_turn_are_counted_and_wrong_maps_get_no_time(folder, stubs, monkeypatch):
    monkeypatch.setattr(stubs, "shift", 5e-6)  # the middle one lies on the threshold
    rows = measured(folder)
    assert rows[PEER]["flips"] == 1
    assert 0 < rows[PEER]["score_error"] < 1e-4
    monkeypatch.setattr(stubs, "shift", 1.0)
    rows = measured(folder)
    assert rows[PEER]["no_time"].startswith("wrong: ")
    assert rows[PEER]["wrong"] is True
    assert rows[PEER]["p50_ms"] is None
    assert rows[FLOAT]["ratio"] == 2.0
    monkeypatch.setattr(stubs, "dtype", "int8")  # whose error stands beside its time
    row = measured(folder)[PEER]
    assert row["score_error"] > 0.1
    assert (row["p50_ms"], row["no_time"]) == (40.0, None)
    monkeypatch.setattr(stubs, "shift", np.nan)
    assert measured(folder)[PEER]["no_time"] == "wrong: values that are not finite"


@pytest.mark.parametrize("method", ["build", "time"])
def test_a_contender_that_fails_is_a_row_with_its_error(method, folder, stubs, monkeypatch):
    monkeypatch.setattr(stubs, "broken", (PEER, method))
    rows = measured(folder)
    assert rows[PEER]["no_time"] == "failed: RuntimeError: no memory"
    assert rows[PEER]["p50_ms"] is None
    assert rows[FLOAT]["ratio"] == 2.0
    starts = [name for name, *what in stubs.log if what == ["start"]]
    assert starts == [AUTO, FLOAT, PEER, AUTO, FLOAT]


def test_one_that_fails_among_its_peers_keeps_its_time_alone(folder, stubs, monkeypatch):
    class Later(Stub):
        def ask(self, method, *arguments):
            if self.name == PEER and method == "build" and arguments[2] == 1:
                raise Failed("failed: its process ended with exit code -9")
            return super().ask(method, *arguments)

    monkeypatch.setattr(processes, "Contender", Later)
    row = measured(folder)[PEER]
    assert (row["alone_ms"], row["p50_ms"]) == (40.0, None)
    assert row["no_time"] == "failed: its process ended with exit code -9"


def test_loaded_cores_are_a_ratio_and_left_out_after_the_budget(folder, stubs, monkeypatch):
    class Spinning:
        def __init__(self, cores):
            assert cores == 1

        def __enter__(self):
            stubs.busy = 3.0

        def __exit__(self, *_):
            stubs.busy = 1.0

    monkeypatch.setattr(processes, "spinning", Spinning)
    more = ("--busy", "1", "--busy-batches")
    rows = measured(folder, *more, "2")
    assert [rows[name]["busy_ratio"] for name in MS] == [3.0] * 3
    assert rows[PEER]["p50_ms"] == 40.0
    assert measured(folder, *more, "1")[PEER]["busy_ratio"] is None
    assert measured(folder, *more, "2", "--budget", "-1")[PEER]["busy_ratio"] is None


def test_spinning_processes_end():
    before = os.sched_getaffinity(0)
    with processes.spinning(1):
        spinners = children()
        assert [os.sched_getaffinity(pid) for pid in spinners] == [{max(before)}]
    assert not set(children()) & set(spinners)


def children() -> list[int]:
    """Processes of this one that spin."""
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in found}
    return [pid for pid, line in lines.items() if b"while True" in line]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "L"], "size is 'L'"),
        (["--batches", "0"], "batch_sizes is [0]"),
        (["--rounds", "0"], "rounds is 0; it must be at least 1"),
        (["--seconds", "0"], "seconds is 0.0; it must be more than 0"),
        (["--pictures", "99"], "pictures is 99; it must be at most 16"),
        (["--contenders", "anomalib"], "invalid choice: 'anomalib'"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        options_of(arguments)
    assert message in capsys.readouterr().err


# ---- the worker --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "bound"), [(FLOAT, 1e-4), (AUTO, 5e-2), ("channels_last", 1e-4)])
def test_a_worker_gives_its_numbers_and_times(name, bound, folder):
    known = read_pictures(folder, "S")
    made = Worker(name, folder)
    built = made.build("S", 2, 3)
    assert built.scores.shape == (3,)
    assert np.abs(built.scores - known.scores.numpy()).max() <= bound
    assert np.abs(built.maps - known.maps.numpy()).max() <= bound * max(0.1, known.maps.max())
    assert built.dtype == ("bfloat16" if "bfloat16" in str(built.remark)[:8] else "float32")
    assert (built.remark is None) == (name == "channels_last")
    times = made.time(2, True)
    assert len(times) == 2
    assert min(times) > 0


def test_a_worker_answers_with_the_reason_and_ends_with_its_parent(folder, monkeypatch):
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(peers_torch.importlib.util, "find_spec", lambda name: None)
    messages = [("build", ("S", 1, 1)), ("build", ("M", 1, 1))]
    sent = []

    def recv():
        if not messages:
            raise EOFError
        return messages.pop(0)

    worker.serve(types.SimpleNamespace(recv=recv, send=sent.append), PEER, folder, 1)
    assert sent[0] == (False, "not installed")
    assert sent[1][0] is False
    assert "M.npz" in sent[1][1]


# ---- what is prepared --------------------------------------------------------------------------


def test_a_prepared_folder_is_made_once_and_of_one_data_set(folder, tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(prepared, "_trained", lambda dataset, size: made.append(size))
    monkeypatch.setattr(peers_torch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(prepared.peers_packages, "exported", exported := lambda *_: "")
    exported.__name__ = "exported"
    with thin_networks():
        prepare(folder, "S", None)
    assert made == []
    assert "S: quantised files: not installed" in capsys.readouterr().out
    with pytest.raises(ValueError, match="was prepared from drawn parts, and data is"):
        prepare(folder, "S", tmp_path)


def test_the_pictures_nearest_to_the_threshold_are_kept(tmp_path, monkeypatch):
    pictures = frames(4)
    with thin_networks():
        detector = random_detector()
        scores, _ = reference(detector, pictures)
        detector.threshold = float(scores.sort().values[1])
        dataset = types.SimpleNamespace(train=[], validation=[], test=[])
        monkeypatch.setattr(prepared, "_frames", lambda paths: pictures)
        monkeypatch.setattr(prepared, "PICTURES", 2)
        save(detector, tmp_path / "S.safetensors")
        prepared._choose(tmp_path, "S", dataset)
        known = read_pictures(tmp_path, "S", 2)
    nearest = (scores - detector.threshold).abs().argsort()[:2]
    assert np.array_equal(known.frames, pictures[nearest])
    assert torch.allclose(known.scores, scores[nearest])
    assert known.threshold == pytest.approx(detector.threshold)
    assert [path.name for path in tmp_path.glob("*.npz")] == ["S.npz"]


def test_a_random_teacher_keeps_the_variance():
    teacher = prepared.random_teacher("M")
    features = teacher(torch.randn(1, 3, 64, 64))
    assert 0.05 < float(features.std()) < 5
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.slow
def test_what_is_behind_the_last_convolutions_is_not_quantised(tmp_path, monkeypatch):
    """Loading NNCF takes seconds."""
    pytest.importorskip("nncf")
    library = pytest.importorskip("openvino")
    random = np.random.default_rng(0)
    ops = library.opset13
    ones, none = [1, 1], [0, 0]

    def convolved(x, channels):
        filters = random.standard_normal((4, channels, 3, 3)).astype(np.float32)
        return ops.convolution(x, ops.constant(filters), ones, none, none, ones)

    image = ops.parameter([-1, 3, 32, 32], np.float32, name="image")
    image.output(0).get_tensor().set_names({"image"})
    features = convolved(ops.relu(convolved(image, 3)), 4)
    distances = ops.multiply(ops.subtract(features, np.float32(0.5)), features)
    outputs = {
        "anomaly_map": ops.reduce_mean(distances, np.array([1])),
        "score": ops.reduce_max(distances, np.array([1, 2, 3])),
    }
    for name, output in outputs.items():
        output.output(0).get_tensor().set_names({name})
    library.save_model(library.Model(list(outputs.values()), [image]), tmp_path / "made.xml")
    monkeypatch.setattr(peers_packages, "exported", lambda *_: str(tmp_path / "made.xml"))
    good = frames(3, 32, 32)
    detector = types.SimpleNamespace(size="S", image_size=(32, 32))
    place = peers.Place(torch.device("cpu"), 2, tmp_path, good=good)
    path = peers_packages.quantised(detector, place)
    model = library.Core().read_model(path)
    readers = {
        reader.get_node().get_type_name()
        for node in model.get_ops()
        if node.get_type_name() == "FakeQuantize"
        for reader in node.output(0).get_target_inputs()
    }
    assert readers == {"Convolution"}
    exact = library.compile_model(tmp_path / "made.xml", "CPU")
    images = as_images(good)[:2]
    peer = peers.build(peers.INT8, detector, place)
    scores, maps = peer.run(peer.prepare(images))
    expected = exact({"image": images.numpy()})["anomaly_map"]
    error = np.abs(maps.numpy() - expected).max() / np.abs(expected).max()
    assert 0 < error < 0.1
    assert scores.shape == (2,)


# ---- the table ---------------------------------------------------------------------------------


def test_the_table_has_a_line_per_contender(folder, stubs, monkeypatch):
    monkeypatch.setattr(stubs, "broken", (FLOAT, "build"))
    rows = list(measured(folder).values())
    text = processes_table({"rows": json.loads(json.dumps(rows))})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert cells[2][:8] == [AUTO, "S", "2", "fp32", "10", "10.0", "0.00", "1.00 (0.0)"]
    assert cells[2][-1] == "0 of 3"
    assert cells[3][5:8] == ["failed", "-", "-"]
    assert "Among peers over alone: 1.00 to 1.00, within 5 % in 2 of 2 lines." in text


# ---- real processes ----------------------------------------------------------------------------


@pytest.mark.slow
def test_real_processes_give_rows_and_one_that_dies_is_said(tmp_path):
    """Four starts of an interpreter with torch, and networks of the real width."""
    pictures = frames(2)
    detector = random_detector()
    scores, maps = reference(detector, pictures)
    detector.threshold = float(scores[0])
    save(detector, tmp_path / "S.safetensors")
    arrays = {"scores": scores.numpy(), "maps": maps.numpy(), "good": frames(2, seed=1)}
    arrays["threshold"] = detector.threshold
    np.savez(tmp_path / "S.npz", frames=pictures, **arrays)
    rows = measured(tmp_path, contenders=(AUTO, "channels_last"))
    assert all(row["no_time"] is None and row["p50_ms"] > 0 for row in rows.values())
    contender = processes.Contender(FLOAT, tmp_path, 1)
    contender.process.kill()
    with pytest.raises(Failed, match="its process ended with exit code -9"):
        contender.ask("time", 1, False)
    assert not contender.alive

"""On a cluster of two nodes: processes die, the command dies, and each picture has one row."""

from __future__ import annotations

import collections
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray", reason="an archive needs the extra efficientad[archive]")

import pyarrow as pa
from PIL import Image
from pyarrow import parquet as pq

from efficientad.checkpoint.native_file import save
from efficientad.model.synthetic import random_detector

ROOT = Path(__file__).resolve().parents[2]
PICTURES, KINDS = 10_000, 200
PATIENCE = 1200.0  # seconds

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """Two nodes that count five CPUs each; their processes are ended, whatever a test has done."""
    from ray.cluster_utils import Cluster

    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in quiet.items():
            patch.setenv(name, value)
        node = {"num_cpus": 5, "object_store_memory": 100 << 20, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=node)
        try:
            made.add_node(num_cpus=5, object_store_memory=100 << 20)
            made.wait_for_nodes()
            yield made
        finally:
            made.shutdown()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """10,000 rows over 200 small pictures, of which one cannot be read; ids in no order."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i in range(KINDS - 1):
        pixels = generator.integers(0, 256, (8 + i % 5, 9, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / f"{KINDS - 1}.png").write_text("no picture")
    ids = generator.permutation(PICTURES) * 3 - 50
    paths = [f"{i % KINDS}.png" for i in range(PICTURES)]
    pq.write_table(pa.table({"id": ids, "path": paths}), folder / "m.parquet")
    return folder / "m.parquet"


def start(manifest: Path, out: Path, address: str) -> subprocess.Popen:
    command = [sys.executable, ROOT / "tests" / "helpers_archive.py", manifest, out, address]
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rows_written(out: Path) -> int:
    count = 0
    for file in (out / "rows").glob("*.parquet"):
        try:
            count += pq.read_metadata(file).num_rows
        except (pa.ArrowInvalid, OSError):  # not finished
            continue
    return count


def wait_for(rows: int, out: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE
    while rows_written(out) < rows:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, f"{rows_written(out)} rows after {PATIENCE} s"
        time.sleep(0.1)


def below(pids: set[int], what: str = "") -> set[int]:
    """The processes that these have started, and those of them, if their title says `what`."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().decode(errors="replace")
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rpartition(")")[2].split()[1]
            )
        except OSError:
            continue
        titles[int(folder.name)] = title
    found = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid for pid in found - pids if titles[pid] and what in titles[pid]}


def workers(cluster, what: str) -> list[int]:
    """Processes of the cluster's nodes whose title says what they do."""
    raylets = {node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()}
    return sorted(below(raylets, what))


def test_each_picture_has_one_row_whatever_is_killed(cluster, manifest, tmp_path):
    out = tmp_path / "out"
    first = start(manifest, out, cluster.address)
    try:
        wait_for(1500, out, first)
        for what in ("Scorer", "Decoder"):
            killed = workers(cluster, what)
            assert len(killed) == 2
            os.kill(killed[0], signal.SIGKILL)
        wait_for(5000, out, first)
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
    second = start(manifest, out, cluster.address)
    try:
        said, _ = second.communicate(timeout=PATIENCE)
    finally:
        second.kill()
    assert second.returncode == 0, said
    *counted, before = map(int, said.split())
    assert counted == [PICTURES, PICTURES - PICTURES // KINDS, PICTURES // KINDS, 0]
    assert 5000 <= before < PICTURES

    wanted = pq.read_table(manifest).to_pydict()
    found = pa.concat_tables(pq.read_table(f) for f in (out / "rows").glob("*.parquet"))
    times = collections.Counter(found["id"].to_pylist())
    assert set(times.values()) == {1}
    assert times.keys() == set(wanted["id"])
    paths = dict(zip(wanted["id"], wanted["path"], strict=True))
    means = {
        path.name: float(np.float32(np.asarray(Image.open(path)).mean()))
        for path in manifest.parent.glob("*.png")
        if path.name != f"{KINDS - 1}.png"
    }
    for row in found.to_pylist():
        assert row["path"] == paths[row["id"]]
        assert row["score"] == means.get(row["path"])
        assert (row["error"] is None) == (row["path"] in means)


def test_sigterm_ends_the_command_and_all_that_it_started(manifest, tmp_path):
    model = tmp_path / "plate.safetensors"
    save(random_detector(), model)
    words = ["archive", manifest, model, "--out", tmp_path / "out", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "efficientad", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
    )
    try:
        end = time.monotonic() + PATIENCE
        while not below({process.pid}, "Scorer"):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.5)
        started = below({process.pid})
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert f"{PICTURES} pictures = " in out
    assert " left" in out
    *lines, last = err.splitlines()
    assert last == "efficientad archive: stopped"
    assert [line for line in lines if not line.startswith("pictures: ")] == []
    while any(Path(f"/proc/{pid}").exists() for pid in started):
        assert time.monotonic() < end
        time.sleep(0.5)

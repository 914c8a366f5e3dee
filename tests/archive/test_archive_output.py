"""The output folder: whose it is, each row once, and sums that add up."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="an archive needs the extra efficientad[archive]")

import pyarrow as pa
from pyarrow import parquet as pq

from efficientad.archive import output
from efficientad.archive.manifest import Manifest
from efficientad.archive.rows import RESULTS

SETTINGS = {"model": "abc", "threshold": 0.5, "label": None}


def manifest(ids, numbered=False) -> Manifest:
    table = pa.table({"id": pa.array(ids, pa.int64()), "path": [f"{i}.png" for i in ids]})
    return Manifest(table, "/data", numbered)


def write(places, name, ids, failed=(), anomalous=(), **more):
    rows = [
        dict.fromkeys(RESULTS.names)
        | {"error": "why" if i in failed else None}
        | {"is_anomalous": None if i in failed else i in anomalous}
        for i in ids
    ]
    table = manifest(ids).table
    results = pa.Table.from_pylist(rows, RESULTS)
    for column in RESULTS.names:
        table = table.append_column(RESULTS.field(column), results[column])
    pq.write_table(table, places.rows / name)


@pytest.fixture
def places(tmp_path):
    with output.opened(tmp_path / "out", SETTINGS) as opened:
        yield opened


def ids_in_files(places) -> dict[str, list[int]]:
    return {f.name: pq.read_table(f)["id"].to_pylist() for f in output.row_files(places)}


def test_a_row_that_is_there_twice_is_left_once(places):
    write(places, "a.parquet", [1, 2, 3])
    write(places, "b.parquet", [3, 4, 1, 5])
    write(places, "c.parquet", [2, 2])
    write(places, "d.parquet", [7, 6, 7])
    there = output.settle(places)
    assert there["id"].to_pylist() == [1, 2, 3, 4, 5, 6, 7]
    assert ids_in_files(places) == {
        "a.parquet": [1, 2, 3], "b.parquet": [4, 5], "d.parquet": [7, 6],
    }  # fmt: skip
    assert pq.read_schema(places.rows / "b.parquet").names == ["id", "path", *RESULTS.names]
    assert output.settle(places) == there


@pytest.mark.parametrize("part", [0.0, 0.4, 0.99])
def test_a_file_that_is_cut_off_is_removed(places, part):
    write(places, "a.parquet", [1, 2])
    write(places, "b.parquet", [3])
    data = (places.rows / "a.parquet").read_bytes()
    (places.rows / "a.parquet").write_bytes(data[: int(part * len(data))])
    assert output.settle(places)["id"].to_pylist() == [3]
    assert ids_in_files(places) == {"b.parquet": [3]}


def test_an_empty_output_has_no_rows(places):
    there = output.settle(places)
    assert len(there) == 0
    output.check_paths(manifest([1]), there, places.root)
    assert output.prepare(places, manifest([1, 2]), there) == 2
    (file,) = places.checkpoint.iterdir()
    assert pq.read_table(file).to_pydict() == {"id": []}


def test_failed_rows_are_dropped_to_be_tried_again(places):
    write(places, "a.parquet", [1, 2, 3], failed=[2])
    write(places, "b.parquet", [4], failed=[4])
    assert output.settle(places)["failed"].to_pylist() == [False, True, False, True]
    assert output.settle(places, drop_failed=True)["id"].to_pylist() == [1, 3]
    assert ids_in_files(places) == {"a.parquet": [1, 3]}


def test_the_checkpoint_is_what_the_rows_say(places):
    places.checkpoint.mkdir()
    (places.checkpoint / "uuid_000000.parquet").write_text(
        "an earlier run's, of rows that are lost"
    )
    write(places, "a.parquet", [5, 1, 9])
    left = output.prepare(places, manifest([1, 2, 5]), output.settle(places))
    assert left == 1
    (file,) = places.checkpoint.iterdir()
    assert pq.read_table(file).to_pydict() == {"id": [1, 5, 9]}
    assert pq.read_table(places.manifest)["id"].to_pylist() == [1, 2, 5]


def test_an_id_stays_with_its_path(places):
    write(places, "a.parquet", [5, 1, 9])
    there = output.settle(places)
    output.check_paths(manifest([1, 2, 3, 5, 11]), there, places.root)
    other = manifest([9, 1])
    wrong = Manifest(other.table.set_column(1, "path", pa.array(["x.png", "1.png"])), "/data", True)
    message = "1 ids of the manifest .* id 9 as 9.png and not x.png; .* --out. Ids are row numbers"
    with pytest.raises(ValueError, match=message):
        output.check_paths(wrong, there, places.root)


def test_the_sums_add_up(places):
    write(places, "a.parquet", [1, 2, 3, 4], failed=[2], anomalous=[3, 4])
    whole = manifest([1, 2, 3, 5])
    there = output.settle(places)
    left = output.prepare(places, whole, there)
    found = output.summary(whole, there, left)
    assert found == output.Summary(
        pictures=4, scored=2, failed=1, missing=1, anomalous=1, before=3, others=1
    )
    assert found.pictures == found.scored + found.failed + found.missing
    write(places, "b.parquet", [5], anomalous=[5])
    found = output.summary(whole, output.settle(places), left)
    assert (found.scored, found.missing, found.anomalous, found.before) == (3, 0, 2, 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "def"}, r"other settings: model abc \(now def\); name another folder"),
        ({"threshold": 0.25}, r"threshold 0.5 \(now 0.25\)"),
        ({"label": "string"}, r"label None \(now string\)"),
    ],
)
def test_rows_of_another_model_are_not_mixed(places, change, said):
    write(places, "a.parquet", [1])
    before = (places.root / output.NAME).read_bytes()
    with pytest.raises(ValueError, match=said), output.opened(places.root, SETTINGS | change):
        pass
    assert (places.root / output.NAME).read_bytes() == before


def test_without_rows_another_model_may_have_the_folder(tmp_path):
    for settings in (SETTINGS, SETTINGS | {"model": "def"}):
        with output.opened(tmp_path, settings):
            pass
    assert json.loads((tmp_path / output.NAME).read_text())["settings"]["model"] == "def"


def test_one_run_at_a_time(tmp_path):
    out = tmp_path / "out"
    with output.opened(out, SETTINGS):
        with (
            pytest.raises(ValueError, match="another run is at work in"),
            output.opened(out, SETTINGS),
        ):
            pass
    with output.opened(out, SETTINGS):
        pass


def test_a_folder_of_something_else_is_not_written_into(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="which is a file"), output.opened(file, SETTINGS):
        pass
    with (
        pytest.raises(ValueError, match="has files in it and no"),
        output.opened(tmp_path, SETTINGS),
    ):
        pass
    for text in ("", "[]", "{}", json.dumps({"format": "efficientad-archive-9", "settings": {}})):
        (tmp_path / output.NAME).write_text(text)
        with (
            pytest.raises(ValueError, match="none of this version"),
            output.opened(tmp_path, SETTINGS),
        ):
            pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [output.NAME, "file"]


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    with output.opened(tmp_path, SETTINGS) as places:
        assert np.array_equal(output.settle(places)["id"], [])

"""What a manifest may be, and what is refused before any work begins."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="an archive needs the extra efficientad[archive]")

import pyarrow as pa
from pyarrow import parquet as pq

from efficientad.archive.manifest import ManifestError, read_manifest, resolved


def write(file, /, **columns):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)
    return file


def test_ids_of_a_manifest_are_kept(tmp_path):
    columns = {"id": pa.array([7, -3, 9], pa.int32()), "path": ["a", "b", "a"], "other": [1, 2, 3]}
    manifest = read_manifest(write(tmp_path / "m.parquet", **columns))
    assert manifest.table.to_pydict() == {"id": [7, -3, 9], "path": ["a", "b", "a"]}
    assert manifest.table.schema.types == [pa.int64(), pa.string()]
    assert manifest.ids.tolist() == [7, -3, 9]
    assert manifest.root == str(tmp_path)
    assert not manifest.numbered


def test_without_ids_rows_are_numbered_in_the_order_of_the_files_names(tmp_path):
    write(tmp_path / "day" / "b.parquet", url=["b0", "b1"])
    write(tmp_path / "day" / "a.parquet", url=["a0"])
    write(tmp_path / "day" / "c" / "0.parquet", url=["c0"])
    write(tmp_path / "day" / "_metadata.parquet", url=["never"])
    (tmp_path / "day" / "notes.txt").write_text("never")
    manifest = read_manifest(tmp_path / "day")
    assert manifest.table.to_pydict() == {"id": [0, 1, 2, 3], "path": ["a0", "b0", "b1", "c0"]}
    assert manifest.numbered
    assert manifest.root == str(tmp_path / "day")


@pytest.mark.parametrize("suffix", ["csv", "CSV"])
def test_csv_is_read_and_paths_are_text(tmp_path, suffix):
    file = tmp_path / f"m.{suffix}"
    file.write_text('label,path,id\ngood,0001,5\nbad,"a,b",6\n')
    manifest = read_manifest(str(file))
    assert manifest.table.to_pydict() == {
        "id": [5, 6], "path": ["0001", "a,b"], "label": ["good", "bad"],
    }  # fmt: skip


def test_a_manifest_may_be_a_url():
    import fsspec

    memory = fsspec.filesystem("memory")
    with memory.open("/lot/m.csv", "w") as file:
        file.write("path\nx.png\n")
    manifest = read_manifest("memory://lot/m.csv")
    assert manifest.table["path"].to_pylist() == ["x.png"]
    assert resolved("x.png", manifest.root) == "memory:///lot/x.png"
    with pytest.raises(ManifestError, match="cannot be reached"):
        read_manifest("nowhere://lot/m.csv")


@pytest.mark.parametrize(
    ("path", "root", "place"),
    [
        ("a/b.png", "/data", "/data/a/b.png"),
        ("/abs/b.png", "/data", "/abs/b.png"),
        ("s3://x/b.png", "/data", "s3://x/b.png"),
        ("b.png", "s3://x/y", "s3://x/y/b.png"),
        ("/abs/b.png", "s3://x/y", "/abs/b.png"),
    ],
)
def test_relative_paths_are_below_the_manifest(path, root, place):
    assert resolved(path, root) == place


@pytest.mark.parametrize(
    ("label", "kind"),
    [
        (["a", None], pa.string()), ([1, 2], pa.int64()), ([True, None], pa.bool_()),
        ([0.0, 1.0], pa.float64()), (pa.array(["a", "b"]).dictionary_encode(), pa.string()),
        ([None, None], pa.string()),
    ],
)  # fmt: skip
def test_labels_are_handed_on(tmp_path, label, kind):
    manifest = read_manifest(write(tmp_path / "m.parquet", path=["a", "b"], label=label))
    assert manifest.table.schema.field("label").type == kind


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"name": ["a"]}, r"has the columns name; it must have one column path, or url"),
        ({"path": ["a"], "url": ["a"]}, "has both path and url"),
        ({"path": [1]}, "column path of manifest .* is int64; it must be text"),
        ({"path": ["a", None, None, None, None]}, r"is null or empty in 4 rows \(1, 2, 3 and 1 mo"),
        ({"path": ["a", ""]}, r"column path .* is null or empty in 1 rows \(1, from 0\)"),
        ({"path": ["a", "b"], "id": [1, None]}, r"column id .* is null in 1 rows"),
        ({"path": ["a"], "id": ["1"]}, r"is string; it must be integers \(int64\)"),
        ({"path": ["a"], "id": [1.0]}, "is double; it must be integers"),
        ({"path": ["a"], "id": pa.array([2**63], pa.uint64())}, "is uint64 .*it must be integers"),
        ({"path": ["a"] * 4, "id": [5, 6, 5, 5]}, r"2 values that occurred before: 5 \(rows 0 and"),
        ({"path": pa.array([], pa.string())}, "has no row"),
        ({"path": ["a"], "label": [[1]]}, "column label .* must be text, numbers or booleans"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, columns, message):
    with pytest.raises(ManifestError, match=message):
        read_manifest(write(tmp_path / "m.parquet", **columns))


def test_what_is_no_manifest_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such manifest: .*m\.parquet"):
        read_manifest(tmp_path / "m.parquet")
    (tmp_path / "text").write_text("path\na\n")
    with pytest.raises(ManifestError, match="must be Parquet, or CSV with a name that ends in"):
        read_manifest(tmp_path / "text")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(tmp_path / "empty.csv")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ManifestError, match=r"a folder without a \.parquet file"):
        read_manifest(tmp_path / "folder")
    (tmp_path / "cut.parquet").write_bytes(
        write(tmp_path / "m.parquet", path=["a"]).read_bytes()[:-9]
    )
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(tmp_path / "cut.parquet")


def test_files_of_one_manifest_have_the_same_columns(tmp_path):
    write(tmp_path / "a.parquet", path=["a"])
    write(tmp_path / "b.parquet", path=["b"], id=[0])
    with pytest.raises(ManifestError, match="all files of a manifest must have the same"):
        read_manifest(tmp_path)


def test_many_ids_are_checked_at_once(tmp_path):
    ids = np.random.default_rng(0).permutation(100_000)
    manifest = read_manifest(write(tmp_path / "m.parquet", id=ids, path=["p"] * len(ids)))
    assert (manifest.ids == ids).all()
    ids[-1] = ids[5]
    with pytest.raises(ManifestError, match=f"{ids[5]} \\(rows 5 and 99999\\)"):
        read_manifest(write(tmp_path / "m.parquet", id=ids, path=["p"] * len(ids)))

"""The static model against counts made by hand, and against the networks and kernels it models."""

from __future__ import annotations

import re

import pytest

from bench import record, shapes
from bench.kernels import roofline
from bench.kernels.roofline import Group, Launch
from efficientad.kernels import conv, pair_distance


@pytest.mark.parametrize(
    ("size", "teacher", "student", "total", "floor"),
    [("S", 30.36, 40.22, 75.4, 95.4), ("M", 103.0, 125.5, 233.3, 295.4)],
)
def test_operations_and_floor(size, teacher, student, total, floor):
    flop = shapes.network_flop(size)
    assert flop["teacher"] / 1e9 == pytest.approx(teacher, abs=0.05)
    assert flop["student"] / 1e9 == pytest.approx(student, abs=0.05)
    assert flop["autoencoder"] / 1e9 == pytest.approx(4.79, abs=0.005)
    assert sum(flop.values()) / 1e9 == pytest.approx(total, abs=0.05)
    assert roofline.floor_us(size) == pytest.approx(floor, abs=0.05)
    # One image's launches do that work: all of it but the bottleneck's 0.002 GFLOP.
    launches = roofline.pdn_launches(size, 1) + roofline.autoencoder_launches(1)
    assert sum(launch.flop for launch in launches) == pytest.approx(sum(flop.values()), rel=1e-4)


# Counted by hand at a batch of one, PDN-S: tiles, waves, tensor us, L2 us.
BY_HAND = [
    ((Group(497, 128, 256, 64),), 3.8, 2.8, None),
    ((Group(234, 128, 256, 2048),), 1.77, 44.9, 46.6),
    ((Group(112, 128, 128, 2304),), 0.85, 12.6, 16.7),
    ((Group(220, 64, 128, 2304),), 1.67, 12.6, 24.6),
    ((Group(56, 128, 256, 2304),), 0.42, 25.2, None),
    ((Group(75, 128, 128, 8192),), 0.57, 44.9, 39.8),
    ((Group(75, 128, 128, 4672),), 0.57, 25.6, 22.7),
    ((Group(75, 128, 128, 4672), Group(75, 128, 128, 8192)), 1.14, 51.2, 62.5),
    ((Group(147, 64, 128, 8192), Group(147, 64, 128, 4672)), 2.23, 48.0, 92.0),
    ((Group(25, 128, 384, 8192), Group(25, 128, 384, 4672)), 0.38, 134.6, None),
]


@pytest.mark.parametrize(("groups", "waves", "tensor", "l2"), BY_HAND)
def test_counts_by_hand(groups, waves, tensor, l2):
    launch = Launch("", groups, 0)
    assert launch.waves == pytest.approx(waves, abs=0.05)
    assert launch.tensor_us == pytest.approx(tensor, abs=0.06)
    if l2 is not None:
        assert launch.l2_us == pytest.approx(l2, abs=0.1)


def test_tiles_come_from_the_tables(monkeypatch):
    conv1, conv2, conv3, pair = roofline.pdn_launches("S", 1)
    assert conv1.programs * conv1.groups[0].bm * conv1.groups[0].bn >= 4 * 126**2 * 256
    tile = conv.choose_tile(90, 61 * 61, (256, 256), True)
    assert (conv2.groups[0].bm, conv2.groups[0].bn) == (tile.bm, tile.bn)
    assert conv3.groups[0].k == 2304
    assert [group.k for group in pair.groups] == [8192, 4672]
    other = pair_distance.Tile(64, 96, 128, warps=4, stages=2)
    monkeypatch.setattr(pair_distance, "choose_tile", lambda *_: other)
    *_, pair = roofline.pdn_launches("S", 1)
    assert pair.programs == 2 * 49 * 4


def test_a_larger_batch_is_never_slower_per_image():
    for size in ("S", "M"):
        per_image = [
            sum(launch.larger_us for launch in roofline.pdn_launches(size, batch)) / batch
            for batch in roofline.BATCHES
        ]
        assert per_image[-1] < per_image[0]
        assert min(per_image) > 0.9 * roofline.floor_us(size)


def measured(layer: str, us: float | None, **values) -> dict:
    row = {"kind": "kernel", "size": "S", "layer": layer, "batch": 1, "dtype": "float16"}
    return row | {"backend": "triton", "small": False, "us": us} | values


def test_what_was_measured_stands_beside_the_model():
    rows = [
        measured("conv2", 93.2), measured("pair", 125.0), measured("conv3", None),
        measured("conv1", 1.0, backend="eager"), measured("conv1", 1.0, batch=32),
        measured("conv1", 1.0, small=True), measured("conv1", 1.0, kind="compiled"),
    ]  # fmt: skip
    found = {"about": {"device": "a GPU", "commit": "abc"}, "rows": rows}
    plain = roofline.report("S", [1]).splitlines()
    beside = roofline.report("S", [1], found).splitlines()
    assert "measured: a GPU, commit abc" in beside
    more = [line for line in beside if line not in plain]
    assert [line.split()[0] for line in more] == ["measured:", "kernel", "conv2", "pair+d8"]
    assert [line.split()[-2:] for line in more[2:]] == [["93.2", "2.00"], ["125.0", "2.00"]]


@pytest.mark.skipif(not record.RESULTS.is_dir(), reason="bench/results is not in the sdist")
def test_the_documents_table_is_what_the_command_prints():
    page = (record.ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```text\n(EfficientAD-S, batch 1\n.*?)```", page, re.DOTALL)
    found = record.read(record.RESULTS / "h200.json")
    for part in block.split("EfficientAD-")[1:]:
        head, *lines = part.splitlines()
        printed = roofline.report(head[0], [1], found).splitlines()
        layers = [line for line in printed if line.startswith(("  kernel", "  conv", "  pair"))]
        assert lines == layers


def test_report(capsys):
    assert roofline.main(["--size", "M", "--batch", "1", "3"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("ESTIMATE")
    assert "295.4 us per image" in text
    assert "batch 3" in text
    with pytest.raises(SystemExit):
        roofline.main(["--batch", "0"])
    assert "--batch is 0" in capsys.readouterr().err

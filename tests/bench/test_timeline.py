"""What each launch of a measured replay waited for."""

from __future__ import annotations

import helpers_bench as made

from bench.report import tables, timeline


def row(*launches: tuple[float, float, str, int], **values) -> dict:
    """(start, us, kernel, stream) each, with a grid of two programs."""
    trace = [[*launch, [2, 1, 1], 32, 1024] for launch in launches]
    return {"variant": "base", "size": "S", "batch": 1, "trace": trace} | values


# The second stream's branch is joined before the pair.
FORKED = (
    (0.0, 2.0, "_pack_kernel", 1),
    (2.5, 3.0, "_strided_conv_kernel", 1),
    (2.6, 9.0, "_first_conv_kernel", 2),
    (6.0, 4.0, "_strided_conv_kernel", 1),
    (12.0, 10.0, "_conv_kernel", 2),
    (23.0, 5.0, "_pair_distance_kernel", 1),
)


def names(found: list[timeline.Launch]) -> list[str]:
    return [launch.layer for launch in found]


def test_launches_have_their_layers_names():
    shuffled = row(*FORKED[::-1])
    assert names(timeline.launches(shuffled)) == ["pack", "e1", "conv1", "e2", "conv2", "pair"]
    assert names(timeline.launches(row((0.0, 1.0, "_new_kernel", 1)))) == ["_new_kernel"]


def test_layers_resized_apart_are_the_decoders():
    kernels = (
        *("_decode_kernel", "_resize_conv_kernel", "_resize_kernel", "_conv_kernel"),
        *("_resize_conv_kernel", "_resize_kernel", "_conv_kernel", "_autoencoder_distance_kernel"),
    )
    decoder = [(10.0 * i, 5.0, kernel, 1) for i, kernel in enumerate(kernels)]
    student = [(1.0, 2.0, "_first_conv_kernel", 2), (22.0, 9.0, "_conv_kernel", 2)]
    expected = ["d1", "conv1", "d2", "d3 resize", "conv2", "d3", "d4", "d5 resize", "d5"]
    found = names(timeline.launches(row(*decoder, *student)))
    assert found == [*expected, "autoencoder distance"]


def test_the_path_goes_through_the_branch_that_ended_last():
    path = timeline.critical_path(timeline.launches(row(*FORKED)))
    assert names(path) == ["pack", "conv1", "conv2", "pair"]
    slow = [*FORKED[:3], (6.0, 16.5, "_strided_conv_kernel", 1), *FORKED[4:]]
    path = timeline.critical_path(timeline.launches(row(*slow)))
    assert names(path) == ["pack", "e1", "e2", "pair"]


def test_what_ends_by_chance_before_another_streams_launch_is_not_on_the_path():
    """The first branch's second launch ends just before conv2, which comes right behind conv1."""
    chance = [*FORKED[:3], (6.0, 5.9, "_strided_conv_kernel", 1), *FORKED[4:]]
    path = timeline.critical_path(timeline.launches(row(*chance)))
    assert names(path) == ["pack", "conv1", "conv2", "pair"]


def test_the_table_shows_one_image_as_shipped():
    rows = [
        row(*FORKED),
        row(*FORKED, variant="pool 3"),
        row(*FORKED, batch=32),
        {"variant": "base", "size": "M", "batch": 1},  # without a trace
    ]
    text = tables.TABLES["timeline"]({"about": made.about(), "rows": rows})
    assert text.startswith(
        "EfficientAD-S, one image: 28.0 us, of which 4 launches that were waited for take 26.0 us "
        "and the gaps between them 2.00 us."
    )
    assert text.count("| pair ") == 1
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()[4:]]
    assert cells[1] == ["e1", "", "1", "2.50", "3.00", "2", "32", "1.00"]
    assert cells[4][:2] == ["conv2", "waited for"]
    assert timeline.timeline_table({"rows": rows[1:]}) == "(nothing measured)"

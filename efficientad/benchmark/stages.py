"""Where a call's time goes, stage by stage.

Each stage runs alone, on the predictor's own buffers, with its data in the caches: the sum of the
stages need not be the time of a call.

On a CPU, and for what the host does, a stage is timed by the clock. On CUDA the stages of the graph
("frame path", "networks", "map") are captured again, each as a graph that holds it REPEATS times,
and timed by events around a replay; "graph" is the predictor's own graph, replayed REPEATS times.
In front of the first event runs the same work once more, so that the device is busy while the host
submits: no launch gap is inside. The times are one repeat's.

    frame path      normalise and pack (on a CPU: resize and pack) a frame of the network's size
    networks        packed images -> distance maps
    map             distance maps -> anomaly map at input size and score
    graph           all three as the predictor runs them (CUDA): its time on the device
    copy in         frames to the device from pinned memory (CUDA)
    copy out        scores and maps to host values; on CUDA by the clock, as it waits
    resize ...      a camera frame to a packed image, on the host, and on the device (CUDA)
    decode ...      encoded bytes of a camera frame to pixels, on the host
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from efficientad.benchmark.call_times import in_turn, summary
from efficientad.benchmark.contenders import Row, row
from efficientad.benchmark.end_to_end import CAMERA, DECODES, defaults, encoded, facts
from efficientad.fast.engine import Engine
from efficientad.fast.frame_inputs import read_frame
from efficientad.fast.predictor import FastPredictor
from efficientad.fast.runners import GraphRunner
from efficientad.model.synthetic import frames as random_frames
from efficientad.utils.cuda_graphs import captured

REPEATS = 20
_SAMPLES = 50  # events, at most
_HOST_CALLS = 100  # by the clock, at most
Work = Callable[[], object]


def stages(
    predictor: FastPredictor,
    batch: int = 1,
    *,
    calls: int | None = None,
    frame_size: tuple[int, int] | None = CAMERA,
) -> list[Row]:
    """Times of the stages of one step of `batch` images, rows of kind "stage".

    Args:
        predictor: nothing else may use it meanwhile.
        batch: on CUDA one of its batch sizes, on a CPU at most the largest.
        calls: of each stage; None: `end_to_end.defaults`. At most 100 by the clock and 50 samples
            of REPEATS by events.
        frame_size: (height, width) of the camera frame of the last stages; None leaves them out.

    Raises:
        ValueError: a batch that the predictor has no buffers for.
    """
    sizes = predictor.batch_sizes
    if batch not in sizes and (predictor.device.type == "cuda" or not 1 <= batch <= sizes[-1]):
        raise ValueError(f"batch is {batch}; the predictor has buffers for {list(sizes)}")
    options = defaults(predictor.device)
    calls = options["calls"] if calls is None else calls
    engine = predictor.engine
    measure = _cpu_stages if engine.stream is None else _cuda_stages
    with engine.lock, engine.on_device(), torch.no_grad():
        found = measure(engine, batch, calls)
        if frame_size is not None:
            found |= _frame_stages(engine, frame_size, calls)
    shared = facts(predictor, None, batch)
    return [row("stage", name, **(shared | values)) for name, values in found.items()]


# ---- on a CPU --------------------------------------------------------------------------------


def _cpu_stages(engine: Engine, batch: int, calls: int) -> dict[str, Row]:
    backend, runner = engine.backend, engine.runner
    frames = random_frames(batch, *engine.image_size)
    packed = runner.packed(batch)
    result = runner.run(batch)

    def fill() -> None:
        for place, frame in zip(packed, frames, strict=True):
            engine.resize_pack(frame, place)

    def copy_out() -> None:
        result.score.clone().numpy(), result.anomaly_map.clone().numpy()

    return _by_clock(
        {
            "frame path": fill,
            "networks": partial(backend.distance_maps, packed),
            "map": partial(
                backend.anomaly_map, result.maps, engine.image_size, engine.map_padding, None
            ),
            "copy out": copy_out,
        },
        calls,
        batch,
    )


def _by_clock(functions: Mapping[str, Work], calls: int, images: int) -> dict[str, Row]:
    calls = min(calls, _HOST_CALLS)
    times = in_turn(functions, warmup=max(1, calls // 10), calls=calls, rounds=5, seconds=8.0)
    return {
        name: summary(one.rounds, images) | {"warmup": one.warmup, "timing": "clock"}
        for name, one in times.items()
    }


# ---- on CUDA ---------------------------------------------------------------------------------


def _cuda_stages(engine: Engine, batch: int, calls: int) -> dict[str, Row]:
    backend, runner, stream = engine.backend, engine.runner, engine.stream
    assert isinstance(runner, GraphRunner)  # as on every GPU, and so is a stream
    assert stream is not None
    packed, on_device = runner.packed(batch), runner.frames(batch)
    on_device.copy_(torch.from_numpy(random_frames(batch, *engine.image_size)))
    pinned = torch.empty(on_device.shape, dtype=torch.uint8, pin_memory=True)
    result = runner.run(batch, from_frames=True)
    map_st, map_ae = result.maps
    anomaly_map, score = result.anomaly_map.clone(), result.score.clone()
    maps, out = (map_st.clone(), map_ae.clone()), (anomaly_map, score)
    in_graph: dict[str, Work] = {
        "frame path": partial(backend.pack, on_device, packed, channels_last=True),
        "networks": partial(backend.distance_maps, packed),
        "map": partial(backend.anomaly_map, maps, engine.image_size, engine.map_padding, out),
    }
    launched: dict[str, Work] = {
        "graph": partial(runner.run, batch, from_frames=True),
        "copy in": partial(on_device.copy_, pinned, non_blocking=True),
    }
    works: dict[str, Work] = {name: _graph(work, stream) for name, work in in_graph.items()}
    works |= {name: partial(_repeat, work) for name, work in launched.items()}
    samples = max(1, min(calls, _SAMPLES))
    found = {name: _by_events(work, samples, batch) for name, work in works.items()}

    def copy_out() -> None:
        score.cpu().numpy(), anomaly_map.cpu().numpy()

    stream.synchronize()
    return found | _by_clock({"copy out": copy_out}, calls, batch)


def _graph(function: Work, stream: torch.cuda.Stream) -> Work:
    """The replay of a graph that holds `function` REPEATS times."""
    for _ in range(2):  # whatever is chosen or allocated at first use, outside the capture
        function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with captured(graph, stream):
        _repeat(function)
    return graph.replay


def _repeat(function: Work) -> None:
    for _ in range(REPEATS):
        function()


def _by_events(work: Work, samples: int, images: int) -> Row:
    """Times of a REPEATS-th of `work` on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for i in range(samples + 3):
        work()
        start.record()
        work()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) / REPEATS)
    return summary([times], images) | {"warmup": 3, "timing": "events", "repeats": REPEATS}


# ---- camera frames ---------------------------------------------------------------------------


def _frame_stages(engine: Engine, frame_size: tuple[int, int], calls: int) -> dict[str, Row]:
    """Resizing and decoding of a camera frame; rows of batch 1."""
    stream = engine.stream
    frame = random_frames(1, *frame_size)
    place = engine.runner.packed(1)[0]
    on_host = torch.empty(place.shape, dtype=place.dtype, pin_memory=stream is not None)
    size = f"{frame_size[1]}x{frame_size[0]}"
    functions: dict[str, Work] = {f"resize {size}": partial(engine.resize_pack, frame[0], on_host)}
    for kind in DECODES:
        functions[f"decode {kind.upper()} {size}"] = partial(read_frame, encoded(frame, kind)[0])
    found = _by_clock(functions, calls, 1)
    if stream is not None:
        there = torch.from_numpy(frame[0]).to(engine.device)
        work = _graph(partial(engine.resize_pack, there, place), stream)
        samples = max(1, min(calls, _SAMPLES))
        found[f"resize {size} on the device"] = _by_events(work, samples, 1)
    extra = {"batch": 1, "frame_size": list(frame_size)}
    return {name: values | extra for name, values in found.items()}

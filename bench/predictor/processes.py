"""The predictor and its peers on a CPU, each in a process of its own, in turn.

    python -m bench.predictor.processes --data mvtec/screw --json bench/results/predictor_cpu.json
    python -m bench.predictor.processes --quick                     # does it run at all

Runtimes in one process disturb each other: their threads wait for work by spinning. Here each
contender has its own process, which waits in a read between its turns, and its runtime's threads
are told to sleep while they wait (PARKED, and onnxruntime's own option). What is measured, per
network and batch:

- alone, before the other processes exist; and the contender's scores and maps of the pictures whose
  scores lie nearest to the threshold, against the plain float32 detector's: errors, and verdicts
  that turned (`flips`). Float32 that is wrong gets no time, nor does what is no number; what a
  lower precision costs stands beside its time.
- among peers: all processes are there, ready, and take turns, a block of calls in each of several
  rounds. `p50_ms` is of these, `ratio` how many times as long as the predictor's own choice of
  dtype takes, by the rounds' medians, `among_ratio` is p50_ms over `alone_ms`.
- with cores loaded by processes that spin (`--busy`), again in turn: `busy_ratio` is that time over
  the quiet one.

Detectors and pictures are made once and kept in --folder (`bench.predictor.prepared`): some
minutes, before anything is timed. The results file is written after each contender and each round
of turns, so that a run that ends early leaves what it has.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.predictor import peers
from bench.predictor.prepared import PICTURES, SIDE, Pictures, prepare, read_pictures
from bench.predictor.worker import OURS, Built, serve
from bench.record import Row
from efficientad.benchmark.call_times import ratio, summary
from efficientad.benchmark.contenders import ACCURACY, HEAD, accuracy, line, row
from efficientad.benchmark.end_to_end import check_batch_sizes
from efficientad.model.networks import check_model_size
from efficientad.results.prediction import is_anomalous

PARKED = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
AUTO = OURS + "auto"
CONTENDERS = (AUTO, OURS + "float32", OURS + "bfloat16", "channels_last bfloat16",
              "OpenVINO bfloat16", peers.INT8, "onnxruntime")  # fmt: skip
KNOWN = (*CONTENDERS[:3], *(name for name in peers.PROCESSES if name != "anomalib"))
PAUSE = 0.05  # seconds before a turn: whoever had the last one sleeps then
PATIENCE = 300.0  # seconds for an answer; torch.compile takes a minute and more
MOST = 40  # calls of a contender
SETTLED = 500.0  # milliseconds of a call from which a block begins without one that is not counted
Configuration = tuple[str, int]  # size, batch


class Failed(Exception):
    """A contender that gives no answer, or has none; the message says why."""


class Contender:
    """A worker's process, seen from here."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, folder, threads))
        self.process.start()
        theirs.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        """The worker's answer. Failed: it has none, or none came; then its process is ended."""
        try:
            self._connection.send((method, arguments))
            if not self._connection.poll(PATIENCE):
                self.end()
                raise Failed(f"failed: no answer in {PATIENCE:.0f} s")
            good, answer = self._connection.recv()
        except (EOFError, OSError):
            self.end()
            raise Failed(
                f"failed: its process ended with exit code {self.process.exitcode}"
            ) from None
        if not good:
            raise Failed(answer)
        return answer

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def end(self) -> None:
        """End the process; again does nothing."""
        self._connection.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class Measurement:
    """All rows, and how they are filled."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rows: dict[tuple[str, Configuration], Row] = {}
        self.about = record.about("cpu") | {"waiting": PARKED, "busy": options.busy}
        self.about |= {"pictures": options.pictures, "left_out": []}
        self._known: dict[str, Pictures] = {}
        self._end = time.monotonic() + options.budget
        self.configurations = list(itertools.product(options.sizes, options.batches))

    def run(self) -> None:
        for name in self.options.contenders:
            self._alone(name)
        field = {}
        try:
            for name in self.options.contenders:
                if any(self._sound(name, c) for c in self.configurations):
                    field[name] = self._start(name)
            for configuration in self.configurations:
                self._among(field, configuration)
        finally:
            for contender in field.values():
                contender.end()

    def _start(self, name: str) -> Contender:
        return Contender(name, self.options.folder, self.options.threads)

    def _sound(self, name: str, configuration: Configuration) -> bool:
        return self.rows[name, configuration]["no_time"] is None

    # ---- phases ----

    def _alone(self, name: str) -> None:
        """Errors and times of a contender in all configurations, while no other one exists."""
        contender = None
        try:
            for configuration in self.configurations:
                found = self.rows[name, configuration] = empty(name, configuration)
                try:
                    if contender is None or not contender.alive:
                        contender = self._start(name)
                    built = contender.ask("build", *configuration, self.options.pictures)
                    found |= self._judged(built, configuration[0])
                    if found["no_time"] is None:
                        rounds, failed = turns({name: contender}, self.options)
                        found |= failed.get(name, {})
                        if name in rounds:
                            found["alone_ms"] = median(rounds[name])
                except Failed as error:
                    found["no_time"] = str(error)
                shown = found["no_time"] or f"alone {found['alone_ms']:.4g} ms"
                print(f"{name}, {configuration[0]}, batch {configuration[1]}: {shown}", flush=True)
                self.write()
        finally:
            if contender is not None:
                contender.end()

    def _among(self, field: dict[str, Contender], configuration: Configuration) -> None:
        """Times of all contenders in turn, and again with busy cores."""
        ready: dict[str, Contender] = {}
        for name, contender in field.items():
            if self._sound(name, configuration):
                try:
                    contender.ask("build", *configuration, 1)
                    ready[name] = contender
                except Failed as error:
                    self.rows[name, configuration]["no_time"] = str(error)
        quiet, failed = turns(ready, self.options)
        for name, why in failed.items():
            self.rows[name, configuration] |= why
        for name, rounds in quiet.items():
            found = self.rows[name, configuration]
            found |= summary(rounds, configuration[1])
            found["among_ratio"] = round(found["p50_ms"] / found["alone_ms"], 4)
            if AUTO in quiet:
                compared = ratio(rounds, quiet[AUTO])
                found |= {key: compared[key] for key in ("ratio", "ratio_spread")}
        self.write()
        if self.options.busy and configuration[1] in self.options.busy_batches:
            if time.monotonic() > self._end:
                self.about["left_out"].append(f"busy/{'/b'.join(map(str, configuration))}")
            else:
                self._busy({n: c for n, c in ready.items() if n in quiet}, configuration)
        self.write()
        for name in self.options.contenders:
            print(line(self.rows[name, configuration]), flush=True)

    def _busy(self, ready: dict[str, Contender], configuration: Configuration) -> None:
        with spinning(self.options.busy):
            busy, _ = turns(ready, self.options)  # who fails here has its quiet times
        for name, rounds in busy.items():
            found = self.rows[name, configuration]
            found["busy_ms"] = median(rounds)
            found["busy_ratio"] = round(found["busy_ms"] / found["p50_ms"], 4)

    # ---- rows ----

    def _judged(self, built: Built, size: str) -> Row:
        """What a row says of a contender's scores and maps."""
        if size not in self._known:
            known = read_pictures(self.options.folder, size, self.options.pictures)
            self._known[size] = known
        known = self._known[size]
        scores, maps = torch.from_numpy(built.scores), torch.from_numpy(built.maps)
        dtype = getattr(torch, built.dtype)
        found = accuracy(scores, maps, (known.scores, known.maps), dtype)
        verdicts = [is_anomalous(s, known.threshold) for s in (scores, known.scores)]
        facts: Row = {name: getattr(found, name) for name in ACCURACY}
        facts |= {"dtype": built.dtype, "backend": built.backend, "precision": built.remark}
        facts |= {"flips": int((verdicts[0] != verdicts[1]).sum()), "pictures": len(scores)}
        wrong = found.problem if dtype == torch.float32 or found.map_error is None else None
        facts |= {"construction_s": round(built.seconds, 2), "no_time": wrong}
        return facts | ({"wrong": True} if wrong else {})

    def write(self) -> None:
        if self.options.json is not None:
            record.write(self.options.json, self.about, list(self.rows.values()))


def empty(name: str, configuration: Configuration) -> Row:
    """The row of a contender in a configuration, of which nothing is known yet."""
    size, batch = configuration
    facts = {"size": size, "batch": batch, "image_size": [SIDE, SIDE], "device": "cpu"}
    unknown = ("alone_ms", "among_ratio", "ratio", "ratio_spread", "busy_ms", "busy_ratio",
               "flips", "pictures", "precision", "construction_s")  # fmt: skip
    made = row("process", name, **facts) | dict.fromkeys(unknown)
    return made | {"key": f"process/{size}/{SIDE}/b{batch}/{name}"}


def turns(
    field: dict[str, Contender], options: argparse.Namespace
) -> tuple[dict[str, list[list[float]]], dict[str, Row]]:
    """Milliseconds of calls by name and round, in turn; and what to say of those that failed.

    After a few calls that tell its pace each gets --rounds blocks of calls that take about
    --seconds together, in another order each round.
    """
    blocks: dict[str, tuple[int, bool]] = {}
    failed: dict[str, Row] = {}
    times: dict[str, list[list[float]]] = {}

    def turn(name: str, calls: int, settle: bool) -> list[float] | None:
        time.sleep(PAUSE)
        try:
            return field[name].ask("time", calls, settle)
        except Failed as error:
            failed[name] = {"no_time": str(error)}
            times.pop(name, None)
            return None

    for name in field:
        pace = turn(name, 1, True)
        if pace is not None:
            calls = min(MOST, options.seconds * 1e3 / pace[0])
            blocks[name] = max(1, round(calls / options.rounds)), pace[0] < SETTLED
            times[name] = []
    names = list(times)
    for i in range(options.rounds if names else 0):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if name in times and (found := turn(name, *blocks[name])) is not None:
                times[name].append(found)
    return times, failed


def median(rounds: Sequence[Sequence[float]]) -> float:
    return round(statistics.median(itertools.chain(*rounds)), 4)


@contextmanager
def spinning(cores: int) -> Iterator[None]:
    """So many cores, the last ones of those allowed, with a process on each that spins."""
    allowed = sorted(os.sched_getaffinity(0))[-cores:]
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in allowed]
    try:
        for core, spinner in zip(allowed, spinners, strict=True):
            os.sched_setaffinity(spinner.pid, {core})
        time.sleep(0.5)  # they have started
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


# ---- the command -----------------------------------------------------------------------------


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. SystemExit: a value out of range."""
    parser = argparse.ArgumentParser(
        prog="bench.predictor.processes", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--folder", type=Path, default=Path(".work/predictor_cpu"), help="of detectors, pictures")
    add("--data", type=Path, help="data set to train and choose pictures from (default: drawn)")
    add("--contenders", nargs="+", choices=KNOWN, default=list(CONTENDERS), metavar="NAME",
        help=f"of {', '.join(map(repr, KNOWN))}")  # fmt: skip
    add("--sizes", nargs="+", default=["S", "M"], metavar="S")
    add("--batches", nargs="+", type=int, default=[1, 4], metavar="N")
    add("--threads", type=int, default=torch.get_num_threads(), help="of each contender")
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=2.0, help="of all calls of a contender, each time")
    add("--pictures", type=int, default=PICTURES, help=f"to compare, at most {PICTURES}")
    add("--busy", type=int, default=1, metavar="N", help="loaded cores; 0 leaves that out")
    add("--busy-batches", nargs="+", type=int, default=[1], metavar="N", help="measured so")
    add("--budget", type=float, default=1200.0, metavar="SECONDS", help="after it nothing is "
        "measured with loaded cores")  # fmt: skip
    add("--prepare", action="store_true", help="make what --folder lacks, and measure nothing")
    add("--quick", action="store_true", help="S, batch 1, few pictures and calls: no figures")
    add("--json", type=Path, metavar="FILE", help="write the results there")
    found = parser.parse_args(arguments)
    if found.quick:
        found.sizes, found.batches, found.pictures = ["S"], [1], min(found.pictures, 4)
        found.rounds, found.seconds = 2, 0.5
    try:
        for size in found.sizes:
            check_model_size(size)
        check_batch_sizes(found.batches)
        check_batch_sizes(found.busy_batches)
        for name, least in (("threads", 1), ("rounds", 1), ("pictures", 1), ("busy", 0)):
            if getattr(found, name) < least:
                raise ValueError(f"{name} is {getattr(found, name)}; it must be at least {least}")
        if not found.seconds > 0:
            raise ValueError(f"seconds is {found.seconds}; it must be more than 0")
        if found.pictures > PICTURES:
            raise ValueError(f"pictures is {found.pictures}; it must be at most {PICTURES}")
    except ValueError as error:
        parser.error(str(error))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit code 1 if a contender has no time."""
    options = options_of(arguments)
    os.environ.update(PARKED)
    torch.set_num_threads(options.threads)
    context = multiprocessing.get_context("spawn")
    for size in options.sizes:  # elsewhere: what it starts must not stay beside the contenders
        process = context.Process(target=prepare, args=(options.folder, size, options.data))
        process.start()
        process.join()
        if process.exitcode:
            return 1
    if options.prepare:
        return 0
    print(HEAD)
    measurement = Measurement(options)
    measurement.run()
    return int(any(found["no_time"] for found in measurement.rows.values()))


if __name__ == "__main__":
    sys.exit(main())

"""kill -9 at random points of save, train and predict: what is on the disk is whole.

The work runs in forked children of a process that has everything loaded; networks are thin.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import helpers_training as training
import numpy as np
import tifffile
import torch
from fuzz_common import Finding, Outcome, attempt, numbers_of
from PIL import Image

from efficientad.checkpoint.native_file import save
from efficientad.cli import predict as predict_command
from efficientad.cli.main import main
from efficientad.model.detector import EfficientAD
from efficientad.model.synthetic import calibrate_on_own_maps, images
from efficientad.utils.run_state import load_state, save_state

PICTURES = 5
STEPS = 4
EVERY = 1  # steps between states


class Job(NamedTuple):
    """Work for a child, done from the state of `before`, and what must hold after it was killed."""

    before: Callable[[], object]
    work: Callable[[], object]
    check: Callable[[bool], object]  # True: the child came to its end


def contents(path: Path) -> tuple[object, bytes]:
    """Header and tensors of a safetensors file, whose metadata come in any order."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def replaced(path: Path, make: Callable[[], object], again: Callable[[], object]) -> Job:
    """A file that `again` writes over the one of `make`: it is one of the two."""
    _in_child(again, path.parent.parent / "log", None)  # whose last digits can be others than here
    new = contents(path)
    make()
    whole = path.read_bytes()
    old = contents(path)

    def check(ended: bool) -> None:
        found = contents(path)
        if found not in ((new,) if ended else (old, new)):
            raise Finding(f"{path.name} is neither the old file nor the new one")
        left = [p.name for p in path.parent.iterdir() if p != path]
        if (ended and left) or any(name[0] != "." for name in left):
            raise Finding(f"left behind: {left}")

    def before() -> None:
        for other in path.parent.iterdir():
            other.unlink()
        path.write_bytes(whole)

    return Job(before, again, check)


def detector_file(folder: Path) -> Job:
    """`save` of a detector over another one."""
    folder.mkdir()
    detectors, path = (EfficientAD(), EfficientAD()), folder / "detector.safetensors"
    return replaced(path, lambda: save(detectors[0], path), lambda: save(detectors[1], path))


def state_file(folder: Path) -> Job:
    """The state of a training over an older one."""
    folder.mkdir()
    path, weights = folder / "run.training", torch.rand(3_000_000)
    return replaced(
        path,
        lambda: save_state(path, {"weights": weights}, {"step": 1}),
        lambda: save_state(path, {"weights": weights * 2}, {"step": 2}),
    )


def prediction(folder: Path) -> Job:
    """The command `predict`, with a thin detector, into a folder of an earlier run.

    Killed before the tables stand, it goes on with --resume.
    """
    pictures = training.write_pictures(folder / "pictures", PICTURES, size=(40, 50))
    detector = training.thin_detector().eval()
    calibrate_on_own_maps(detector, images(2))
    detector.threshold = 0.5
    out, earlier, model = folder / "out", folder / "earlier", folder / "detector"
    model.write_bytes(b"a detector")

    def work() -> None:
        predict_command.load_detector = lambda *_: detector
        options = ["--reference", "--device", "cpu", "--workers", "1", "--batch-size", "2"]
        options += ["--resume"] if not (out / "scores.json").exists() else []
        code = main(["predict", str(model), str(pictures), "--out", str(out), *options])
        if code:
            raise Finding(f"predict ended with {code}")

    def before() -> None:
        if out.exists() and not (out / "scores.json").exists():
            return  # it was killed, and goes on
        shutil.rmtree(out, ignore_errors=True)
        if earlier.exists():
            shutil.copytree(earlier, out)

    def check(ended: bool) -> None:
        drawn = {path.stem for path in out.glob("overlays/*.png")}
        for path in out.glob("overlays/*.png"):
            if np.asarray(Image.open(path)).shape != (40, 50, 3):
                raise Finding(f"{path.name} is half written")
        for path in out.glob("maps/*.tiff"):
            if tifffile.imread(path).shape != (40, 50):
                raise Finding(f"{path.name} is half written")
        tables = [out / name for name in ("scores.csv", "scores.json", "report.html")]
        if ended and (len(drawn) != PICTURES or not all(p.is_file() for p in tables)):
            raise Finding("the run ended and its results are not all there")
        if tables[0].is_file() and len(list(csv.reader(tables[0].open()))) != 1 + PICTURES:
            raise Finding("scores.csv is half written")
        if tables[1].is_file() and len(json.loads(tables[1].read_text())["images"]) != PICTURES:
            raise Finding("scores.json is half written")
        if tables[2].is_file() and not tables[2].read_text().rstrip().endswith("</html>"):
            raise Finding("report.html is half written")

    return Job(before, work, check)


def trained(folder: Path) -> Job:
    """A thin training that goes on from the state it left, to the bits of an unbroken one."""
    for name in ("good", "photos"):
        training.write_pictures(folder / name, 4)
    state, result = folder / "state", folder / "result"

    def work() -> None:
        trainer = training.thin_trainer(folder, STEPS)
        if state.exists():
            trainer.resume(state)
        else:
            trainer.prepare()
        trainer.run(checkpoint=state, checkpoint_every=EVERY)
        weights = {f"{i}": p.detach() for i, p in enumerate(trainer._parameters)}
        save_state(result, weights, {"step": trainer.step})

    work()
    expected = contents(result)
    state.unlink()
    result.unlink()

    def before() -> None:
        if result.exists():  # it was finished: anew
            result.unlink()
            state.unlink()

    def check(ended: bool) -> None:
        if state.exists():
            load_state(state)
        if ended or result.exists():
            if contents(result) != expected:
                raise Finding("the training that was resumed gave other weights")

    return Job(before, work, check)


def _in_child(work: Callable[[], object], log: Path, after: float | None) -> bool:
    """Whether the child came to its end; killed after so many seconds, or never."""
    child = os.fork()
    if child == 0:
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            work()
            os._exit(0)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise Finding(f"the child failed: {log.read_text()[-1500:]}")
    return code == 0


JOBS = {
    "predict": prediction,
    "save": detector_file,
    "state": state_file,
    "train": trained,
}


def run(
    count: int, seed: int, folder: Path, first: int = 0, kinds: Sequence[str] = tuple(JOBS)
) -> Outcome:
    """Kill so many times. kinds: of JOBS."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # before the fork: no pool of threads is lost in the children
    jobs = {name: JOBS[name](folder / name) for name in kinds}
    log = folder / "log"
    lengths = {}
    for name, job in jobs.items():
        job.before()
        began = time.monotonic()
        _in_child(job.work, log, None)
        lengths[name] = time.monotonic() - began
        job.check(True)
        if name == "predict":
            (folder / name / "out").rename(folder / name / "earlier")
    began, outcome = time.monotonic(), Outcome()
    for number in range(first, first + count):
        rng = numbers_of("kill", seed, number)
        name = rng.choice(sorted(jobs))
        job, after = jobs[name], rng.uniform(0, 1.05 * lengths[name])
        job.before()

        def work(job: Job = job, after: float = after, name: str = name) -> str:
            ended = _in_child(job.work, log, after)
            job.check(ended)
            return f"{name} {'ended' if ended else 'killed'}"

        attempt(outcome, f"kill {number} ({name} after {after:.3f} s)", (), work)
    torch.set_num_threads(threads)
    outcome.seconds = time.monotonic() - began
    return outcome

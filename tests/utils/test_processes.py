"""Loading in a parent and predicting in its children: forked, spawned, and in threads."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap

import helpers
import numpy as np
import pytest
import torch

import efficientad as ead
from efficientad.utils import processes

FRAME = helpers.frames(1, seed=5)[0]
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")

pytestmark = pytest.mark.usefixtures("light_networks")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "widget.safetensors"
    ead.save(helpers.detector(), path)
    return path


def asked(predictor) -> float:
    return float(predictor(FRAME).cpu().score)


# A child that waits for ever must not hang the tests, so that each parent is a process of its own
# under a clock. It has more than one thread, without which nothing could hang.
PARENT = """
import multiprocessing, sys, warnings
import torch
torch.set_num_threads(2)
import helpers
import efficientad as ead
FRAME = helpers.frames(1, seed=5)[0]
detector = ead.load(sys.argv[1])
{setup}
def answer(queue):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        scores = [ask(), ask()]
    queue.put((scores, torch.get_num_threads(), [str(w.message) for w in said]))
context = multiprocessing.get_context("fork")
queue = context.Queue()
worker = context.Process(target=answer, args=(queue,))
worker.start()
scores, threads, said = queue.get()
worker.join()
assert torch.get_num_threads() == 2
print(scores == [ask(), ask()] or abs(scores[0] - ask()) < 1e-5, threads, len(said), *said)
"""
WAYS = {
    "load": "ask = lambda: list(ead.predict(detector, [FRAME]))[0].score",
    "plain call": """
import torch
x = helpers.images(1)
def ask():
    with torch.no_grad():
        return float(detector(x).score)
""",
    "float32": """
p = ead.FastPredictor(detector, device="cpu", dtype="float32")
ask = lambda: float(p(FRAME).cpu().score)
""",
    "bfloat16, a lock held": """
p = ead.FastPredictor(detector, device="cpu", dtype="bfloat16")
ask = lambda: float(p(FRAME).cpu().score)
ask()
p.engine.lock.acquire()  # as another thread would
import os
os.register_at_fork(after_in_parent=p.engine.lock.release)
""",
}


@FORKS
@pytest.mark.parametrize("way", WAYS)
def test_a_forked_child_answers_and_is_told(way, model_file):
    program = textwrap.dedent(PARENT).format(setup=WAYS[way])
    done = subprocess.run(
        [sys.executable, "-c", program, str(model_file)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONPATH": os.path.dirname(helpers.__file__)},
    )
    assert done.returncode == 0, done.stderr
    same, threads, warned, *words = done.stdout.split()
    assert same == "True"
    assert threads == "1"
    if way == "plain call":  # nothing of ours sees it
        assert warned == "0"
    else:
        assert warned == "1"
        assert "it computes in one thread. To use all, load the detector in the" in " ".join(words)


@FORKS
def test_a_parent_that_only_imported_keeps_its_childrens_threads():
    program = textwrap.dedent("""
        import os, torch
        torch.set_num_threads(2)
        import efficientad.fast.predictor
        child = os.fork()
        if child == 0:
            os._exit(torch.get_num_threads())
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "2\n"


def test_a_spawned_child_gets_detector_and_predictor_by_content(model_file):
    detector = ead.load(model_file)
    detector.threshold = 0.07
    predictor = ead.FastPredictor(detector, device="cpu", dtype="float32", map_size=None)
    predictor.threshold = 0.5
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        found = pool.submit(answers, predictor, detector).result(timeout=300)
    score = next(ead.predict(detector, [FRAME])).score
    assert found[0] == pytest.approx(asked(predictor), rel=1e-5)
    assert found[1:3] == (0.5, False)
    assert found[3] == pytest.approx(score, rel=1e-5)


def answers(predictor, detector) -> tuple[float, float, bool, float]:
    torch.set_num_threads(1)
    shared = any(p.is_shared() for p in detector.parameters())
    score = next(ead.predict(detector, [FRAME])).score
    return asked(predictor), predictor.threshold, shared, score


def test_pickles_hold_what_was_built_and_what_was_reloaded():
    first, second = helpers.detector(seed=1), helpers.detector(seed=2)
    predictor = ead.FastPredictor(first, device="cpu", dtype="float32", batch_sizes=(1, 2))
    before = asked(predictor)
    with torch.no_grad():
        first.student.conv1.weight.zero_()  # the predictor has its own
    again = pickle.loads(pickle.dumps(predictor))
    assert asked(again) == before
    assert (again.batch_sizes, again.map_size) == (predictor.batch_sizes, predictor.map_size)
    predictor.reload(second)
    after = asked(pickle.loads(pickle.dumps(predictor)))
    assert after == asked(predictor) != before
    copy = pickle.loads(pickle.dumps(second))
    for a, b in zip(copy.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert copy.calibrated


def test_a_pool_of_threads_gets_the_scores_of_one(model_file):
    predictor = ead.FastPredictor(ead.load(model_file), device="cpu", dtype="float32")
    frames = list(helpers.frames(4, seed=9))
    one_by_one = [float(predictor(f).cpu().score) for f in frames]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda f: float(predictor(f).cpu().score), frames * 2))
    assert np.array_equal(together, one_by_one * 2)


def test_on_cuda_a_forked_process_is_told_what_to_do():
    """Without a GPU: the engine's own question, asked of one that was built by another process."""
    predictor = ead.FastPredictor(helpers.detector(), device="cpu", dtype="float32")
    engine = predictor.engine
    engine.stream = object()  # as on CUDA
    engine._process += 1
    with (
        pytest.raises(RuntimeError, match=r"forked after the predictor was built .* 'spawn'"),
        engine.step([]),
    ):
        pass


def test_locks_are_new_in_a_child(monkeypatch):
    class Holder:
        lock = "held"

    monkeypatch.setattr(processes._State, "computed", False)
    holder = Holder()
    processes.fresh_lock_after_fork(holder)
    processes._in_child()
    assert holder.lock.acquire(blocking=False)

"""Everything that a GPU has to show, in one command.

    python -m bench.gpu --budget 9m --out DIR [--resume FILE] [--only STEP,...] [--device cuda|cpu]

Steps, in order of value: correctness, ceilings, kernels, predictor (end to end, stages, peers),
layers, dtypes, sweeps, compiled, sanitizer. What fails its check gets no speed. Before each
measurement the clock is read: it is left out if the longest of its kind so far would not fit.
results.json is written after every measurement; a second call with --resume takes what is missing
on a card of the same name, whatever its driver; on another card it starts that card's own results.
Beside it go results.txt, one page of tables, and the pictures: at most MAX_FILES files.

The measurements run in a child process. One that crashes it, hangs, or loses the device is noted as
a failure, and a new child goes on with the next. Clocks and other settings of the card are left as
they are.

Exit code: 0 all was right, 1 something failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from bench import record
from bench.gpu.run_log import Budget, RunLog, failures, kind_of, run_all

RESULTS, PAGE = "results.json", "results.txt"
MAX_FILES, MAX_BYTES = 8, 16 << 20
FINISH_SECONDS = 20.0  # of the budget, for the page and the pictures
RESTART_SECONDS = 30.0  # a child is not worth starting for less
MAX_CRASHES = 8
GRACE_SECONDS = 10.0  # past the budget, until a measurement is cut off


def seconds(text: str) -> float:
    """ "9m", "540s" or "540" -> 540.

    Raises:
        argparse.ArgumentTypeError: anything else, or no time at all.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(m|s)?", text)
    if found is None or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"--budget is {text!r}; it must be like 9m or 540s")
    return float(found[1]) * (60 if found[2] == "m" else 1)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="bench.gpu", description=__doc__.partition("\n")[0])
    add = made.add_argument
    add("--budget", type=seconds, default=540.0, metavar="9m", help="of all, start to end")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the files")
    add("--resume", type=Path, metavar="FILE", help="results.json of an earlier call")
    add("--only", metavar="STEP,...", help="steps to take; default: all")
    add("--device", default="cuda", help="cuda, or cpu: small shapes and counts, a smoke test")
    add("--seed", type=int, help="of the correctness checks; default: a fresh one")
    add("--commit", help="to note where the checkout is no git repository")
    add("--child", metavar="COMMAND", help=argparse.SUPPRESS)
    return made


# ---- the child: measures -------------------------------------------------------------------------


def child(options: argparse.Namespace) -> int:
    """Take the measurements; progress goes to standard output, see `run_log.run_all`."""
    import torch

    from bench.gpu import steps

    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # float32 is what results are compared with
    budget = Budget(options.budget)
    facts = record.about(options.device, options.child)
    if options.commit:
        facts["commit"] = options.commit
    facts["seed"] = options.seed
    try:
        log = RunLog(options.out / RESULTS, facts, options.resume)
    except ValueError as error:
        print(f"! {error}", flush=True)
        return 2
    if log.other_card is not None:
        said = f"{options.resume} was made on {log.other_card}; this card starts its own results"
        print(f"! {said}", flush=True)
    for key, taken in log.keys.items():
        budget.took(key, taken)
    plan = steps.Plan(options.device, options.seed, log)
    if plan.on_cuda:
        torch.cuda.set_device(torch.device(options.device).index or 0)  # where kernels are launched
    names = steps.chosen(options.only and options.only.split(","))

    def after_error() -> None:
        if plan.on_cuda:
            torch.cuda.synchronize()  # raises where the device is lost
            torch.cuda.empty_cache()

    def report(line: str) -> None:
        print(line, flush=True)

    run_all(steps.measurements(plan, names), log, budget, report=report, after_error=after_error)
    return 0


# ---- the parent: watches -------------------------------------------------------------------------


def watch(process: subprocess.Popen, budget: Budget, patience) -> tuple[str | None, str | None]:
    """Follow a child until it ends, or end it.

    patience: kind of a measurement -> seconds that it may be silent.

    Returns:
        (the key that was running, why it did not come to its end); None, None if all is well.
    """
    lines: queue.Queue[str | None] = queue.Queue()
    assert process.stdout is not None  # a pipe
    output = process.stdout

    def read() -> None:
        for line in output:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    running, heard = None, budget.clock()
    while True:
        try:
            line = lines.get(timeout=0.2)
        except queue.Empty:
            line = ""
        if line is None:
            code = process.wait()
            return (None, None) if code in (0, 2) else (running, f"the process ended with {code}")
        if line:
            heard = budget.clock()
            print(line, flush=True)
            if line.startswith("> "):
                running = line[2:]
            elif line.startswith("= "):
                running = None
        limit = patience(running)
        if budget.left() < -GRACE_SECONDS:
            stop(process)
            return running, "the budget was spent"
        if budget.clock() - heard > limit:
            stop(process)
            return running, f"no answer within {limit:.0f} s"


def stop(process: subprocess.Popen) -> None:
    """End a child at once."""
    process.kill()
    process.wait()


def supervise(command: Sequence[str], out: Path, budget: Budget, patience, environment=None) -> int:
    """Run children until the measurements are through; the exit code of the last.

    command: gets "--budget SECONDS", and "--resume" with the results so far from the second on.
    """
    results = out / RESULTS
    more: list[str] = []
    for _ in range(MAX_CRASHES):
        process = subprocess.Popen(
            [*command, "--budget", f"{budget.left():.1f}", *more],
            cwd=record.ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            running, reason = watch(process, budget, patience)
        except BaseException:
            stop(process)
            raise
        if reason is None:
            return process.returncode
        print(f"! {running or 'start or end'}: {reason}", flush=True)
        if not results.is_file():
            return 1
        log = RunLog.reopen(results)
        if running is None:  # it would happen again
            return 1
        if budget.left() <= 0:
            log.leave_out(running)
            log.write()
            return 0
        if running not in log.keys:
            log.fail(running, reason)
        if budget.left() < RESTART_SECONDS:
            return 1
        more = ["--resume", str(results)]
    return 1


def finish(out: Path) -> list[Path]:
    """Write the page and the pictures from the results file; returns all files."""
    from bench.report import plots, tables
    from efficientad.utils.files import write_text

    found = record.read(out / RESULTS)
    write_text(out / PAGE, tables.page(found))
    files = [out / RESULTS, out / PAGE]
    try:
        files += plots.render(found, out)
    except ImportError as error:  # the page says it all
        print(f"! {error}")
    sizes = [path.stat().st_size for path in files]
    if len(files) > MAX_FILES or max(sizes) > MAX_BYTES:
        raise ValueError(f"{len(files)} files of {sizes} bytes; at most {MAX_FILES} of {MAX_BYTES}")
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser()
    options = made.parse_args(arguments)
    if options.seed is None:
        options.seed = secrets.randbelow(10**6)
    if options.child is not None:
        return child(options)
    from bench.gpu import steps

    try:
        steps.chosen(options.only and options.only.split(","))
    except ValueError as error:
        made.error(str(error))
    results = options.out / RESULTS
    if results.exists() and (options.resume is None or not options.resume.samefile(results)):
        made.error(f"--out has {results} already; resume it, or name another folder")
    if options.resume is not None and not options.resume.is_file():
        made.error(f"--resume is {options.resume}; there is no such file")
    budget = Budget(options.budget - FINISH_SECONDS)
    shown = f"python -m bench.gpu --budget {options.budget:g}s --device {options.device}"
    shown += f" --only {options.only}" if options.only else ""
    command = [sys.executable, "-m", "bench.gpu", "--child", shown]
    command += ["--out", str(options.out.resolve())]
    command += ["--device", options.device, "--seed", str(options.seed)]
    for name in ("only", "commit", "resume"):
        value = getattr(options, name)
        if value is not None:
            command += [f"--{name}", str(value.resolve() if name == "resume" else value)]
    environment = dict(os.environ)
    if options.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"  # read when triton is imported

    def patience(key: str | None) -> float:
        return steps.PATIENCE.get(kind_of(key or ""), steps.DEFAULT_PATIENCE)

    start = time.monotonic()
    code = supervise(command, options.out, budget, patience, environment)
    if code == 2 or not results.is_file():
        return code or 1
    files = finish(options.out)
    print((options.out / PAGE).read_text(encoding="utf-8"))
    print(f"{time.monotonic() - start:.0f} s; " + ", ".join(path.name for path in files))
    rows = record.read(results)["rows"]
    failed = [row for row in rows if row["kind"] == "failure" or row.get("ok") is False]
    return 1 if code or failed or failures(rows) else 0

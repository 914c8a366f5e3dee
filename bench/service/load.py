"""Many clients post pictures while the service is killed again and again; then the store is read.

    python -m bench.service.load --pictures 200000 --kills 5          # the network a light stub
    python -m bench.service.load --pictures 2000 --network real       # EfficientAD-S

First one client and the bare predictor take turns, so that both are timed on the same machine in
the same minutes, from a file's bytes to its verdict or score. Then all clients send, each one
picture after the other on one connection, and note what was answered; where the service is gone a
client sends the same picture again. At the end every answered verdict must be in the store, with
its score and its picture byte by byte; no picture may lie there without a verdict; and the
service's resident memory must not grow between a tenth of a stretch without a kill and its end. The
scores must be those of the predictor alone. Exit code 1 if any of this fails. Counted beside it is
the CPU time of the service's process per answered picture, which other work distorts little.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench import record
from bench.predictor.soak import StubPredictor, judged_detector
from efficientad.fast.predictor import FastPredictor
from efficientad.model.agreement import BOUNDS
from efficientad.model.synthetic import frames
from efficientad.verdicts.database import PICTURES
from efficientad.verdicts.store import Store

KINDS = 32  # different pictures
BLOCK = 20  # calls in a row, of the service and of the bare predictor in turn
GROWTH = 0.05  # of resident memory, within a stretch
GONE = (ConnectionError, asyncio.IncompleteReadError, OSError, TimeoutError)


def pictures() -> list[bytes]:
    """JPEGs of 256x256, each another one."""
    files = []
    for frame in frames(KINDS):
        stream = io.BytesIO()
        Image.fromarray(frame).save(stream, "JPEG", quality=85)
        files.append(stream.getvalue())
    return files


@dataclass
class Service:
    """The service's process; its resident memory per stretch between two kills, its CPU time."""

    command: list[str]
    port: int
    process: subprocess.Popen[str] | None = None
    memory: list[list[int]] = field(default_factory=list)
    spent: float = 0.0  # CPU seconds of the processes before, since each of them served
    started: float = 0.0  # CPU seconds that this one took until it served

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        if not any(line.startswith("serving") for line in self.process.stdout):
            raise RuntimeError("the service ended before it served")
        self.memory.append([])
        self.started = self.cpu()

    def cpu(self) -> float:
        """CPU seconds of the process and its threads, in user and kernel mode."""
        assert self.process is not None
        words = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def served(self) -> float:
        """CPU seconds of all processes so far, each from when it served."""
        return self.spent + self.cpu() - self.started

    def sample(self) -> None:
        assert self.process is not None
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        self.memory[-1].append(pages * os.sysconf("SC_PAGE_SIZE"))

    def stop(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.spent, self.started = self.served(), 0.0
        self.process.send_signal(number)
        code = self.process.wait(120)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@dataclass
class Run:
    """What the clients have yet to send, and what they were answered."""

    left: int
    files: list[bytes]
    port: int
    answered: dict[int, tuple[int, float]] = field(default_factory=dict)  # id: (kind, score)
    seconds: list[float] = field(default_factory=list)
    refused: int = 0
    sent_again: int = 0
    serving: float = 0.0  # seconds, from the first answer after a start to the next kill or the end


async def client(run: Run) -> None:
    """One sender, until nothing is left."""
    reader = writer = None
    while run.left > 0:
        run.left -= 1
        kind = run.left % len(run.files)
        while True:
            try:
                if writer is None:
                    reader, writer = await asyncio.open_connection("127.0.0.1", run.port)
                start = time.perf_counter()
                status, answer = await post(reader, writer, run.files[kind])
            except GONE:
                run.sent_again += 1
                if writer is not None:
                    writer.close()
                reader = writer = None
                await asyncio.sleep(0.05)
                continue
            if status == 200:
                break
            run.refused += 1
            await asyncio.sleep(0.1)
        run.seconds.append(time.perf_counter() - start)
        run.answered[answer["id"]] = kind, answer["score"]
    if writer is not None:
        writer.close()


async def post(reader: Any, writer: Any, data: bytes) -> tuple[int, dict[str, Any]]:
    """One request on an open connection: its status and answer."""
    head = f"POST /predict/load HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    await writer.drain()
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    size = next(int(line[15:]) for line in lines if line.startswith("content-length:"))
    return int(lines[0].split()[1]), json.loads(await reader.readexactly(size))


async def drive(run: Run, service: Service, clients: int, kills: int) -> None:
    """All clients, and the kills at equal distances."""
    total = run.left
    senders = [asyncio.create_task(client(run)) for _ in range(clients)]
    marks = [total * (i + 1) // (kills + 1) for i in range(kills)]
    tenth = total / (kills + 1) / 10
    since, shown, began = 0, 0, None
    while not all(sender.done() for sender in senders):
        await asyncio.sleep(0.05)
        done, now = len(run.answered), time.perf_counter()
        if began is None and done > since:
            began = now
        if done - since > tenth:
            service.sample()
        if 10 * done // total > shown:
            shown = 10 * done // total
            print(f"{done} of {total} pictures are answered", file=sys.stderr, flush=True)
        if marks and done >= marks[0]:
            marks.pop(0)
            service.stop(signal.SIGKILL)
            run.serving += now - (began or now)
            await asyncio.to_thread(service.start)
            since, began = len(run.answered), None
    await asyncio.gather(*senders)
    run.serving += time.perf_counter() - (began or time.perf_counter())


def check(run: Run, store: Path, expected: list[float], bound: float) -> tuple[list[str], int]:
    """What is wrong in the store, and how many verdicts it holds."""
    problems = []
    with Store(store) as opened, opened.reading() as db:
        if opened.removed or opened.missing:
            problems.append(
                f"{opened.removed} orphans and {opened.missing} lost pictures at the end"
            )
        rows = {row["id"]: row for row in db.execute("SELECT id, score, suffix FROM verdicts")}
        names = {path.name for path in (store / PICTURES).rglob("*.*")}
        if names != {f"{number}.{row['suffix']}" for number, row in rows.items()}:
            problems.append("the pictures are not those of the verdicts")
        lost = wrong = 0
        for number, (kind, score) in run.answered.items():
            row = rows.get(number)
            if row is None:
                lost += 1
                continue
            same = opened.picture_path(number, row["suffix"]).read_bytes() == run.files[kind]
            near = abs(score - expected[kind]) <= bound * max(1.0, abs(score))
            wrong += not (same and near and row["score"] == score)
    problems += [f"{lost} answered verdicts are lost"] if lost else []
    problems += [f"{wrong} verdicts have another score or picture"] if wrong else []
    return problems, len(rows)


def bare(predictor: FastPredictor, files: list[bytes], calls: int) -> list[float]:
    """Seconds from a file's bytes to its score, without the service."""
    seconds = []
    for i in range(calls):
        start = time.perf_counter()
        predictor(files[i % len(files)]).cpu()
        seconds.append(time.perf_counter() - start)
    return seconds


def in_turn(predictor: FastPredictor, run: Run, calls: int) -> list[float]:
    """Send so many pictures by one client, and score as many without the service, in blocks.

    The client's seconds are in `run`. The first block of either is not timed.
    """
    alone: list[float] = []
    for block in range(-(-calls // BLOCK) + 1):
        if block == 1:
            run.seconds.clear()
            alone.clear()
        run.left = BLOCK
        asyncio.run(client(run))
        alone += bare(predictor, run.files, BLOCK)
    return alone


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """p50 and p99."""
    p50, p99 = np.percentile(seconds, (50, 99)) * 1000
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2)}


def load(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run it; returns what was counted and what was wrong, see the module's text."""
    kind = StubPredictor if options.network == "stub" else FastPredictor
    dtype = "float32" if options.device == "cpu" else "auto"
    predictor = kind(judged_detector(), device=options.device, dtype=dtype)
    files = pictures()
    expected = [float(predictor(data).cpu().score) for data in files]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--store", str(folder), "--port", str(port), "--network", options.network]
    words += ["--device", options.device, *(["--no-fsync"] if options.no_fsync else [])]
    service = Service([sys.executable, "-m", "bench.service.serving", *words], port)
    service.start()
    one, run = Run(0, files, port), Run(options.pictures, files, port)
    alone = in_turn(predictor, one, options.calls)
    start, cpu = time.perf_counter(), service.served()
    asyncio.run(drive(run, service, options.clients, options.kills))
    seconds, cpu = time.perf_counter() - start, service.served() - cpu
    code = service.stop(signal.SIGTERM)
    answered = len(run.answered)
    run.answered |= one.answered
    problems, stored = check(run, folder, expected, BOUNDS[predictor.dtype][0])
    if code:
        problems.append(f"the service ended with {code}")
    if answered != options.pictures:
        problems.append(f"{answered} of {options.pictures} pictures were answered")
    growth = [stretch[-1] / stretch[0] - 1 for stretch in service.memory if len(stretch) > 1]
    if any(part > GROWTH for part in growth):
        problems.append(f"resident memory grew by {max(growth):.1%} in a stretch")
    return {
        "pictures": options.pictures,
        "clients": options.clients,
        "kills": options.kills,
        "network": options.network,
        "durable": not options.no_fsync,
        "answered": answered,
        "stored": stored,
        "refused_for_now": run.refused,
        "sent_again": run.sent_again,
        "seconds": round(seconds, 1),
        "pictures_per_second_while_serving": run.serving and round(answered / run.serving, 2),
        "service_cpu_ms_per_picture": answered and round(1000 * cpu / answered, 2),
        "service": milliseconds(run.seconds),
        "in_turn": {
            "calls": len(alone),
            "service_with_one_client": milliseconds(one.seconds),
            "bare_predictor_with_decoding": milliseconds(alone),
        },
        "growth_of_memory_by_stretch": [round(part, 4) for part in growth],
        "resident_at_the_end": service.memory[-1][-1] if service.memory[-1] else None,
        "problems": problems,
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=200_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument(
        "--calls", type=int, default=200, help="of one client, and of the bare predictor, in turn"
    )
    parser.add_argument("--network", choices=("stub", "real"), default="stub")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-fsync", action="store_true", help="as of `efficientad serve`")
    parser.add_argument("--store", type=Path, help="a new folder (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    options = parser.parse_args()
    for name in ("pictures", "clients", "calls"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be at least 1")
    if not 0 <= options.kills < options.pictures:
        parser.error(f"--kills is {options.kills}; it must be 0 or more and less than --pictures")
    if options.store is not None and options.store.exists():
        parser.error(f"--store is {options.store}, which exists; name a new folder")
    with tempfile.TemporaryDirectory() as name:
        result = load(options, options.store or Path(name) / "store")
    print(json.dumps(result, indent=1))
    if options.json is not None:
        record.write(options.json, record.about(options.device), [{"kind": "service", **result}])
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())

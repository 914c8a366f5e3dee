"""An estimate of a replay of the fast path's graph, launch by launch: arithmetic, no measurement.

    python -m bench.timeline [--size S M] [--batch 1 ...] [--card H200 H100] [--json FILE]

The launches are those of the predictor's own code (`recording`), their registers and shared memory
are the census' (`facts`; compiled here, about a minute, no GPU), their times are from `model` with
the constants of `cards`, and two streams run beside each other with the code's fork and join. Three
tables: the launches as they are now and which of them the result waits for; the total with other
choices, before and after; and the launches as they were measured once, the estimate beside the
measurement. Everything is an estimate but the columns called "measured".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import record
from bench.kernels import roofline
from bench.record import Row
from bench.report import estimates, timeline
from bench.shapes import PDN
from bench.timeline import choices, facts, model, recording, work
from bench.timeline.cards import CARDS, Card
from bench.timeline.choices import ONE, TRUNK, TWO, Choice
from bench.timeline.model import Facts
from bench.timeline.recording import Recorded

TARGET = 90
ALONE, REPLAYS = "h200.json", "h200_timeline.json"  # measured, of a commit before
MEASURED_ON = "H200"
FactsOf = Callable[[Sequence[Recorded]], list[Facts]]


def estimate(
    size: str, batch: int, card: Card, launches: Sequence[Recorded], found: Sequence[Facts],
    *, streams: str = TWO,
) -> Row:  # fmt: skip
    """A row of kind "estimate": the total and every launch, in microseconds."""
    times, lines = [], []
    for i, (launch, fact) in enumerate(zip(launches, found, strict=True)):
        groups, tensors = work.groups(launch), work.tensors(launch)
        own = model.alone(
            card, groups, fact, warps=launch.warps, stages=launch.stages, tensors=tensors,
            early=launch.early,
        )  # fmt: skip
        waits = ([i - 1] if i else []) if streams == ONE else launch.waits
        strided = launch.name == "_strided_conv_kernel"
        on_branch = launch.stream == recording.BRANCH
        taken = model.timed(
            own, card, launch.programs, waits, early=launch.early, strided=strided,
            priority=on_branch,
        )  # fmt: skip
        if streams == TRUNK and on_branch:
            taken = replace(taken, us=0.0, gap=0.0)
        times.append(taken)
        lines.append({
            "layer": launch.layer, "stream": launch.stream,
            "alone_us": round(own.us, 2), "bound": own.bound, "programs": launch.programs,
            "resident": own.resident, "waves": round(own.waves, 2), "registers": fact.registers,
            "shared": fact.shared, "spills": fact.spills, "early": launch.early,
            "flop": sum(g.programs * g.flop for g in groups),
            "l2_bytes": sum(g.programs * g.bytes for g in groups), "tensor_bytes": tensors,
        })  # fmt: skip
    spans = model.simulate(times)
    path = model.critical_path(times, [end for _, end in spans])
    for i, (line, (start, end)) in enumerate(zip(lines, spans, strict=True)):
        line |= {"start_us": round(start, 2), "us": round(end - start, 2), "waited": i in path}
    return {
        "kind": "estimate", "card": card.name, "size": size, "batch": batch,
        "us": round(max(end for _, end in spans), 1), "launches": lines,
    }  # fmt: skip


def beside(row: Row, results: Path) -> None:
    """Put into a row's launches what was measured of them, in the graph and alone."""
    replay: dict[str, float] = {}
    alone: dict[str, float] = {}
    where = {"size": row["size"], "batch": row["batch"], "variant": "base"}
    if (results / REPLAYS).is_file():
        for other in record.read(results / REPLAYS)["rows"]:
            if other.get("trace") and where.items() <= other.items():
                found = timeline.launches(other)
                replay = {launch.layer: launch.us for launch in found}
                row["measured_us"] = round(found[-1].end - found[0].start, 1)
    if (results / ALONE).is_file():
        alone = roofline.measured_us(record.read(results / ALONE), row["size"], row["batch"])
    for line in row["launches"]:
        line["measured_us"] = replay.get(line["layer"])
        line["measured_alone_us"] = alone.get(line["layer"])


def rows(
    sizes: Sequence[str], batches: Sequence[int], cards: Sequence[str], results: Path,
    facts_of: FactsOf, report: Callable[[str], None] = lambda line: None,
) -> list[Row]:  # fmt: skip
    """A row per size, batch, card and choice.

    Args:
        facts_of: registers and shared memory of launches, called with the choice's constants set.
        report: gets a line before each choice.
    """
    made = []
    known: dict[str, Choice] = choices.choices(TARGET)
    for size in sizes:
        detector = recording.detector(size)
        for batch in batches:
            for key, choice in known.items():
                report(f"EfficientAD-{size}, batch {batch}: {choice.name}")
                with choices.chosen(choice):
                    launches = recording.record(detector, batch, TARGET)
                    found = facts_of(launches)
                for card in cards:
                    row = estimate(
                        size, batch, CARDS[card], launches, found, streams=choice.streams
                    )
                    row |= {"choice": key, "name": choice.name}
                    if key == "measured" and card == MEASURED_ON:
                        beside(row, results)
                    elif key != "shipped":  # the total is all that is shown
                        row.pop("launches")
                    made.append(row)
    return made


def about(cards: Sequence[str]) -> dict[str, Any]:
    """As of a results file; there is no device."""
    made = record.about("cpu")
    for name in ("capability", "threads"):
        made.pop(name)
    return made | {"device": f"ESTIMATE for one NVIDIA {' or '.join(cards)}, nothing measured"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="bench.timeline", description=__doc__.partition("\n")[0])
    add = made.add_argument
    add("--size", choices=sorted(PDN), nargs="+", default=["S", "M"])
    add("--batch", type=int, nargs="+", default=[1], help="images of a replay; default: 1")
    add("--card", choices=sorted(CARDS), nargs="+", default=["H200"])
    add("--json", type=Path, metavar="FILE", help="write the rows here")
    add("--results", type=Path, default=record.RESULTS, metavar="DIR",
        help=f"where {REPLAYS} and {ALONE} are; default: bench/results")  # fmt: skip
    return made


def main(arguments: Sequence[str] | None = None, facts_of: FactsOf | None = None) -> int:
    made = parser()
    options = made.parse_args(arguments)
    for batch in options.batch:
        if batch < 1:
            made.error(f"--batch is {batch}; it must be at least 1")
    known: facts.Known = {}

    def compiled(launches: Sequence[Recorded]) -> list[Facts]:
        return facts.compiled(launches, TARGET, known)

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        with facts.own_cache():
            found = rows(
                options.size, options.batch, options.card, options.results,
                facts_of or compiled, report,
            )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    facts_of_all = about(options.card)
    if options.json is not None:
        record.write(options.json, facts_of_all, found)
    print(estimates.estimate_table({"about": facts_of_all, "rows": found}))
    return 0

"""Mutated tables: CSV of VisA, JSON of Real-IAD, MVTec LOCO AD and of our own results."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

from fuzz_common import Finding, Outcome, attempt, mutated, numbers_of
from PIL import Image

from efficientad.data.layouts import open_dataset
from efficientad.results.output_folder import earlier_files

_PIECES = (
    "\x00", '"', '""', "'", ";", ",", "\t", "\r", "\n", "\u2028", "\ufeff", "sep=;\n", "é", "..",
    "/", "../" * 8, "\\", "C:\\a\\b.png", "x" * 300, "x" * 5000, "-1", "1e999", "NaN", "true",
    "null", "{}", "[]", "[" * 3000, '{"a":' * 3000, "999999999999999999999", "\ud800", "test",
    "train", "normal",
)  # fmt: skip
_ENCODINGS = ("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "cp1252")


def seeds(folder: Path) -> dict[str, Path]:
    """A data set for every table, and an output folder."""

    def picture(path: Path) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (90, 90, 90)).save(path)
        return path.name

    rows = [("object", "split", "label", "image", "mask")]
    visa = folder / "visa"
    for i in range(4):
        picture(visa / "candle" / f"{i}.png")
        part = "train" if i < 3 else "test"
        label, mask = ("normal", "") if i < 3 else ("anomaly", "candle/mask.png")
        rows.append(("candle", part, label, f"candle/{i}.png", mask))
    picture(visa / "candle" / "mask.png")
    table = visa / "split_csv" / "1cls.csv"
    table.parent.mkdir()
    table.write_text("".join(",".join(row) + "\n" for row in rows), encoding="utf-8")

    loco = folder / "loco"
    for part in ("train/good", "validation/good", "test/good"):
        picture(loco / part / "000.png")
    rules = [
        {
            "defect_name": name,
            "pixel_value": 255 - i,
            "saturation_threshold": 0.5 + i,
            "relative_saturation": not i,
        }
        for i, name in enumerate(("missing", "extra"))
    ]
    (loco / "defects_config.json").write_text(json.dumps(rules), encoding="utf-8")

    splits = folder / "realiad" / "realiad_jsons" / "nut.json"
    entries = [
        {
            "category": "nut",
            "anomaly_class": label,
            "image_path": f"{label}/{picture(folder / 'realiad/nut' / label / f'{i}.png')}",
            "mask_path": None,
        }
        for i, label in enumerate(("OK", "OK", "OK", "NG"))
    ]
    document = {"meta": {"normal_class": "OK", "prefix": "nut/"}}
    document |= {"train": entries[:2], "test": entries[2:]}
    splits.parent.mkdir()
    splits.write_text(json.dumps(document, indent=1), encoding="utf-8")

    results = folder / "results"
    names = [picture(results / "overlays" / f"{i}.png") for i in range(3)]
    picture(results / "own.png")
    scores = {"threshold": 0.5, "images": [], "files": [f"overlays/{name}" for name in names]}
    (results / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    return {
        "visa": table,
        "loco": loco / "defects_config.json",
        "realiad": splits,
        "results": results / "scores.json",
    }


def change(text: str, rng: random.Random) -> bytes:
    """Pieces of text put in, lines and cells moved, another encoding, or bytes."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, end = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        what = rng.randrange(4)
        if what == 0:
            text = text[:at] + rng.choice(_PIECES) + text[at:]
        elif what == 1:
            text = text[:at] + rng.choice(_PIECES) + text[min(at + 8, end) :]
        elif what == 2:
            lines = text.split("\n")
            rng.shuffle(lines)
            text = "\n".join(lines)
        else:
            cells = text.split(",")
            cells[rng.randrange(len(cells))] = rng.choice(_PIECES)
            text = ",".join(cells)
    data = text.encode(rng.choice(_ENCODINGS), "replace")
    return mutated(data, rng) if rng.random() < 0.4 else data


def check(kind: str, table: Path) -> str:
    """Read it as the package does."""
    if kind == "results":
        root = table.parent
        for path in earlier_files(root):
            inside = path.resolve().is_relative_to((root / "overlays").resolve())
            if not inside or path.suffix not in (".png", ".tiff"):
                raise Finding(f"{path} would be removed")
        return "read"
    data = open_dataset(table.parent if kind == "loco" else table.parents[1])
    if not data.train or any(sample.label for sample in data.train):
        raise Finding(f"trains on {data.train}")
    return "read"


def run(count: int, seed: int, folder: Path, first: int = 0) -> Outcome:
    """Try so many tables."""
    found = seeds(folder / "tables")
    whole = {kind: path.read_text(encoding="utf-8") for kind, path in found.items()}
    began, outcome = time.monotonic(), Outcome()
    for number in range(first, first + count):
        rng = numbers_of("table", seed, number)
        kind = rng.choice(sorted(found))
        found[kind].write_bytes(change(whole[kind], rng))
        attempt(
            outcome,
            f"table {number} ({kind})",
            (ValueError, FileNotFoundError),
            lambda kind=kind: check(kind, found[kind]),
        )
    outcome.seconds = time.monotonic() - began
    return outcome

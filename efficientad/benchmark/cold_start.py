"""The first result of a fresh process, its memory.

`python -m efficientad.benchmark.cold_start FILE` is that process: it loads a detector, builds a
predictor, scores a frame twice, and prints how long each took as one line of JSON. `cold_start`
writes the file, starts the process and makes a row of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the fresh process must time its own import of torch
    from efficientad.model.detector import EfficientAD

TIMEOUT = 600  # seconds


def cold_start(
    detector: EfficientAD,
    *,
    device: str = "auto",
    dtype: str = "auto",
    batch_sizes: Sequence[int] | None = None,
    empty_cache: bool = False,
    bundle: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Seconds from nothing to the first result, in a fresh process: a row of kind "cold_start".

    p50_ms and its like are construction and first call together, of one process. Beside them stand
    `import_s`, `load_s`, `construction_s`, `first_call_ms`, `second_call_ms`, `process_s` (all of
    it) and the process's peak memory: `device_mb` as torch reserved it (0 on a CPU), `host_mb`
    resident. The reading of the file includes its self-test.

    Args:
        detector: calibrated; written to a temporary file.
        device, dtype, batch_sizes: as `FastPredictor` takes them.
        empty_cache: give the process an empty cache of compiled Triton kernels; otherwise it finds
            what earlier ones left.
        bundle: a kernel bundle for the process, or None; what the predictor says of it is in the
            row.

    Raises:
        RuntimeError: the process failed; the message has its last line. Or it took 10 minutes.
    """
    from efficientad.benchmark.contenders import row
    from efficientad.checkpoint.native_file import save

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detector.safetensors"
        save(detector, path)
        command = [sys.executable, "-m", __spec__.name, str(path)]
        command += ["--device", str(device), "--dtype", str(dtype).removeprefix("torch.")]
        if batch_sizes is not None:
            command += ["--batch-sizes", *map(str, batch_sizes)]
        variables = {"TRITON_CACHE_DIR": str(Path(folder) / "cache")} if empty_cache else {}
        if bundle is not None:
            command += ["--bundle", os.fspath(bundle)]
        start = time.perf_counter()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TIMEOUT, env=os.environ | variables
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the fresh process took more than {TIMEOUT} s") from None
        seconds = time.perf_counter() - start
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"the fresh process ended with {done.returncode}: {lines[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    ms = round(found["construction_s"] * 1e3 + found["first_call_ms"], 2)
    same = dict.fromkeys(("p50_ms", "p90_ms", "p99_ms", "max_ms", "mean_ms"), ms)
    name = "cold start, empty kernel cache" if empty_cache else "cold start"
    name = name if bundle is None else f"{name}, kernel bundle"
    shape = {"size": detector.size, "batch": 1, "image_size": list(detector.image_size)}
    counts = {"spread_ms": 0.0, "calls": 1, "warmup": 0, "process_s": round(seconds, 3)}
    return row("cold_start", name, **shape, **same, **counts, **found)


def main(arguments: Sequence[str] | None = None) -> int:
    """The fresh process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch-sizes", type=int, nargs="+")
    parser.add_argument("--bundle")
    options = parser.parse_args(arguments)
    clock = [time.perf_counter()]
    from efficientad.checkpoint.loading import load
    from efficientad.fast.predictor import FastPredictor
    from efficientad.model.synthetic import frames

    clock.append(time.perf_counter())
    detector = load(options.file)
    clock.append(time.perf_counter())
    predictor = FastPredictor(
        detector, device=options.device, dtype=options.dtype, batch_sizes=options.batch_sizes,
        bundle=options.bundle,
    )  # fmt: skip
    clock.append(time.perf_counter())
    frame = frames(1, *predictor.image_size)[0]
    for _ in range(2):
        start = time.perf_counter()
        predictor(frame).cpu()
        clock.append(time.perf_counter() - start)
    first, second = (round(s * 1e3, 2) for s in clock[4:])
    seconds = [round(b - a, 3) for a, b in itertools.pairwise(clock[:4])]
    facts = {name: predictor.facts[name] for name in ("dtype", "device", "backend", "bundle")}
    facts |= dict(zip(("import_s", "load_s", "construction_s"), seconds, strict=True))
    facts |= {"first_call_ms": first, "second_call_ms": second}
    facts |= {"device_mb": round(predictor.max_memory / 1e6, 1), "host_mb": _peak_resident_mb()}
    print(json.dumps(facts))
    return 0


def _peak_resident_mb() -> float | None:
    """Most resident memory of this process; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if sys.platform == "darwin" else 1e3), 1)


if __name__ == "__main__":
    sys.exit(main())

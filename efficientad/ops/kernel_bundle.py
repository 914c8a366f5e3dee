"""Compiled Triton kernels of one architecture as a file, which is read without a compiler.

A safetensors file: the cubins as tensors of bytes, and in the header the table of kernels, what
they were compiled from and with, and a checksum of all of it. The checksum tells of damage, not of
malice: cubins are code, which is run on the GPU.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from efficientad.utils.files import digest_of, replace_file

FORMAT = "efficientad kernels"
FORMAT_VERSION = "1"
MOST_BYTES = 256 << 20  # of a file; one for three batch sizes has some 2 MB
_TEXTS = ("format_version", "arch", "triton", "source", "made_for", "kernels")
_ADVICE = "make it anew with `efficientad bundle`"


class BundleError(ValueError):
    """A kernel bundle that cannot be used: the message says why and what to do."""


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel, compiled for one specialisation of its arguments.

    Attributes:
        function: name of the Triton function, such as "_conv_kernel".
        symbol: of the function in the cubin.
        warps, shared_bytes: of a program; the shared memory is the dynamic one.
        arguments: what the cubin's function takes, in order: (place of the argument among the
            Triton function's, type), the type as Triton writes it ("*fp16", "i32", "fp32"), or for
            a tensor map how it is encoded: {"swizzle", "elem_size", "elem_type", "block_size"}.
        cubin: the machine code, an ELF file.
    """

    function: str
    symbol: str
    warps: int
    shared_bytes: int
    arguments: tuple[tuple[int, str | dict[str, Any]], ...]
    cubin: bytes = field(repr=False)


@dataclass(frozen=True)
class Bundle:
    """Kernels by the key of their specialisation, see `kernel_launch.Specialiser`.

    Attributes:
        arch: compute capability as an integer, 90 for sm_90.
        triton: version that compiled them.
        source: `source_digest()` of the kernels that were compiled.
        made_for: the predictor whose kernels these are, for people.
    """

    arch: int
    triton: str
    source: str
    made_for: dict[str, Any]
    kernels: dict[str, CompiledKernel]

    def unfit(self, arch: int) -> str | None:
        """Why these kernels must not run on sm_`arch` here, or None."""
        try:
            import triton
        except ImportError:  # the launchers are written with it, and the keys are its own
            return f"needs triton {self.triton}, which is not installed (pip install triton)"
        if self.arch != arch:
            return f"is for sm_{self.arch} and the device is sm_{arch}; {_ADVICE} --arch sm_{arch}"
        if self.triton != triton.__version__:
            return (
                f"was compiled by Triton {self.triton} and {triton.__version__} is installed; "
                f"{_ADVICE}"
            )
        if self.source != source_digest():
            return f"was compiled from other kernels than this efficientad has; {_ADVICE}"
        return None

    def facts(self) -> dict[str, Any]:
        """What is in it, for people."""
        size = sum(len(cubin) for cubin in {k.cubin for k in self.kernels.values()})
        return {
            "kernels": f"{len(self.kernels)} for sm_{self.arch}, {size / 1e6:.1f} MB",
            "triton": self.triton,
            **self.made_for,
        }


@functools.cache
def source_digest() -> str:
    """SHA-256 in hexadecimal of the kernels' source files: kernels, tiles and launchers."""
    from efficientad import kernels

    whole = hashlib.sha256()
    for path in sorted(Path(kernels.__path__[0]).glob("*.py")):
        whole.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def write_bundle(bundle: Bundle, path: str | os.PathLike) -> None:
    """Write a bundle, whole or not at all; an existing file is replaced.

    Raises:
        OSError: the file cannot be written.
    """
    cubins = {k.cubin: "" for k in bundle.kernels.values()}  # equal ones are stored once
    names = {cubin: f"{i:03}" for i, cubin in enumerate(cubins)}
    table = [
        {"key": key, **asdict(kernel), "cubin": names[kernel.cubin]}
        for key, kernel in bundle.kernels.items()
    ]
    texts = {
        "format_version": FORMAT_VERSION,
        "arch": str(bundle.arch),
        "triton": bundle.triton,
        "source": bundle.source,
        "made_for": json.dumps(bundle.made_for),
        "kernels": json.dumps(table),
    }
    tensors = {
        name: torch.frombuffer(bytearray(cubin), dtype=torch.uint8) for cubin, name in names.items()
    }
    metadata = {"format": FORMAT, **texts, "sha256": digest_of(tensors, texts)}
    try:
        replace_file(path, lambda part: save_file(tensors, part, metadata), durable=True)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def is_bundle(path: str | os.PathLike) -> bool:
    """Whether a file says in its header that it is a kernel bundle, whole or not."""
    try:
        with open(path, "rb") as file:
            return f'"format":"{FORMAT}"'.encode() in file.read(1 << 16)
    except OSError:
        return False


def read_bundle(path: str | os.PathLike) -> Bundle:
    """Read a file of `write_bundle`, whatever it was compiled for: `Bundle.unfit` judges that.

    Raises:
        FileNotFoundError: there is no such file.
        BundleError: it is damaged, too large, or no kernel bundle.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"kernel bundle {path} is not a file")
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise BundleError(
                f"has {size / 1e6:.0f} MB; a kernel bundle has at most {MOST_BYTES / 1e6:.0f} MB"
            )
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise BundleError("is not a kernel bundle")
            if metadata.get("format_version") != FORMAT_VERSION:
                raise BundleError(
                    f"has format version {metadata.get('format_version')!r} and this efficientad "
                    f"reads {FORMAT_VERSION!r}; {_ADVICE}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        texts = {name: metadata[name] for name in _TEXTS}
        if digest_of(tensors, texts) != metadata.get("sha256"):
            raise BundleError(f"is damaged: its checksum differs; {_ADVICE}")
        return Bundle(
            int(texts["arch"]), texts["triton"], texts["source"], json.loads(texts["made_for"]),
            {row["key"]: _kernel(row, tensors) for row in json.loads(texts["kernels"])},
        )  # fmt: skip
    except BundleError as error:
        raise BundleError(f"kernel bundle {path} {error}") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"kernel bundle {path} cannot be read ({type(error).__name__}: {error}); {_ADVICE}"
        ) from error


def _kernel(row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CompiledKernel:
    arguments = tuple((int(place), kind) for place, kind in row["arguments"])
    return CompiledKernel(
        row["function"], row["symbol"], int(row["warps"]), int(row["shared_bytes"]), arguments,
        tensors[row["cubin"]].numpy().tobytes(),
    )  # fmt: skip

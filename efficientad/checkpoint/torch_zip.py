"""Opens files of torch.save and pickled .npy files as data.

Nothing is allocated on the word of the file: members must be stored uncompressed and lie within the
file, and a storage must have exactly the size of its member.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from efficientad.checkpoint.safe_pickle import (
    MAX_PICKLE_BYTES,
    CheckpointError,
    Placeholder,
    Storage,
    StorageType,
    is_size,
    reading,
    unpickle,
)

MAX_MEMBERS = 100_000


def file_kind(path: str | os.PathLike) -> str:
    """What the first bytes say: "torch", "pickle", "npy", "safetensors", "empty" or "unknown"."""
    with open(path, "rb") as file:
        head = file.read(9)
    if not head:
        return "empty"
    if head.startswith(b"PK\x03\x04"):
        return "torch"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head[8:9] == b"{":  # after a length of 8 bytes, the first of which may be a pickle's 0x80
        return "safetensors"
    return "pickle" if head.startswith(b"\x80") else "unknown"


def read_torch(path: str | os.PathLike) -> object:
    """Read a file of `torch.save` (zip format) as data: dicts, lists, LazyTensors, placeholders.

    The file stays open until the last LazyTensor of the result is gone.

    Raises:
        CheckpointError: damaged, truncated, compressed, TorchScript, big-endian, the format from
            before torch 1.6, or sizes that do not fit the file.
    """
    file_size = Path(path).stat().st_size
    with reading(path):
        if file_kind(path) == "pickle":
            raise CheckpointError(
                "is a bare pickle (torch's format from before 1.6, or no torch file), which is not "
                "read. If you trust it, save it again where it was made: "
                f'python -c "import torch; f = {Path(path).name!r}; '
                "torch.save(torch.load(f, map_location='cpu', weights_only=False), 'new_' + f)\""
            )
        archive = zipfile.ZipFile(path)
        members = {info.filename: info for info in archive.infolist()}
        if len(members) != len(archive.infolist()) or len(members) > MAX_MEMBERS:
            raise CheckpointError("has repeated or too many members; torch writes neither")
        for info in members.values():
            inside = info.file_size == info.compress_size <= file_size - info.header_offset
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or not inside:
                raise CheckpointError(
                    f"member {info.filename!r} is compressed, encrypted or larger than the "
                    "file; torch stores members as they are"
                )
        roots = [name[: -len("data.pkl")] for name in members if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise CheckpointError("is a zip file but not one of torch.save: no data.pkl")
        root = roots[0]
        if f"{root}constants.pkl" in members:
            raise CheckpointError(
                "is a TorchScript program; its weights have no names to go by. Export the "
                "model with torch.save"
            )
        order = members.get(f"{root}byteorder")
        if order is not None and archive.read(order).strip() != b"little":
            raise CheckpointError("is big-endian; save it again on a little-endian machine")

        def storage(pid: tuple) -> Storage | Placeholder:
            _tag, kind, key, _location, numel = pid
            if not isinstance(kind, StorageType):
                return Placeholder(kind)
            if not is_size(numel):
                raise pickle.UnpicklingError(f"a storage of {numel!r} elements")
            info = members.get(f"{root}data/{key}")
            if info is None or info.file_size != numel * kind.dtype.itemsize:
                raise pickle.UnpicklingError(
                    f"storage {key!r} is declared as {numel} x {kind.dtype}; its member has "
                    f"{'no' if info is None else info.file_size} bytes"
                )
            return Storage(kind.dtype, numel, lambda: archive.read(info))

        pickled = members[f"{root}data.pkl"]
        if pickled.file_size > MAX_PICKLE_BYTES:
            raise CheckpointError(f"data.pkl has {pickled.file_size} bytes; too many")
        return unpickle(archive.read(pickled), storage)


def read_npy_object(path: str | os.PathLike) -> object:
    """Read a `.npy` file that holds one pickled object (`numpy.save(path, a_dict)`) as data.

    Raises:
        CheckpointError: damaged, or anything other than one object.
    """
    with reading(path):
        if Path(path).stat().st_size > MAX_PICKLE_BYTES:
            raise CheckpointError(f"is larger than {MAX_PICKLE_BYTES} bytes; a dict is not")
        data = Path(path).read_bytes()
        wide = data[6:7] != b"\x01"  # format 1 has a 2-byte header length, 2 and 3 have 4 bytes
        start = 12 if wide else 10
        end = start + int.from_bytes(data[8:start], "little")
        if not re.search(rb"'descr': '\|O'.*'shape': \(\)", data[start:end]):
            raise CheckpointError("holds an array; expected one pickled dict")
        array = unpickle(data[end:])
        if not isinstance(array, Placeholder):
            raise CheckpointError("holds no pickled array; expected one pickled dict")
        *_version_shape_type_order, values = array.state  # of an object array
        (value,) = values
        return value


def numpy_value(node: object) -> np.ndarray:
    """A pickled float, NumPy float or NumPy array of floats (a placeholder) as a float64 array.

    Raises:
        CheckpointError: anything else, or a size that does not fit its bytes.
    """
    if isinstance(node, float):
        return np.array(node)
    origin, fortran = "", False
    shape: Any = ()
    kind: Any = None
    data: Any = b""
    if isinstance(node, Placeholder):
        origin = node.origin.rpartition(".")[2]
        if origin == "scalar" and len(node.args) == 2:
            kind, data = node.args
        elif origin == "_reconstruct" and isinstance(node.state, tuple) and len(node.state) == 5:
            _version, shape, kind, fortran, data = node.state
            shape = shape[::-1] if fortran else shape
    name = kind.args[0] if isinstance(kind, Placeholder) and kind.args else None
    if name not in ("f2", "f4", "f8") or not isinstance(data, bytes):
        raise CheckpointError(
            f"{origin or type(node).__name__} is not a float or an array of floats"
        )
    order = ">" if isinstance(kind.state, tuple) and ">" in kind.state else "<"
    if math.prod(shape) * int(name[1]) != len(data):
        raise CheckpointError(f"an array of shape {tuple(shape)} of {name} in {len(data)} bytes")
    value = np.frombuffer(data, order + name).reshape(shape).astype(np.float64)
    return value.T if fortran else value

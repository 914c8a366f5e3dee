"""Reads a pickle as data and runs nothing in it.

A pickle is a program: loading one calls whatever it names. Here a file may name torch's functions
that rebuild a tensor, `OrderedDict`, `set` and the storage types, and each is replaced by an inert
function of this file. Every other name becomes a `Placeholder`, which keeps what it was given as
data. Tensors stay in their file (`LazyTensor`) until the caller has checked their shape.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MAX_PICKLE_BYTES = 16 << 20  # the pickle holds names and sizes, not values; real ones are < 1 MB
MAX_PICKLE_OPCODES = 1_000_000
MAX_NAMES = 10_000
_FORBIDDEN_OPCODES = frozenset(
    ("EXT1", "EXT2", "EXT4", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER")
)
_STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class CheckpointError(ValueError):
    """A model file cannot be used; the message names the file, what was found and the rule.

    It is raised without the file's name, which `reading` puts in front.
    """

    named = False


@contextmanager
def naming(what: str | os.PathLike) -> Iterator[None]:
    """Put a name in front of the message of a CheckpointError that has none yet."""
    try:
        yield
    except CheckpointError as error:
        if not error.named:
            error.args, error.named = (f"{what}: {error}",), True
        raise


@contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Turn whatever a damaged or hostile file raises into a CheckpointError that names the file.

    Of several files, one inside the other, the innermost is named.
    """
    with naming(path):
        try:
            yield
        except (CheckpointError, FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # MemoryError and RecursionError too: the file asked for them
            raise CheckpointError(
                f"cannot be read: {type(error).__name__}: {error}. The file is damaged, truncated "
                "or not what its beginning says"
            ) from error


class _Inert:
    """Refuses the state that a pickle may try to set on it (opcode BUILD)."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("the pickle changes an object that has no state")


class LazyTensor(_Inert):
    """A tensor that is still in its file: `shape`, and `read()`, which gives a new tensor."""

    __slots__ = ("read", "shape")

    def __init__(self, shape: tuple[int, ...], read: Callable[[], Tensor]) -> None:
        self.shape = shape
        self.read = read

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """A tensor that is in memory already; `read()` gives the tensor itself."""
        return cls(tuple(tensor.shape), lambda: tensor)


class Placeholder:
    """Stands for an object of a class that is not known here, and does nothing.

    Attributes:
        origin: the name that the file gave, "module.name".
        args: what the class or function would have been called with.
        state: what would have been its `__dict__` (or whatever its `__setstate__` takes).
        entries, mapping: what would have been appended and assigned by key; None if nothing was.
    """

    __slots__ = ("args", "entries", "mapping", "state")
    origin = ""
    args: tuple[Any, ...]
    state: Any
    entries: list[Any] | None
    mapping: dict[Any, Any] | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        self = object.__new__(cls)
        self.args, self.state, self.entries, self.mapping = args, None, None, None
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Placeholder:
        return Placeholder(self, *args)

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        self.mapping = {} if self.mapping is None else self.mapping
        self.mapping[key] = value

    def append(self, value: object) -> None:
        self.extend((value,))

    def extend(self, values: Iterable[object]) -> None:
        self.entries = [] if self.entries is None else self.entries
        self.entries.extend(values)

    add = append


def attributes(node: object) -> dict:
    """The `__dict__` that a placeholder's object would have had; {} if there was none."""
    state = node.state if isinstance(node, Placeholder) else None
    parts = state if isinstance(state, tuple) else (state,)  # (__dict__, slots)
    return {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}


def mapping(node: object) -> dict:
    """The entries of a dict, or of a placeholder that was filled by key; {} for anything else."""
    if isinstance(node, Placeholder):
        return node.mapping or {}
    return node if isinstance(node, dict) else {}


class _Dict(dict):
    """Stands for OrderedDict; attributes (a state dict's `_metadata`) are dropped."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


class _Call(_Inert):
    """One of the functions that a file may name; `_ALLOWED` is the list."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable) -> None:
        self._function = function

    def __call__(self, *args):
        return self._function(*args)


class StorageType(_Inert):
    """The element type of a storage, by torch's old name for it (FloatStorage)."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class Storage(_Inert):
    """The values of one or more tensors, in their file; `read()` gives the bytes."""

    __slots__ = ("dtype", "numel", "read")

    def __init__(self, dtype: torch.dtype, numel: int, read: Callable[[], bytes]) -> None:
        self.dtype, self.numel, self.read = dtype, numel, read


def is_size(value: object) -> bool:
    """Whether `value` is an integer that a size, stride or offset can have."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _rebuild_tensor(storage, offset, size, stride, *_unused) -> LazyTensor | Placeholder:
    if not isinstance(storage, Storage):  # of a type that no model file of ours has
        return Placeholder(storage, offset, size, stride)
    size, stride = tuple(size), tuple(stride)
    if len(size) != len(stride) or len(size) > 8 or not all(map(is_size, (offset, *size, *stride))):
        raise pickle.UnpicklingError(f"a tensor of size {size}, stride {stride}, offset {offset}")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and (last >= storage.numel or count > storage.numel):
        raise pickle.UnpicklingError(
            f"a tensor of size {size}, stride {stride} and offset {offset} in a storage of "
            f"{storage.numel} elements"
        )

    def read() -> Tensor:
        if not count:
            return torch.empty(size, dtype=storage.dtype)
        flat = torch.frombuffer(bytearray(storage.read()), dtype=storage.dtype)
        return flat.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)

    return LazyTensor(size, read)


_ALLOWED: dict[tuple[str, str], object] = {
    ("torch._utils", "_rebuild_tensor"): _Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(lambda data, *_unused: data),
    ("torch._utils", "_rebuild_parameter_with_state"): _Call(lambda data, *_unused: data),
    ("torch._tensor", "_rebuild_from_type_v2"): _Call(lambda call, _type, args, _s: call(*args)),
    ("collections", "OrderedDict"): _Call(_Dict),
    ("builtins", "set"): _Call(set),
    ("__builtin__", "set"): _Call(set),
    **{("torch", name): StorageType(dtype) for name, dtype in _STORAGE_DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, storage: Callable[[tuple], object]) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._storage = storage
        self._names: dict[tuple[str, str], type[Placeholder]] = {}

    def find_class(self, module: str, name: str) -> object:
        allowed = _ALLOWED.get((module, name))
        if allowed is not None:
            return allowed
        if (module, name) not in self._names:
            if len(self._names) >= MAX_NAMES:
                raise pickle.UnpicklingError(f"more than {MAX_NAMES} different names")
            fields = {"__slots__": (), "origin": f"{module}.{name}"}
            self._names[module, name] = type("Placeholder", (Placeholder,), fields)
        return self._names[module, name]

    def persistent_load(self, pid: Any) -> object:
        return self._storage(pid)


def unpickle(data: bytes, storage: Callable[[tuple], object] | None = None) -> object:
    """Read a pickle as data; whatever is wrong with it is raised as it comes, see `reading`.

    Args:
        data: the pickle.
        storage: gives the `Storage` of a persistent id of torch; None: there are none.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise pickle.UnpicklingError(f"a pickle of {len(data)} bytes; at most {MAX_PICKLE_BYTES}")
    # The C unpickler allocates what these opcodes declare before it looks; so look first.
    for count, (opcode, arg, _) in enumerate(pickletools.genops(data)):
        if count > MAX_PICKLE_OPCODES:
            raise pickle.UnpicklingError(f"a pickle of more than {MAX_PICKLE_OPCODES} steps")
        if opcode.name in _FORBIDDEN_OPCODES:
            raise pickle.UnpicklingError(f"opcode {opcode.name}, which no model file needs")
        if arg is None or not opcode.name.endswith("PUT"):
            continue
        if not 0 <= arg <= MAX_PICKLE_OPCODES:
            raise pickle.UnpicklingError(f"memo entry {arg}")

    def no_storage(pid: object) -> Storage:
        raise pickle.UnpicklingError("a storage outside of a torch file")

    return _Unpickler(data, storage or no_storage).load()

"""Launches of the kernels through a bundle, and what tells one compiled kernel from another."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficientad.ops import cuda_driver
from efficientad.ops.kernel_bundle import Bundle, BundleError, read_bundle
from efficientad.ops.operators import kernel


@dataclass(frozen=True)
class Specialised:
    """A launch as Triton sees it.

    Attributes:
        key: equal for launches that one compiled kernel serves: the function, types, alignments
            and constants by Triton's own rules, and the options.
        values: by argument, in the function's order.
        types: per argument (type, alignment or constant), Triton's.
        options: launch options and constants, by name.
    """

    key: str
    values: dict[str, Any]
    types: list
    options: dict[str, Any]


class Specialiser:
    """Launches on sm_`arch`, specialised by Triton's rules without a driver or a compiler."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler.compiler import make_backend

        self.target = GPUTarget("cuda", arch, 32)
        self.backend = make_backend(self.target)
        self._binders: dict[str, Callable] = {}

    def __call__(self, function: Any, args: tuple, options: dict[str, Any]) -> Specialised:
        """What a launch of a `triton.jit` function with these arguments needs."""
        from triton.runtime.jit import create_function_from_signature

        name = function.__name__
        binder = self._binders.get(name)
        if binder is None:
            binder = create_function_from_signature(
                function.signature, function.params, self.backend
            )
            self._binders[name] = binder
        values, types, launch_options = binder(*args, **options)
        key = f"{name} {types} {sorted(launch_options.items())}"
        return Specialised(key, values, types, options)


class BundleLaunch:
    """A way of `kernels.launching` through a bundle; what it lacks is left to Triton, and said.

    Attributes:
        path: of the bundle; lacking: names of the functions that were left to Triton.
    """

    def __init__(self, bundle: Bundle, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.lacking: set[str] = set()
        self._bundle = bundle
        self._specialise = Specialiser(bundle.arch)
        self._used: set[str] = set()
        self._failed: str | None = None

    def __call__(self, function: Any, programs: int, args: tuple, options: dict) -> bool:
        launch = self._specialise(function, args, options)
        compiled = self._bundle.kernels.get(launch.key)
        if compiled is None:
            self._lacks(function.__name__)
            return False
        values = list(launch.values.values())
        arguments = cuda_driver.Arguments()
        for place, kind in compiled.arguments:
            if isinstance(kind, str):
                arguments.add(kind, values[place])
            else:
                arguments.add_map(values[place], kind)
        for _ in range(2):  # scratch memory, global and of the profiler: no kernel here has any
            arguments.add("u64", 0)
        device, stream = cuda_driver.current()
        entry = cuda_driver.load(compiled.cubin, compiled.symbol, compiled.shared_bytes, device)
        cuda_driver.launch(
            entry, programs, compiled.warps, compiled.shared_bytes, stream, arguments
        )
        self._used.add(launch.key)
        return True

    def _lacks(self, name: str) -> None:
        if name not in self.lacking:
            self.lacking.add(name)
            warnings.warn(
                f"kernel bundle {self.path} lacks {name} as it is launched here, and Triton "
                "compiles it; make the bundle for this predictor with `efficientad bundle`",
                stacklevel=2,
            )

    def give_up(self, problem: str) -> None:
        """Say that its kernels failed, and that they are compiled."""
        self._failed = problem
        warnings.warn(
            f"kernel bundle {self.path} is not used: {problem}. The kernels are compiled here",
            stacklevel=2,
        )

    def described(self) -> str:
        """In words: where the kernels have come from so far."""
        if self._failed is not None:
            return f"{self.path}: not used: {self._failed}"
        text = f"{self.path}: {len(self._used)} kernels launched from it"
        return f"{text}, compiled here: {', '.join(sorted(self.lacking))}" if self.lacking else text


def open_bundle(path: str | os.PathLike, arch: int) -> BundleLaunch:
    """The way through a bundle on a device of sm_`arch`.

    Raises:
        FileNotFoundError: there is no such file.
        BundleError: it is damaged, or was made for another architecture, Triton or package.
    """
    bundle = read_bundle(path)
    problem = bundle.unfit(arch)
    if problem is not None:
        raise BundleError(f"kernel bundle {path} {problem}")
    return BundleLaunch(bundle, path)


def overlapped() -> contextlib.AbstractContextManager[None]:
    """See `kernels.launching.overlapped`."""
    from efficientad.kernels import launching

    return launching.overlapped()


def kernel_by(operation: str, way: Callable | None = None, target: int | None = None) -> Callable:
    """`operators.kernel` whose launches go a way first, and that takes tiles for `target`."""
    from efficientad.kernels import launching

    function = kernel(operation)
    if way is None and target is None:
        return function
    more = {} if target is None else {"target": target}

    def through(*args: Any, **options: Any) -> Any:
        if way is None:
            return function(*args, **options, **more)
        with launching.by(way):
            return function(*args, **options, **more)

    return through

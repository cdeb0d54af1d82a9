"""Importable stand-ins for Triton and torchvision, which SGLang imports at module level and never runs on a CPU.

PyPI's torchvision is a CUDA build that breaks transformers beside a CPU torch, and Triton weighs 1 GB, so neither is
installed. A stand-in takes effect only where the real package is missing; any *use* of one beyond decoration and
arithmetic on sizes fails with an AttributeError or TypeError, never with a wrong number.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGES = ("triton", "torchvision")
SERVER_PACKAGES = ("soundfile",)  # imported by the transcription endpoint of the HTTP server


def install(packages: Sequence[str] = PACKAGES) -> None:
    """Make `packages` importable where they are missing. Idempotent; must run before what imports them."""
    missing = [package for package in packages if _is_missing(package)]
    if not missing:
        return
    _settle_optional_imports()
    sys.meta_path.append(_Finder(tuple(missing)))


def _is_missing(package: str) -> bool:
    return package not in sys.modules and importlib.util.find_spec(package) is None


def _settle_optional_imports() -> None:
    """Let transformers and torch find out, and remember, that the packages are absent before they become importable.

    Otherwise transformers builds torchvision image processors, and torch.inductor subclasses Triton's types.
    """
    import torch._inductor.runtime.triton_compat  # noqa: F401  (binds its branch without Triton)
    from torch.utils import _triton
    from transformers.utils import is_torchvision_available

    _triton.has_triton_package()
    _triton.has_triton()
    is_torchvision_available()


class _Finder(MetaPathFinder, Loader):
    """Finds any submodule of the missing packages; last on `sys.meta_path`, so a real package always wins."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self._packages = packages

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in self._packages:
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _StandIn(spec.name)
        if spec.name == "triton":
            # Read at import time: a version to compare, and two size helpers that are used as functions.
            vars(module).update(__version__="3.0.0", cdiv=_ceil_div, next_power_of_2=_next_power_of_two)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


class _StandIn(ModuleType):
    """A module of which every public name exists: a class where capitalised or a known type, else a decorator."""

    _TYPES = ("constexpr", "dtype")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        is_type = name[:1].isupper() or name in self._TYPES
        value: Any = _InertType(name, (), {"__init__": _accept_anything}) if is_type else _undecorated
        setattr(self, name, value)
        return value


class _InertType(type):
    """A type whose members are names: enough for annotations, defaults and enum-like look-ups at import time."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


def _accept_anything(self: object, *args: object, **kwargs: object) -> None:
    """`__init__` of an inert type."""


def _undecorated(*args: Any, **kwargs: Any) -> Any:
    """Act as a decorator, or as a factory of one: the function comes back as it was."""
    if len(args) == 1 and callable(args[0]) and not kwargs:
        return args[0]
    return lambda function: function


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length() if number > 0 else 1

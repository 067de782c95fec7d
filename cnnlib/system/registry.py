"""Registries: tables that map names to things that are declared once, such as experiments and architectures."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from cnnlib.errors import UserError

T = TypeVar("T")
D = TypeVar("D", bound=Callable[..., Any])


class Registry(Generic[T]):
    """A table that maps names to functions. Each function returns the thing that has the name, for example a model.

    `register` is a decorator. The function's name becomes the entry's name, so every name is an identifier. If the
    entries are in a package that must be imported first, `package` is its name. The registry imports it at the first
    look-up.
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind = kind
        self._package = package
        self._declarations: dict[str, Callable[[], T]] = {}

    def _known(self) -> dict[str, Callable[[], T]]:
        if self._package is not None:
            importlib.import_module(self._package)
        return self._declarations

    def register(self, declaration: D) -> D:
        """Add a function without required arguments under its own name. Raises ValueError if the name is taken."""
        name = declaration.__name__
        if name in self._declarations:
            raise ValueError(f"the {self.kind} {name!r} is declared twice")
        self._declarations[name] = declaration
        return declaration

    def declaration(self, name: str) -> Callable[[], T]:
        """Return the function registered as `name`. Raises UserError if it is unknown; the message lists all names."""
        if name not in self._known():
            raise UserError(f"no {self.kind} {name!r}; there are: {', '.join(self)}")
        return self._declarations[name]

    def get(self, name: str) -> T:
        """Call the function registered as `name` and return its result. Raises UserError if the name is unknown."""
        return self.declaration(name)()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._known()))

    def __contains__(self, name: object) -> bool:
        return name in self._known()

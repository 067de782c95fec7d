"""Names for things that are declared once: experiments and architectures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from cnnlib.errors import UserError

T = TypeVar("T")
D = TypeVar("D", bound=Callable[..., Any])


class Registry(Generic[T]):
    """A table from a name to the function that declares the thing of that name.

    `register` is a decorator; the function's name is the entry's name, so a name is always an identifier.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._declarations: dict[str, Callable[[], T]] = {}

    def register(self, declaration: D) -> D:
        """Adds a declaration, which is called without arguments, under its name; a taken name raises ValueError."""
        name = declaration.__name__
        if name in self._declarations:
            raise ValueError(f"the {self.kind} {name!r} is declared twice")
        self._declarations[name] = declaration
        return declaration

    def declaration(self, name: str) -> Callable[[], T]:
        """The declaring function; an unknown name raises UserError with the names that exist."""
        if name not in self._declarations:
            raise UserError(f"no {self.kind} {name!r}; there are: {', '.join(self)}")
        return self._declarations[name]

    def get(self, name: str) -> T:
        """The thing itself, declared anew at each call; an unknown name raises UserError."""
        return self.declaration(name)()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._declarations))

    def __contains__(self, name: object) -> bool:
        return name in self._declarations

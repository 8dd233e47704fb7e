"""Chooses the implementation of each operation.

An operation lists its implementations in order of preference.  The first one that runs on the
platform and supports the arguments is used.  At least one implementation of each operation runs on
every platform and supports all arguments.  To request an implementation by name:

    with ops.use(attention="xla"):          # in code
    config.compute.ops = "attention=xla"    # in a training configuration
    VL2JAX_OPS=attention=xla,experts=dense  # in the environment, for any program

A requested implementation is tried first.  If it does not support the arguments, the others are
tried in their order.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax

from vl2jax.common.errors import UserError
from vl2jax.ops.platform import platform

ENVIRONMENT = "VL2JAX_OPS"

# ((operation, implementation), ...), part of jit's cache key.
_requested = jax.make_user_context(())
_operations: dict[str, "Operation"] = {}
_listener: Callable[[str], None] | None = None


def _serves_all(*_args: Any, **_options: Any) -> str:
    return ""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One implementation of an operation.

    Attributes:
      name: name to request it by.
      run: computes the operation.
      platforms: platforms it runs on; (): all.
      refuses: takes the operation's arguments; returns why it does not support them, or "" if it
        does.
    """

    name: str
    run: Callable[..., Any]
    platforms: tuple[str, ...] = ()
    unsupported: Callable[..., str] = _serves_all

    def why_not(self, *args: Any, **options: Any) -> str:
        """Why it cannot run with these arguments on the current platform, or "" if it can."""
        if self.platforms and platform() not in self.platforms:
            return f"runs on {' and '.join(self.platforms)} only"
        return self.unsupported(*args, **options)


class Operation:
    """An operation and its implementations; calling it chooses one and runs it.

    The choice is made while a program is traced, so the compiled program does not pay for it.
    """

    def __init__(self, name: str, *implementations: Implementation):
        self.name = name
        self.implementations = {one.name: one for one in implementations}
        _operations[name] = self

    def __call__(self, *args: Any, prefer: str | None = None, **options: Any) -> Any:
        """Runs the implementation that `choose` returns for these arguments."""
        return self.choose(*args, prefer=prefer, **options).run(*args, **options)

    def choose(self, *args: Any, prefer: str | None = None, **options: Any) -> Implementation:
        """Returns the first implementation that supports these arguments on this platform.

        Args:
          *args, **options: the arguments of the operation.
          prefer: name of the implementation to try first; None: none.  An implementation requested
            with `use` or in the environment takes precedence.
        """
        rejected = []
        for one in self._in_order(prefer):
            reason = one.why_not(*args, **options)
            if not reason:
                self._report(one, rejected, args[0])
                return one
            rejected.append(f"{one.name}: {reason}")
        raise AssertionError(f"operation {self.name} has no implementation for these arguments")

    def _report(self, chosen: Implementation, rejected: list[str], first_argument: Any) -> None:
        if _listener is not None:
            why = f" (not {'; '.join(rejected)})" if rejected else ""
            _listener(f"{self.name} of {_shape(first_argument)}: {chosen.name}{why}")

    def _in_order(self, prefer: str | None = None) -> list[Implementation]:
        requested = dict((*_from_environment(), *_requested.value)).get(self.name, prefer)
        rest = [one for name, one in self.implementations.items() if name != requested]
        return rest if requested is None else [self.implementations[requested], *rest]


def use(**implementations: str) -> contextlib.AbstractContextManager:
    """Context manager that requests implementations by operation: `use(attention="xla")`.

    Args:
      **implementations: the name of an implementation for each operation.

    Raises:
      UserError: an operation or an implementation does not exist.
    """
    _check(implementations)
    return _requested((*_requested.value, *implementations.items()))


def parse(text: str) -> dict[str, str]:
    """Parses "attention=xla,experts=dense" to the arguments of `use`.

    Args:
      text: comma-separated operation=implementation; "" for none.

    Returns:
      The implementation requested for each operation.

    Raises:
      UserError: the text has another form, or an operation or an implementation does not exist.
    """
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    found = {name.strip(): value.strip() for name, _, value in pairs}
    _check(found)
    return found


def describe_choices() -> list[tuple[str, str, str]]:
    """Describes the choice for each operation on this platform, whatever the arguments.

    Returns:
      (operation, implementation tried first, remark on the other implementations) for each
      operation.
    """
    found = []
    for operation in _operations.values():
        available = [
            one for one in operation._in_order() if not one.platforms or platform() in one.platforms
        ]
        unavailable = [
            f"{one.name} on {' and '.join(one.platforms)} only"
            for one in operation.implementations.values()
            if one not in available
        ]
        remarks = [f"else {', '.join(one.name for one in available[1:])}"] if available[1:] else []
        found.append((operation.name, available[0].name, "; ".join(remarks + unavailable)))
    return found


def report_choices(listener: Callable[[str], None] | None) -> None:
    """Reports choices: calls `listener` with one line per choice; None stops the reports."""
    global _listener
    # The cache suppresses repeated lines.
    _listener = None if listener is None else functools.cache(listener)


def _check(implementations: dict[str, str]) -> None:
    for name, implementation in implementations.items():
        if name not in _operations:
            raise UserError(f"no operation {name!r}; choose one of {', '.join(_operations)}")
        if implementation not in (known := _operations[name].implementations):
            raise UserError(
                f"operation {name} has no implementation {implementation!r}; choose one of"
                f" {', '.join(known)}"
            )


def _from_environment() -> tuple[tuple[str, str], ...]:
    return tuple(parse(os.environ.get(ENVIRONMENT, "")).items())


def _shape(value: Any) -> str:
    is_array = hasattr(value, "shape") and hasattr(value, "dtype")
    return f"{value.dtype.name}{list(value.shape)}" if is_array else f"{value}"

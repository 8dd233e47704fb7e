"""Which implementation of an operation runs: one table per operation, the best first.

The first implementation that is for the platform and serves the arguments is taken.  The last one
of a table is for every platform and serves everything.  To try another one:

    with ops.use(attention="xla"):          # in code
    config.compute.ops = "attention=xla"    # in a training configuration
    VL2JAX_OPS=attention=xla,experts=dense  # in the environment, for any program

What is asked for so comes first in the table; where it does not serve, the rest follows.
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

# ((operation, implementation), ...); part of jit's cache keys, as the platform is.
_asked_for = jax.make_user_context(())
_operations: dict[str, "Operation"] = {}
_listener: Callable[[str], None] | None = None


def _serves_all(*_args: Any, **_options: Any) -> str:
    return ""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
      name: by which it is asked for.
      run: takes the operation's arguments.
      platforms: that it is for; none: all.
      refuses: takes the operation's arguments; says why they are not served, "" where they are.
    """

    name: str
    run: Callable[..., Any]
    platforms: tuple[str, ...] = ()
    refuses: Callable[..., str] = _serves_all

    def reason_against(self, *args: Any, **options: Any) -> str:
        """Why it does not serve these arguments in this program; "" where it does."""
        if self.platforms and platform() not in self.platforms:
            return f"for {' and '.join(self.platforms)}"
        return self.refuses(*args, **options)


class Operation:
    """An operation and its implementations; calling it chooses one and runs it.

    Choosing happens while a program is traced, and costs nothing when it runs.
    """

    def __init__(self, name: str, *implementations: Implementation):
        self.name = name
        self.implementations = {one.name: one for one in implementations}
        _operations[name] = self

    def __call__(self, *args: Any, prefer: str | None = None, **options: Any) -> Any:
        """Runs the implementation that is chosen; `prefer`: one that comes first unless asked
        otherwise."""
        return self.choose(*args, prefer=prefer, **options).run(*args, **options)

    def choose(self, *args: Any, prefer: str | None = None, **options: Any) -> Implementation:
        """The implementation for these arguments, in the program that is being traced."""
        passed_over = []
        for one in self._in_order(prefer):
            reason = one.reason_against(*args, **options)
            if not reason:
                self._tell(one, passed_over, args[0])
                return one
            passed_over.append(f"{one.name}: {reason}")
        raise AssertionError(f"operation {self.name} has no implementation that serves everything")

    def _tell(self, chosen: Implementation, passed_over: list[str], of: Any) -> None:
        if _listener is not None:
            why = f" (not {'; '.join(passed_over)})" if passed_over else ""
            _listener(f"{self.name} of {_shape(of)}: {chosen.name}{why}")

    def _in_order(self, prefer: str | None = None) -> list[Implementation]:
        asked = dict((*_from_environment(), *_asked_for.value)).get(self.name, prefer)
        rest = [one for name, one in self.implementations.items() if name != asked]
        return rest if asked is None else [self.implementations[asked], *rest]


def use(**implementations: str) -> contextlib.AbstractContextManager:
    """Within it these implementations come first: `use(attention="xla")`.

    Raises:
      UserError: no such operation, or it has no such implementation.
    """
    _check(implementations)
    return _asked_for((*_asked_for.value, *implementations.items()))


def parse(text: str) -> dict[str, str]:
    """Reads "attention=xla,experts=dense" for `use`.

    Raises:
      UserError: not of this form, or what `use` refuses.
    """
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    found = {name.strip(): value.strip() for name, _, value in pairs}
    _check(found)
    return found


def describe() -> list[tuple[str, str, str]]:
    """For each operation what comes first on this platform, and what else there is and why.

    Returns:
      (operation, implementation, remark) for each.
    """
    found = []
    for operation in _operations.values():
        here = [
            one for one in operation._in_order() if not one.platforms or platform() in one.platforms
        ]
        elsewhere = [
            f"{one.name} for {' and '.join(one.platforms)}"
            for one in operation.implementations.values()
            if one not in here
        ]
        remarks = [f"else {', '.join(one.name for one in here[1:])}"] if here[1:] else []
        found.append((operation.name, here[0].name, "; ".join(remarks + elsewhere)))
    return found


def tell(listener: Callable[[str], None] | None) -> None:
    """Calls `listener` with a line for each choice that is new; None ends that."""
    global _listener
    # Each line is passed on the first time that it comes.
    _listener = None if listener is None else functools.cache(listener)


def _check(implementations: dict[str, str]) -> None:
    for name, implementation in implementations.items():
        if name not in _operations:
            raise UserError(f"there is no operation {name!r}; there are {', '.join(_operations)}")
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

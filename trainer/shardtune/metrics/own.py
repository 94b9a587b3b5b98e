"""Metrics of your own, module:function: found, tried, and called with messages that say what is wrong in them."""

from __future__ import annotations

import difflib
import importlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from numbers import Real
from types import ModuleType
from typing import Any

from shardtune.errors import ConfigError

_TRIED_WITH = "a short text"
_SHOWN = 60
"""Characters of a text in a message."""


class Own:
    """A function of a prediction and a reference, both texts, that returns a number; higher is better."""

    def __init__(self, name: str) -> None:
        """`name`: module:function; the module is one of the current folder or an installed one.

        Raises ConfigError where there is no such module or function.
        """
        self.name = name
        self._function = _found(name)

    def __call__(self, prediction: str, references: Sequence[str]) -> float:
        """The number; of several references the highest. Raises ConfigError where the function fails or gives none."""
        return max(self._of(prediction, reference) for reference in references)

    def _of(self, prediction: str, reference: str) -> float:
        given = f"given prediction {_short(prediction)} and reference {_short(reference)}"
        try:
            value = self._function(prediction, reference)
        except Exception as error:
            raise ConfigError(f"evaluation.metrics: {self.name} failed, {given}: {_described(error)}") from error
        # numpy's True is no Real, unlike Python's own.
        number = value.item() if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () else value
        if not isinstance(number, Real) or not math.isfinite(number):
            kind = f"{number}" if isinstance(number, Real) else type(value).__name__
            raise ConfigError(f"evaluation.metrics: {self.name} returned {kind}, not a finite number, {given}")
        return float(number)


def check_own(names: Sequence[str], reference: str = _TRIED_WITH) -> None:
    """Imports those of `names` that are module:function and tries each: on `reference` as the prediction, and on an
    empty prediction, because models write such.

    Raises ConfigError where one is not found, fails or returns no number. Imports nothing slow itself.
    """
    for name in names:
        if ":" in name:
            own = Own(name)
            own(reference, [reference])
            own("", [reference])


def _found(name: str) -> Callable[[str, str], Any]:
    module_name, _, function_name = name.partition(":")
    module = _imported(name, module_name)
    function = getattr(module, function_name, None)
    if callable(function):
        return function
    where = getattr(module, "__file__", None) or module_name
    if function is not None:
        raise ConfigError(f"evaluation.metrics: {name}: {function_name} in {where} is no function")
    near = difflib.get_close_matches(function_name, [key for key, value in vars(module).items() if callable(value)], 1)
    hint = f"; did you mean {module_name}:{near[0]}?" if near else ""
    raise ConfigError(f"evaluation.metrics: {name}: {where} has no function {function_name}{hint}")


def _imported(name: str, module_name: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        # It stays there: a function may import its neighbours when it is called. Last, so that it hides nothing.
        sys.path.append(here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"evaluation.metrics: {name}: {module_name} needs {error.name}, which is absent"
            ) from error
        raise ConfigError(
            f"evaluation.metrics: {name}: no module {module_name}, neither in {here} nor among installed packages"
        ) from error
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"evaluation.metrics: {name}: {module_name} cannot be imported: {_described(error)}"
        ) from error


def _described(error: BaseException) -> str:
    """What and where: the innermost line of the error's trace, or the line that cannot be read."""
    if isinstance(error, SyntaxError):
        return f"{error.msg} ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")

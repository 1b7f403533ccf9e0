"""Import all modules of a package, and users' own functions that a configuration names as `module:function`."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megalign.schema import UserError

LONGEST_MESSAGE = 200
PACKAGE = Path(__file__).resolve().parent


def import_modules(package: str, folders: Iterable[str]) -> None:
    """Import every module in a package's folders, so that each registers its declarations."""
    for module in pkgutil.iter_modules(folders):
        importlib.import_module(f"{package}.{module.name}")


def find_function(field: str, spec: str, *, signature: str) -> Callable[..., Any]:
    """Return the function that `module:function` names; raise a UserError that begins with `field` if there is none.

    signature: the function's arguments, for the error.
    """
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name or module_name.startswith(".") or "/" in module_name:
        raise UserError(f"{field} is {spec!r}: must be module:function, the module without folder or .py")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        lost = isinstance(error, ModuleNotFoundError) and error.name == module_name.split(".")[0]
        looked = f"; looked for in {_module_folders()}; PYTHONPATH adds to these" if lost else ""
        looked += "; must be named without .py" if module_name.endswith(".py") else ""
        raise UserError(f"{field} is {spec!r}: module {module_name!r} cannot be imported: {error}{looked}") from error
    except (Exception, SystemExit) as error:
        reason = f"module {module_name!r} cannot be imported: it raised {describe(error)}"
        raise UserError(f"{field} is {spec!r}: {reason}") from error
    function = getattr(module, function_name, None)
    if function is None:
        raise UserError(f"{field} is {spec!r}: module {module_name!r} has no {function_name!r}")
    if not callable(function):
        raise UserError(f"{field} is {spec!r}: {function_name!r} must be a function {signature}")
    return function


def is_module(name: str) -> bool:
    """Whether a module of that name can be imported; nothing is imported to know it."""
    return name.isidentifier() and importlib.util.find_spec(name) is not None


def describe(error: BaseException) -> str:
    """Return an error in one line: its class, its message, and the innermost line of the user's own code."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # the user's own exception class may fail to format itself
        text = "(its message cannot be read)"
    text = text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + "..."
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(Path(frame.filename))]
    where = f" ({Path(frames[-1].filename).name} line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"


def _module_folders() -> str:
    """Return the folders of sys.path as text for an error, with Python's own summarised."""
    own = sysconfig.get_path("stdlib"), sys.prefix, sys.base_prefix
    folders = [folder or str(Path.cwd()) for folder in sys.path if not folder.startswith(own)]
    return ", ".join([*dict.fromkeys(folders), "the installed packages"])


def _is_users(path: Path) -> bool:
    """Return whether a file belongs to neither megalign, nor Python, nor an installed package."""
    others = [PACKAGE, *(Path(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib"))]
    return path.is_file() and not any(path.resolve().is_relative_to(other.resolve()) for other in others)

"""The reader's module from the command line: `file.py:Layer` or `package.module:Layer`."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

from torch import nn

from convlab.diagnosing.subject import describe


def load(target: str, arguments: str = "") -> nn.Module:
    """Import the file or module and make the layer.

    Args:
        target: "FILE.py:NAME" or "PACKAGE.MODULE:NAME"; NAME is a class, a function that returns a
            module, or a module; dots reach into it.
        arguments: of the class or function, as one writes them in a call: "16, 32, padding=1".
            Numbers, texts, tuples, lists, True, False and None.

    Raises:
        ValueError: one sentence that says what is missing or fails, with the file's line.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise ValueError(f"target must be FILE.py:NAME or PACKAGE.MODULE:NAME, got {target!r}")
    positional, named = parse_arguments(arguments)
    found: object = _module(place)
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"target must name something in {place}, which has no {name!r}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        if arguments:
            raise ValueError(f"args must be empty, got {arguments!r}: {name} is a module already")
        return found
    if not callable(found):
        kind = type(found).__name__
        raise ValueError(f"target must name a class, a function or a module, {name} is a {kind}")
    try:
        inspect.signature(found).bind(*positional, **named)
    except TypeError as error:
        raise ValueError(
            f"args must fit {name}{inspect.signature(found)}, got {arguments!r}: {error}"
        ) from None
    except ValueError:  # no signature to be had
        pass
    try:
        layer = found(*positional, **named)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ValueError(f"{name}({arguments}) failed: {describe(error)}") from error
    if not isinstance(layer, nn.Module):
        kind = type(layer).__name__
        raise ValueError(f"target must make an nn.Module, {name}({arguments}) made a {kind}")
    return layer


def parse_arguments(text: str) -> tuple[list, dict]:
    """ "16, 32, padding=1" → ([16, 32], {"padding": 1}); nothing is run."""
    wanted = f"args must be the arguments of a call, like '16, 32, padding=1', got {text!r}"
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or any(k.arg is None for k in call.keywords):
            raise ValueError
        positional = [ast.literal_eval(value) for value in call.args]
        return positional, {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(wanted) from None


def _module(place: str) -> ModuleType:
    path = Path(place)
    if path.suffix != ".py":
        return _import(place, lambda: importlib.import_module(place), Path.cwd())
    if not path.is_file():
        raise ValueError(f"target must name an existing file, got {place!r}")
    path = path.resolve()

    def run() -> ModuleType:
        taken = path.stem in sys.modules and getattr(sys.modules[path.stem], "__file__", "")
        name = path.stem if taken in (False, str(path)) else f"diagnosed_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickle look it up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module

    return _import(place, run, path.parent)


def _import(place: str, run, folder: Path) -> ModuleType:
    """`run()` with `folder` where imports are looked for first, as Python does for a script."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        return run()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ValueError(f"target {place!r} cannot be imported: {describe(error)}") from error

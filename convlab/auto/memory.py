"""What was chosen: in memory, and in `auto.json` for the processes to come.

The file lies in the folder $CONVLAB_CACHE, else in `convlab/` of the user's cache folder;
CONVLAB_CACHE="" keeps no file. It is read once, and again when something is added. No fault of the
file is an error: there is one warning, and choices are kept in memory.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

FORMAT = 1


@dataclass(frozen=True)
class Choice:
    """What was measured for one kind of call.

    Attributes:
        kind: everything that the choice depends on, as JSON holds it.
        algorithm: the name of the fastest.
        seconds: candidate → median seconds per call, of so many `rounds`.
        ratios: candidate → 95 % interval of its time over `native`'s, from common rounds.
        skipped: candidate → why it got no rounds.
        time: when, UTC.
        file: where it was read from; "" if this process measured it.
    """

    kind: dict
    algorithm: str
    seconds: dict[str, float]
    rounds: dict[str, int]
    ratios: dict[str, tuple[float, float]]
    skipped: dict[str, str]
    time: str
    file: str = ""


_choices: dict[str, Choice] = {}  # by `_text` of the kind
_done: set[str] = set()  # "read": the file was; "warned": of its fault


def recall(kind: dict) -> Choice | None:
    """What is known of `kind`."""
    if "read" not in _done:
        _done.add("read")
        _load()
    return _choices.get(_text(kind))


def remember(choice: Choice) -> None:
    """Keep `choice`; not in the file if nothing was timed, as what went wrong may be over soon."""
    _choices[_text(choice.kind)] = choice
    if choice.seconds and (path := cache_file()):
        _save(path, choice)


def forget() -> None:
    """Drop every choice, here and in the file; OSError if that cannot be deleted."""
    _choices.clear()
    _done.clear()
    if path := cache_file():
        path.unlink(missing_ok=True)


def cache_file() -> Path | None:
    """Where choices are kept; None: nowhere."""
    folder = os.environ.get("CONVLAB_CACHE")
    if folder is not None:
        return Path(folder) / "auto.json" if folder else None
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        user = os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local"
    elif sys.platform == "darwin":
        user = home / "Library" / "Caches"
    else:
        user = os.environ.get("XDG_CACHE_HOME") or home / ".cache"
    return Path(user) / "convlab" / "auto.json"


def _text(kind: dict) -> str:
    return json.dumps(kind, sort_keys=True)


def _load() -> None:
    if path := cache_file():
        try:
            _choices.update(_read(path))
        except OSError as error:
            _warn(f"{path}: {error.strerror or error}; choices of earlier runs are not known")


def _read(path: Path) -> dict[str, Choice]:
    """The choices in the file; none if there is no file or it holds something else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format"] != FORMAT:
            raise ValueError("another format")
        choices = [_parsed(entry, str(path)) for entry in content["choices"]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        _warn(f"{path}: not as convlab.auto writes it; the next measurement will replace it")
        return {}
    return {_text(choice.kind): choice for choice in choices}


def _parsed(entry: dict, file: str) -> Choice:
    return Choice(
        dict(entry["kind"]),
        str(entry["algorithm"]),
        {str(name): float(value) for name, value in entry["seconds"].items()},
        {str(name): int(count) for name, count in entry["rounds"].items()},
        {str(name): (float(low), float(high)) for name, (low, high) in entry["ratios"].items()},
        {str(name): str(why) for name, why in entry["skipped"].items()},
        str(entry["time"]),
        file,
    )


def _save(path: Path, choice: Choice) -> None:
    """Add `choice` to what the file holds by now; whoever reads it sees all or nothing of it."""
    from filelock import FileLock

    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=10):
            others = _read(path)
            try:
                temporary.write_text(_content({**others, _text(choice.kind): choice}), "utf-8")
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
    except (OSError, NotImplementedError) as error:  # the second: a file system without locks
        reason = getattr(error, "strerror", None) or error
        _warn(f"{path}: {reason}; choices are kept in memory only")
    else:
        for text, other in others.items():
            _choices.setdefault(text, other)


def _content(choices: dict[str, Choice]) -> str:
    """JSON, one choice a line."""
    lines = ",\n".join(json.dumps(asdict(replace(c, file=""))) for c in choices.values())
    return f'{{"format": {FORMAT}, "choices": [\n{lines}\n]}}\n'


def _warn(text: str) -> None:
    if "warned" not in _done:
        _done.add("warned")
        warnings.warn(f"convlab.auto: {text}", stacklevel=2)

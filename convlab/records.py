"""One row per measurement, JSON Lines, append-only, one file per machine.

A row is written with a single system call under a lock, so a killed run leaves whole lines and at
most one truncated last line, and two recordings into one file do not mix.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from convlab import machine
from convlab.problem import ConvProblem
from convlab.timing import Measurement

if TYPE_CHECKING:
    import pandas as pd

PREDICTED = "out of memory (predicted)"
STATUSES = ("ok", "wrong", "unsupported", "out of memory", PREDICTED)
PASSES = ("forward", "backward", "train", "")
DIGITS = 5  # significant digits kept of a time; a clock's own noise is larger
START = b'{"session": '  # how every line begins; a last line that does not is no truncated record
NUMBER = (int, float)
JSON_TYPES = {
    "str": str,
    "int": int,
    "dict": dict,
    "list[float]": list,
    "float | None": (*NUMBER, type(None)),
    "int | None": (int, type(None)),
}


class RecordError(Exception):
    """A record file cannot be read or written; the message names file and line."""


def data_folder() -> Path:
    """`data/` of the checkout, else `data/` right here: recorded rows and the thread's figures."""
    checkout = Path(__file__).parent.parent / "data"
    return checkout if checkout.is_dir() else Path("data")


def local_file(device: str = "cpu") -> Path:
    """Where this machine's own runs go: `local/` in $CONVLAB_DATA or in `data_folder()`."""
    folder = Path(os.environ.get("CONVLAB_DATA") or data_folder())
    return folder / "local" / f"{machine.slug(device)}.jsonl"


def recorded_file(device: str = "cpu") -> Path:
    """Where `record` puts this machine's rows, to be committed."""
    return data_folder() / "records" / f"{machine.slug(device)}.jsonl"


@dataclass(frozen=True)
class Row:
    """One measurement; `data/README.md` explains every field.

    Rows with the same `session` and `case` were measured together in interleaved rounds: sample i
    of each belongs to round i. A row whose status is not "ok" carries no time.
    """

    session: str
    case: str
    rows_in_case: int
    experiment: str
    algorithm: str
    problem: dict
    pass_: str
    part: str
    dtype: str
    layout: str
    device: str
    machine: str
    flags: dict
    versions: dict
    time: str
    status: str = "ok"
    median: float | None = None
    q25: float | None = None
    q75: float | None = None
    samples: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    launches: int | None = None
    error: float | None = None
    extra: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {self.status!r}")
        if self.pass_ not in PASSES:
            raise ValueError(f"pass must be one of {', '.join(PASSES)}, got {self.pass_!r}")
        timed = [self.median, self.q25, self.q75, *self.samples]
        if self.status != "ok" and any(value is not None for value in timed):
            raise ValueError(f"a row with status {self.status!r} must carry no time")
        if any(v is not None and not 0 <= v < math.inf for v in timed):
            raise ValueError(f"times must be finite and not negative, got {timed}")

    def as_json(self) -> str:
        """One line, without its end."""
        values = {_json_name(k): v for k, v in asdict(self).items()}
        return json.dumps(values, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Row:
        """The inverse of `as_json`; ValueError on anything else."""
        values = json.loads(line, parse_constant=_refuse)
        if not isinstance(values, dict):
            raise ValueError("not an object")
        known = {_json_name(f.name): f for f in fields(cls)}
        unknown, missing = values.keys() - known.keys(), REQUIRED - values.keys()
        if unknown or missing:
            raise ValueError(f"unknown fields {sorted(unknown)}, missing {sorted(missing)}")
        for name, value in values.items():
            if not isinstance(value, JSON_TYPES[known[name].type]):
                raise ValueError(f"{name} must be {known[name].type}, got {value!r}")
        if not all(isinstance(value, NUMBER) for value in values.get("samples", [])):
            raise ValueError("samples must be numbers")
        return cls(**{known[k].name: v for k, v in values.items()})


def _refuse(constant: str) -> None:
    raise ValueError(f"numbers must be finite, got {constant}")


def _json_name(name: str) -> str:
    return name.rstrip("_")


REQUIRED = {_json_name(f.name) for f in fields(Row)[:15]}


def now() -> str:
    """UTC, ISO 8601, to the microsecond."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def row(
    experiment: str,
    algorithm: str,
    problem: ConvProblem | None,
    pass_: str,
    measured: Measurement | None = None,
    *,
    device: str = "cpu",
    **values: object,
) -> Row:
    """A `Row` with the machine, flags, versions and time filled in, and `measured` spread out."""
    timed = {}
    if measured is not None:
        quartiles = {name: getattr(measured, name) for name in ("median", "q25", "q75")}
        timed = {
            **{name: round_digits(value) for name, value in quartiles.items()},
            "samples": [round_digits(value) for value in measured.samples],
            "peak_bytes": measured.peak_bytes,
            "flags": measured.flags,
        }
    standard = {
        "session": "",
        "case": "",
        "rows_in_case": 1,
        "part": "",
        "dtype": "float32",
        "layout": "NCHW",
        "flags": machine.flags(),
        "versions": machine.versions(),
        "machine": machine.name(device),
        "time": now(),
    }
    fixed = {
        "experiment": experiment,
        "algorithm": algorithm,
        "problem": {} if problem is None else problem.as_dict(),
        "pass_": pass_,
        "device": str(device),
    }
    return Row(**{**standard, **timed, **fixed, **values})


def round_digits(value: float) -> float:
    """`value` with `DIGITS` significant digits."""
    return float(f"{value:.{DIGITS}g}")


def append(path: str | Path, rows: Sequence[Row]) -> None:
    """Add `rows` to the file, all or none, and push them to the disk.

    A truncated last line, left by a killed run, is cut off first, with a warning.

    Raises:
        RecordError: the folder or the disk does not take them, or the file ends with a line that
            is no record; what was there stays.
    """
    from filelock import FileLock

    path = Path(path)
    data = "".join(r.as_json() + "\n" for r in rows).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_devices(path)
        with FileLock(f"{path}.lock").acquire(poll_interval=0.005), open(path, "ab") as file:
            _cut_truncated_line(path, file)
            end = file.seek(0, os.SEEK_END)
            try:
                _write_all(file.fileno(), data)
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise RecordError(
            f"{path}: {reason}; {len(rows)} new rows were not written, all earlier ones are intact"
        ) from error


def _refuse_devices(path: Path) -> None:
    """A folder, and a pipe or device, whose end may never come."""
    if path.exists() and not path.is_file():
        raise RecordError(f"{path}: not a regular file")


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _cut_truncated_line(path: Path, file) -> None:
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole == len(text):
        return
    number = text.count(b"\n") + 1
    if _parsed(path, number, text[whole:], last=True) is None:
        _warn_truncated(path, number)
        file.truncate(whole)
    else:
        os.write(file.fileno(), b"\n")


def _parsed(path: Path, number: int, line: bytes, last: bool) -> Row | None:
    """The row of a line; None for the beginning of one at the end of the file, else RecordError."""
    try:
        return Row.from_json(line.decode())
    except (ValueError, RecursionError) as error:
        incomplete = isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
        if last and incomplete and line[: len(START)] == START[: len(line)]:
            return None
        raise RecordError(f"{path}, line {number}: not a record: {error}") from None


def _warn_truncated(path: Path, line: int) -> None:
    # Always from this line, so that Python shows the same warning once per run.
    warnings.warn(f"{path}, line {line}: truncated last line dropped", stacklevel=1)


def read(path: str | Path) -> list[Row]:
    """Every row of the file, oldest first; nothing if there is no such file.

    The beginning of a row at the end of the file, left by a killed run, is dropped with a warning.

    Raises:
        RecordError: any other line that is not a row; names file and line.
    """
    path = Path(path)
    try:
        _refuse_devices(path)
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}") from error
    lines = data.split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        last = number == len(lines)
        if last and not line:
            break
        row = _parsed(path, number, line, last)
        if row is None:
            _warn_truncated(path, number)
        else:
            rows.append(row)
    return rows


def files(folder: str | Path | None = None) -> list[Path]:
    """The record files in `folder` (default: `data/records`), sorted."""
    return sorted((data_folder() / "records" if folder is None else Path(folder)).glob("*.jsonl"))


def load(paths: Iterable[str | Path] | None = None) -> pd.DataFrame:
    """All rows of the files (default: the recorded ones) as a table, the problem's fields spread.

    `pass_` is the column "pass". An empty table has the same columns.
    """
    rows = [row for path in (files() if paths is None else paths) for row in read(path)]
    return frame(rows)


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """`rows` as a table, the problem's fields spread over columns."""
    import pandas as pd

    sizes = [f.name for f in fields(ConvProblem)]
    columns = [_json_name(f.name) for f in fields(Row) if f.name != "problem"] + sizes
    spread = []
    for r in rows:
        values = {_json_name(f.name): getattr(r, f.name) for f in fields(r)}
        spread.append({**values, **values.pop("problem")})
    return pd.DataFrame(spread, columns=columns)

"""A run on disk: its config, every answer as it comes, the result. A stopped run can be resumed.

config.json is written first, predictions.jsonl grows, metrics.json comes last and makes the run finished.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.records import Prediction, PredictionKey
from ov_kvcrush.eval.runs.run_config import RunConfig, from_json
from ov_kvcrush.eval.statistics import ResultRow
from ov_kvcrush.utils.atomic import try_lock
from ov_kvcrush.utils.json_file import write_json

CONFIG, PREDICTIONS, METRICS = "config.json", "predictions.jsonl", "metrics.json"
_NOT_COMPARED = {"kl": None, "top1": None, "loss": None}  # of answers from before there were comparisons


@dataclass(frozen=True)
class Run:
    """A finished run as its folder holds it."""

    folder: Path
    config: RunConfig
    predictions: tuple[Prediction, ...]
    rows: tuple[ResultRow, ...]


class RunFolder:
    """The folder of a run in progress, locked against other processes until `close`."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        """Create the folder, or resume the run in it.

        Raises CrushError for a finished run, a run of another config (naming the differences), a run that another
        process has open, a folder with other content, and one that cannot be read or written.
        """
        self.path, self.config = path, config
        _check_startable(path, config)
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not (path / CONFIG).exists():
                write_json(path / CONFIG, config.json, "out", allow_nan=False)
            self._file: IO[bytes] = open(path / PREDICTIONS, "a+b")  # noqa: SIM115 - kept open for the run
        except OSError as error:
            raise CrushError(f"--out must be a folder that can be written, got {str(path)!r}: {error}") from None
        try:
            if not try_lock(self._file):
                raise CrushError(f"--out must be a folder that no other run writes to, got {str(path)!r}")
            self._predictions = self._resume()
        except BaseException:
            self._file.close()
            raise
        self._done = {prediction.key for prediction in self._predictions}

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        """All answers, those before the resumption first."""
        return tuple(self._predictions)

    def done(self) -> frozenset[PredictionKey]:
        """Keys of the answers that are there."""
        return frozenset(self._done)

    def add(self, prediction: Prediction) -> None:
        """Write an answer; it survives a later crash of this process.

        Raises CrushError for an unknown setting, an answer that is already there, and a full disk.
        """
        _check_known(prediction, self.config, self._done)
        line = json.dumps(asdict(prediction), allow_nan=False) + "\n"
        try:
            self._file.write(line.encode("ascii"))
            self._file.flush()
        except OSError as error:
            raise CrushError(f"--out must be a folder that can be written, got {str(self.path)!r}: {error}") from None
        self._predictions.append(prediction)
        self._done.add(prediction.key)

    def finish(self, rows: Sequence[ResultRow]) -> Run:
        """Write the result, close, and return the run as `read_run` would."""
        self.close()
        seconds = sum(prediction.seconds for prediction in self._predictions)
        metrics = {"rows": [asdict(row) for row in rows], "num_predictions": len(self._predictions), "seconds": seconds}
        write_json(self.path / METRICS, metrics, "out", allow_nan=False)
        return Run(self.path, self.config, self.predictions, tuple(rows))

    def close(self) -> None:
        """Release the lock; what was added stays."""
        self._file.close()

    def _resume(self) -> list[Prediction]:
        """Read the answers so far, and cut off an incomplete last line."""
        self._file.seek(0)
        whole = self._file.read()
        end = whole.rfind(b"\n") + 1
        found = _parse(whole[:end], self.path / PREDICTIONS, self.config)
        self._file.truncate(end)
        return found


def default_folder(suite: str, model: str | Path, now: datetime) -> Path:
    """runs/SUITE-MODEL-DATE-TIME in the current folder."""
    name = re.sub(r"[^\w.-]+", "_", Path(model).absolute().name) or "model"
    return Path("runs") / f"{suite}-{name}-{now:%Y%m%d-%H%M%S}"


def read_run(path: Path) -> Run:
    """A finished run. Raises CrushError, with file and line, for a folder that holds none or holds something else."""
    for name in (CONFIG, PREDICTIONS, METRICS):
        if not (path / name).is_file():
            what = "a finished run" if name == METRICS else "a run"
            raise CrushError(f"folder must hold {what}, got {str(path)!r} without {name}")
    config = _read_config(path)
    predictions = _parse(_bytes(path / PREDICTIONS), path / PREDICTIONS, config)
    metrics = _read_object(path / METRICS)
    rows = metrics.get("rows")
    if not isinstance(rows, list) or not rows:
        raise CrushError(f"{path / METRICS}: rows must be a list that is not empty, got {str(rows)[:60]!r}")
    if metrics.get("num_predictions") != len(predictions):
        told = metrics.get("num_predictions")
        raise CrushError(f"{path / PREDICTIONS} must have {told} lines by {METRICS}, got {len(predictions)}")
    made = tuple(_row(row, f"{path / METRICS}: rows[{i}]") for i, row in enumerate(rows))
    return Run(path, config, tuple(predictions), made)


def report_of(run: Run) -> dict[str, Any]:
    """Config and result rows, for --json."""
    return {**run.config.json, "rows": [asdict(row) for row in run.rows]}


def _check_startable(path: Path, config: RunConfig) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / CONFIG).is_file():
        raise CrushError(f"--out must be a new folder, or one of a run to go on with, got {str(path)!r}")
    differing = config.differences(_read_config(path))
    if differing:
        has = f"holds a run with other {', '.join(differing)}"
    elif (path / METRICS).exists():
        has = "holds this run, finished"
    else:
        return
    raise CrushError(f"--out must be a new folder, got {str(path)!r}, which {has}; name another, or delete it")


def _check_known(prediction: Prediction, config: RunConfig, done: set[PredictionKey]) -> None:
    if prediction.setting_key not in {setting.key for setting in config.settings}:
        raise CrushError(f"setting_key must be of one of the run's settings, got {prediction.setting_key!r}")
    if prediction.key in done:
        raise CrushError(f"prediction must be the first of its question and setting, got another of {prediction.key}")


def _parse(content: bytes, file: Path, config: RunConfig) -> list[Prediction]:
    found: list[Prediction] = []
    done: set[PredictionKey] = set()
    for number, line in enumerate(content.splitlines(), 1):
        where = f"{file}:{number}"
        prediction = from_json(Prediction, _load(line, where), where, _NOT_COMPARED)
        try:
            _check_known(prediction, config, done)
        except CrushError as error:
            raise CrushError(f"{where}: {error}") from None
        found.append(prediction)
        done.add(prediction.key)
    return found


def _row(value: Any, where: str) -> ResultRow:
    """A row; those from before there were comparisons have none, and their items are contexts."""
    known = value if isinstance(value, dict) else {}
    settings = known.get("settings")
    budget = settings.get("budget") if isinstance(settings, dict) else None
    later = {"budget": budget, "contexts": known.get("n"), "kl_mean": None, "kl_median": None, "top1": None}
    return from_json(ResultRow, value, where, later)


def _read_config(path: Path) -> RunConfig:
    return RunConfig.from_json(_read_object(path / CONFIG), str(path / CONFIG))


def _read_object(file: Path) -> dict[str, Any]:
    value = _load(_bytes(file), str(file))
    if not isinstance(value, dict):
        raise CrushError(f"{file}: content must be a JSON object, got {str(value)[:60]!r}")
    return value


def _load(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CrushError(f"{where}: content must be JSON, got {content[:60]!r}: {error}") from None


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CrushError(f"{file} must be a file that can be read, got {error.strerror}") from None

"""Logs as JSON, one object a line, of requests and what the server does; never of what was asked or answered."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any

log = logging.getLogger("ov_kvcrush.server")


class JsonFormatter(logging.Formatter):
    """A record and its `extra={"fields": {...}}` as one line.

    Of an exception its type and the places in the code: its message may quote a prompt.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line: dict[str, Any] = {"time": moment, "level": record.levelname.lower(), "logger": record.name}
        is_own = record.name.startswith(log.name)
        line["event"] = record.getMessage() if is_own or not record.exc_info else "error"
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            line["error"] = type(error).__name__
            line["traceback"] = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
        return json.dumps(line, ensure_ascii=True, default=str)


def tell(event: str, level: int = logging.INFO, error: BaseException | None = None, **fields: Any) -> None:
    """Log an event with fields; None is left out."""
    given = {name: value for name, value in fields.items() if value is not None}
    log.log(level, event, extra={"fields": given}, exc_info=error)


def log_to_stderr() -> None:
    """Have the process log so, its libraries from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
        logging.getLogger(name).setLevel(logging.WARNING)
    engine = logging.getLogger("ov_kvcrush.engine.output_processor")
    engine.setLevel(logging.ERROR)  # its warnings hold errors of requests, which may quote prompts

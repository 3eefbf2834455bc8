"""Run folders: a run that was stopped ends as one that was not, and nothing is overwritten or believed unread."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from eval_runs import MACHINE, SETTINGS, answers, config

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.records import Prediction
from ov_kvcrush.eval.runs.run_config import RunConfig
from ov_kvcrush.eval.runs.run_folder import CONFIG, METRICS, PREDICTIONS, RunFolder, default_folder, read_run, report_of
from ov_kvcrush.eval.statistics import result_rows

ANSWERS = answers(items=3)


def run(path: Path, made: list[Prediction], stop_after: int | None = None) -> None:
    """Answer what is not answered yet; stop after so many answers, or finish."""
    with RunFolder(path, config()) as folder:
        done = folder.done()
        todo = [prediction for prediction in made if prediction.key not in done]
        for prediction in todo[:stop_after]:
            folder.add(prediction)
        if stop_after is None:
            folder.finish(result_rows(folder.predictions, SETTINGS, "ruler", resamples=20))


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.mark.parametrize("torn", [b"", b'{"item_id": "qa-', b'{"item_id": "x"}'], ids=["whole", "torn", "no line end"])
def test_stopped_run_ends_as_one_that_was_not(tmp_path: Path, torn: bytes) -> None:
    run(tmp_path / "once", ANSWERS)
    path = tmp_path / "deep" / "twice"
    for stop_after in (0, 1, 7, 10):
        run(path, ANSWERS, stop_after)
        with (path / PREDICTIONS).open("ab") as file:
            file.write(torn)
    run(path, ANSWERS)
    assert contents(path) == contents(tmp_path / "once")
    assert sorted(contents(path)) == sorted((CONFIG, PREDICTIONS, METRICS))


def test_an_answer_is_on_disk_at_once(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", config()) as folder:
        for number, prediction in enumerate(ANSWERS[:5], 1):
            folder.add(prediction)
            lines = (tmp_path / "run" / PREDICTIONS).read_text().split("\n")
            assert (len(lines), lines[-1]) == (number + 1, "")
        assert folder.done() == {prediction.key for prediction in ANSWERS[:5]}


def test_a_run_reads_back_as_it_was_written(tmp_path: Path) -> None:
    rows = result_rows(ANSWERS, SETTINGS, "ruler", resamples=20)
    with RunFolder(tmp_path / "run", config()) as folder:
        for prediction in ANSWERS:
            folder.add(prediction)
        finished = folder.finish(rows)
    assert read_run(tmp_path / "run") == finished
    assert (finished.config, finished.predictions, finished.rows) == (config(), tuple(ANSWERS), tuple(rows))
    report = json.loads(json.dumps(report_of(finished)))
    assert [row["score"] for row in report["rows"]] == [row.score for row in rows]
    assert RunConfig.from_json({name: report[name] for name in config().json}, "report") == config()


OTHERS: dict[str, tuple[dict[str, object], str]] = {
    "suite": ({"suite": "needle"}, "suite"),
    "model": ({"fingerprint": "other"}, "fingerprint"),
    "several": ({"seed": 8, "num_items": 3}, "num_items, seed"),
    "settings": ({"settings": SETTINGS[:-1]}, "settings"),
    "option": ({"options": {"length": 8192, "tasks": ["qa", "code"]}}, r"options\.length"),
    "option gone": ({"options": {"tasks": ["qa", "code"]}}, r"options\.length"),
    "versions": ({"environment": {**MACHINE, "versions": {"openvino": "2"}}}, r"environment\.versions"),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_of_another_run_is_refused(case: str, finished: bool, tmp_path: Path) -> None:
    changes, names = OTHERS[case]
    run(tmp_path / "run", ANSWERS, None if finished else 3)
    before = contents(tmp_path / "run")
    with pytest.raises(CrushError, match=rf"--out must be a new folder, got .* other {names}; name another, or delete"):
        RunFolder(tmp_path / "run", config(**changes))
    assert contents(tmp_path / "run") == before


def test_a_run_goes_on_wherever_the_model_lies_and_however_it_was_typed(tmp_path: Path) -> None:
    run(tmp_path / "run", ANSWERS, 3)
    moved = config(model="elsewhere", command="eval", settings=SETTINGS[::-1], environment={**MACHINE, "threads": 8})
    with RunFolder(tmp_path / "run", moved) as folder:
        assert folder.predictions == tuple(ANSWERS[:3])


def test_a_finished_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "run", ANSWERS)
    before = contents(tmp_path / "run")
    with pytest.raises(CrushError, match="which holds this run, finished; name another, or delete it"):
        RunFolder(tmp_path / "run", config())
    assert contents(tmp_path / "run") == before


def test_other_files_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(CrushError, match="must be a new folder, or one of a run to go on with"):
            RunFolder(tmp_path / name, config())
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["notes.txt"]


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path / "run", config()),
        pytest.raises(CrushError, match="must be a folder that no other run writes to"),
    ):
        RunFolder(tmp_path / "run", config())
    RunFolder(tmp_path / "run", config()).close()


def test_an_answer_that_does_not_belong_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", config()) as folder:
        folder.add(ANSWERS[0])
        with pytest.raises(CrushError, match="must be the first of its question and setting"):
            folder.add(replace(ANSWERS[0], text="again"))
        with pytest.raises(CrushError, match="setting_key must be of one of the run's settings, got 'x'"):
            folder.add(replace(ANSWERS[1], setting_key="x"))
    assert len((tmp_path / "run" / PREDICTIONS).read_bytes().splitlines()) == 1


def edit_line(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    """What changes the second line of the predictions."""

    def edit(path: Path) -> None:
        lines = (path / PREDICTIONS).read_text().split("\n")
        value = json.loads(lines[1])
        lines[1] = json.dumps(change(value) or value)
        (path / PREDICTIONS).write_text("\n".join(lines))

    return edit


def put(name: str, text: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_text(text) and None


BAD_CONTENT: dict[str, tuple[Callable[[Path], None], str]] = {
    "no JSON": (put(PREDICTIONS, "{\n"), r"predictions\.jsonl:1: content must be JSON"),
    "a list": (put(PREDICTIONS, "[1]\n"), r"predictions\.jsonl:1: content must be a JSON object, got '\[1\]'"),
    "an empty line": (put(PREDICTIONS, "\n"), r"predictions\.jsonl:1: content must be JSON"),
    "deep": (put(PREDICTIONS, "[" * 100_000 + "\n"), r"predictions\.jsonl:1: content must be JSON"),
    "no score": (edit_line(lambda v: v.pop("score") and None), r"predictions\.jsonl:2: score must be given"),
    "a new field": (edit_line(lambda v: {**v, "socre": 1}), r"predictions\.jsonl:2: field must be one of .*'score'\?"),
    "score of text": (edit_line(lambda v: {**v, "score": "1"}), r"predictions\.jsonl:2: score must be a finite number"),
    "no number": (edit_line(lambda v: {**v, "score": float("nan")}), r"predictions\.jsonl:2: score must be a finite"),
    "bytes": (edit_line(lambda v: {**v, "bytes": -1}), r"predictions\.jsonl:2: bytes must be an integer of at least 0"),
    "setting": (edit_line(lambda v: {**v, "setting_key": "x"}), r"predictions\.jsonl:2: setting_key must be of one of"),
    "twice": (
        edit_line(lambda v: json.loads(json.dumps(ANSWERS[0].__dict__))),
        r"predictions\.jsonl:2: prediction must be the first",
    ),
    "config no JSON": (put(CONFIG, "{"), r"config\.json: content must be JSON"),
    "config a list": (put(CONFIG, "[]"), r"config\.json: content must be a JSON object"),
    "config without settings": (put(CONFIG, "{}"), r"config\.json: settings must be a list, got None"),
    "config with another setting": (put(CONFIG, '{"settings": [{"engine": 1}]}'), r"config\.json: settings\[0\]: "),
    "config with less": (put(CONFIG, '{"settings": []}'), r"config\.json: command must be given"),
}


@pytest.mark.parametrize("case", BAD_CONTENT)
def test_content_that_is_no_run_is_named(case: str, tmp_path: Path) -> None:
    edit, message = BAD_CONTENT[case]
    run(tmp_path / "run", ANSWERS, 4)
    edit(tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(CrushError, match=message):
        RunFolder(tmp_path / "run", config())
    assert contents(tmp_path / "run") == before


def edit_metrics(change: Callable[[dict[str, object]], dict[str, object]]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        (path / METRICS).write_text(json.dumps(change(json.loads((path / METRICS).read_text()))))

    return edit


BAD_RESULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "not finished": (lambda path: (path / METRICS).unlink(), "must hold a finished run, got .* without metrics.json"),
    "no run": (lambda path: (path / CONFIG).unlink(), "must hold a run, got .* without config.json"),
    "no rows": (edit_metrics(lambda v: {**v, "rows": []}), r"metrics\.json: rows must be a list that is not empty"),
    "a bad row": (edit_metrics(lambda v: {**v, "rows": [{"n": 1}]}), r"metrics\.json: rows\[0\]: suite must be given"),
    "fewer answers": (lambda path: put(PREDICTIONS, "")(path), r"must have \d+ lines by metrics\.json, got 0"),
}


@pytest.mark.parametrize("case", BAD_RESULTS)
def test_a_result_that_is_none_is_named(case: str, tmp_path: Path) -> None:
    edit, message = BAD_RESULTS[case]
    run(tmp_path / "run", ANSWERS)
    edit(tmp_path / "run")
    with pytest.raises(CrushError, match=message):
        read_run(tmp_path / "run")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CrushError, match="--out must be a folder that can be written"):
        RunFolder(tmp_path / "file" / "run", config())


def test_default_folder_says_suite_model_and_time() -> None:
    name = default_folder("ruler", "models/Qwen 0.5B/", datetime(2025, 1, 2, 3, 4, 5))
    assert name == Path("runs/ruler-Qwen_0.5B-20250102-030405")

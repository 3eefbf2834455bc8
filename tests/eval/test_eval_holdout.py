"""Halves and turns of a run: every item is in one half, what is chosen is chosen by the first, turns are told apart."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from eval_runs import FULL, SETTINGS, U4, U8, answers, config
from typer.testing import CliRunner

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.cli.app import app
from ov_kvcrush.eval.records import AVERAGE, Prediction, Setting
from ov_kvcrush.eval.report.by_turn import by_turn
from ov_kvcrush.eval.report.document import section
from ov_kvcrush.eval.report.holdout import chosen_grid, holdout_of, judged_grid, markdown, split, worth_showing
from ov_kvcrush.eval.report.tables import by_task, row_label
from ov_kvcrush.eval.runs.run_folder import Run, RunFolder
from ov_kvcrush.eval.statistics import result_rows

MANY = (
    FULL,
    *(Setting(engine="crush", policy=name, kept=0.25, **U8) for name in ("kvcrush", "snapkv", "knorm", "random")),
    *(Setting(engine="crush", policy=name, kept=0.25, **U4) for name in ("kvcrush", "snapkv")),
    Setting(engine="crush", policy="kvcrush", kept=0.25, query="agnostic", **U8),
    Setting(engine="crush", policy="kvcrush", kept_tokens=64, **U8),
)


def run_of(made: list[Prediction], settings: tuple[Setting, ...], path: Path = Path("run")) -> Run:
    rows = result_rows(made, settings, "ruler", seed=7, resamples=50)
    return Run(path, config(settings), tuple(made), tuple(rows))


def mean_score(made: list[Prediction], setting: Setting) -> float:
    """Mean over tasks of the mean over items of the mean over questions, by loops."""
    means = []
    for task in dict.fromkeys(p.task for p in made):
        items: dict[str, list[float]] = {}
        for p in made:
            if (p.task, p.setting_key) == (task, setting.key):
                items.setdefault(p.item_id, []).append(p.score)
        means.append(sum(sum(x) / len(x) for x in items.values()) / len(items))
    return sum(means) / len(means)


class TestHoldout:
    def test_every_item_is_in_one_half_with_all_its_answers(self) -> None:
        made = answers(items=7)
        first, second = split(made)
        assert sorted(map(id, (*first, *second))) == sorted(map(id, made))
        for task in ("qa", "code"):
            items = [{p.item_id for p in half if p.task == task} for half in (first, second)]
            assert [len(half) for half in items] == [4, 3]
            assert not items[0] & items[1]
            assert items[0] == {f"{task}-{i}" for i in (0, 2, 4, 6)}

    def test_order_of_answers_changes_nothing(self) -> None:
        made = answers(MANY)
        shuffled = random.Random(1).sample(made, len(made))
        shuffled.sort(key=lambda p: p.task != "qa")  # tasks come in their order
        assert holdout_of(run_of(shuffled, MANY)) == holdout_of(run_of(made, MANY))

    def test_a_task_of_one_item_is_in_neither(self) -> None:
        made = [*answers(MANY, ["qa"]), *answers(MANY, ["code"], items=1)]
        assert {p.task for half in split(made) for p in half} == {"qa"}
        assert holdout_of(run_of(made, MANY)) == holdout_of(run_of(answers(MANY, ["qa"]), MANY))
        with pytest.raises(CrushError, match="run must have a task of two items to be halved, got none in 'run'"):
            holdout_of(run_of(answers(MANY, items=1), MANY))

    def test_differences_are_those_of_each_half_alone(self) -> None:
        run = run_of(answers(MANY), MANY)
        holdout = holdout_of(run)
        settings = {row_label(setting): setting for setting in MANY}
        assert len(holdout.judged) == len(MANY)
        for one in holdout.judged:
            setting = settings[row_label(one.first)]
            for row, half in zip(one, split(run.predictions), strict=True):
                assert row.difference == pytest.approx(mean_score(half, setting) - mean_score(half, FULL), abs=1e-12)
                assert row.low <= row.difference <= row.high

    def test_the_best_of_the_first_half_is_chosen_whatever_the_second_says(self) -> None:
        made = answers(MANY)
        _, second = split(made)
        held_out = {id(p) for p in second}
        spoiled = [replace(p, score=1 - p.score) if id(p) in held_out else p for p in made]
        chosen = [[row_label(c.best.first) for c in holdout_of(run_of(x, MANY)).chosen] for x in (made, spoiled)]
        assert chosen[0] == chosen[1]
        holdout = holdout_of(run_of(made, MANY))
        groups = {(s.kept, s.kept_tokens, s.precisions, s.query) for s in MANY if s.policy != "none"}
        assert len(holdout.chosen) == len(groups)
        assert sum(c.num_settings for c in holdout.chosen) == len(MANY) - 1
        for c in holdout.chosen:
            best = c.best.first
            rivals = [
                o.first for o in holdout.judged
                if (o.first.kept, o.first.settings.get("kept_tokens"), o.first.precisions, o.first.query)
                == (best.kept, best.settings.get("kept_tokens"), best.precisions, best.query)
                and o.first.policy != "none"
            ]  # fmt: skip
            assert len(rivals) == c.num_settings
            assert best.difference == max(row.difference for row in rivals)

    def test_a_policy_of_many_settings_has_a_choice_of_its_own(self) -> None:
        evicting = [setting for setting in MANY if (setting.kept, setting.query) == (0.25, "aware")][:4]
        shares = [replace(evicting[0], policy_settings={"share": x}) for x in (0.1, 0.3, 0.5)]
        settings = (FULL, *evicting, *shares)
        holdout = holdout_of(run_of(answers(settings), settings))
        everything, own = sorted(holdout.chosen, key=lambda c: c.policy is not None)
        assert (everything.policy, everything.num_settings) == (None, 7)
        assert (own.policy, own.num_settings) == (evicting[0].policy, 4)
        its = [one for one in holdout.judged if one.first.policy == own.policy]
        assert own.best in its
        assert own.best.first.difference == max(one.first.difference for one in its)
        alone = (FULL, evicting[0], *shares)  # then it is the same choice
        assert [c.policy for c in holdout_of(run_of(answers(alone), alone)).chosen] == [None]

    def test_an_engine_alone_is_as_if_the_other_had_not_run(self) -> None:
        made = answers()
        ours = tuple(setting for setting in SETTINGS if setting.engine == "crush")
        keys = {setting.key for setting in ours}
        alone = run_of([p for p in made if p.setting_key in keys], ours)
        assert holdout_of(run_of(made, SETTINGS), "crush") == holdout_of(alone)
        with pytest.raises(CrushError, match="--engine must be one of crush, got 'genai'"):
            holdout_of(alone, "genai")

    def test_tables_have_every_setting_and_every_choice(self) -> None:
        holdout = holdout_of(run_of(answers(MANY), MANY))
        assert len(judged_grid(holdout).lines) == len(MANY)
        assert len(chosen_grid(holdout).lines) == len(holdout.chosen) == 4
        for grid in (judged_grid(holdout), chosen_grid(holdout)):
            assert {len(line) for line in grid.lines} == {len(grid.header)}
        c = holdout.chosen[0]
        for cell in (f"{100 * c.best.first.difference:+.1f}", f"{100 * c.best.second.difference:+.1f}"):
            assert f" {cell} " in markdown(holdout)

    def test_pages_have_them_where_a_budget_has_many_settings(self) -> None:
        made = run_of(answers(MANY), MANY)
        assert worth_showing(made)
        assert markdown(holdout_of(made)) in section(made, [])
        for other in (run_of(answers(), SETTINGS), run_of(answers(MANY, items=1), MANY)):
            assert not worth_showing(other)
            assert "first half" not in section(other, [])

    def test_command_prints_and_writes_what_it_found(self, tmp_path: Path) -> None:
        made = answers(MANY)
        with RunFolder(tmp_path / "run", config(MANY)) as folder:
            for prediction in made:
                folder.add(prediction)
            folder.finish(result_rows(made, MANY, "ruler", resamples=50))
        page, file = tmp_path / "halves.md", tmp_path / "halves.json"
        line = ["halves", str(tmp_path / "run"), "--json", str(file), "--markdown", str(page)]
        done = CliRunner().invoke(app, line)
        assert done.exit_code == 0, done.output
        found = holdout_of(run_of(made, MANY))
        assert page.read_text() == markdown(found)
        report = json.loads(file.read_text())
        assert [one["first"]["difference"] for one in report["settings"]] == [o.first.difference for o in found.judged]
        assert [one["label"] for one in report["chosen"]] == [row_label(c.best.first) for c in found.chosen]
        assert "chosen on the first half" in done.output
        for wrong, message in ((["--engine", "genai"], "must be one of crush"), (["--json", "/x/y"], "--json must be")):
            refused = CliRunner().invoke(app, [*line[:2], *wrong])
            assert (refused.exit_code, message in refused.output) == (2, True)


class TestByTurn:
    def test_turns_are_told_apart(self) -> None:
        run = run_of(answers(MANY), MANY)
        turns = by_turn(run)
        assert turns is not None
        assert turns.name == "turn"
        assert list(dict.fromkeys(row.task for row in turns.rows)) == [AVERAGE, "turn 1", "turn 2", "turn 3"]
        for turn in range(3):
            rows = [row for row in turns.rows if row.task == f"turn {turn + 1}"]
            assert [row_label(row) for row in rows] == [row_label(setting) for setting in MANY]
            own = [p for p in run.predictions if p.turn == turn]
            for row, setting in zip(rows, MANY, strict=True):
                assert row.difference == pytest.approx(mean_score(own, setting) - mean_score(own, FULL), abs=1e-12)
                assert row.n == len({p.item_id for p in own})

    def test_questions_that_are_no_turns_are_called_questions(self) -> None:
        made = [replace(p, turn=0) for p in answers(MANY)]
        turns, questions = by_turn(run_of(answers(MANY), MANY)), by_turn(run_of(made, MANY))
        assert turns is not None
        assert questions is not None
        assert questions.name == "question"
        assert questions.rows == tuple(replace(row, task=row.task.replace("turn", "question")) for row in turns.rows)

    def test_single_questions_have_no_turns(self) -> None:
        made = [p for p in answers(MANY) if p.question_index == 0]
        run = run_of(made, MANY)
        assert by_turn(run) is None
        assert "averages of the tasks" not in section(run, [])

    def test_a_page_has_a_column_for_every_turn(self) -> None:
        run = run_of(answers(MANY), MANY)
        turns = by_turn(run)
        assert turns is not None
        grid = by_task(list(turns.rows))
        assert grid.header == ("setting", AVERAGE, "turn 1", "turn 2", "turn 3")
        assert grid.markdown() in section(run, [])

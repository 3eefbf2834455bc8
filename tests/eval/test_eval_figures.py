"""Pictures and pages of results: every setting is in them, and the same run gives the same files."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_runs import FULL, SETTINGS, answers, config, item_id

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.records import AVERAGE
from ov_kvcrush.eval.report import figures
from ov_kvcrush.eval.report.document import write_results
from ov_kvcrush.eval.report.figures import accuracy_figure, frontier_figure, needle_figure, task_figure, write_figures
from ov_kvcrush.eval.report.frontier import frontier, method_of, panels_of
from ov_kvcrush.eval.report.tables import policy_label, row_label
from ov_kvcrush.eval.runs.run_folder import RunFolder
from ov_kvcrush.eval.statistics import ResultRow, result_rows

ANSWERS = [*answers(), *answers(tasks=["needle"], items=6, seed=1)]
ROWS = result_rows(ANSWERS, SETTINGS, "ruler", resamples=50)


def finished(path: Path) -> Path:
    with RunFolder(path, config()) as folder:
        for prediction in ANSWERS:
            folder.add(prediction)
        folder.finish(ROWS)
    return path


def png_size(content: bytes) -> tuple[int, int]:
    """Width and height, after every chunk was checked and all pixels were unpacked."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    place, kinds, packed = 8, [], b""
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        chunk = content[place + 4 : place + 8 + length]
        (crc,) = struct.unpack(">I", content[place + 8 + length : place + 12 + length])
        assert zlib.crc32(chunk) == crc
        kinds.append(chunk[:4])
        packed += chunk[4:] if chunk[:4] == b"IDAT" else b""
        place += 12 + length
    assert (kinds[0], kinds[-1]) == (b"IHDR", b"IEND")
    width, height = struct.unpack(">II", content[16:24])
    assert len(zlib.decompress(packed)) == height * (4 * width + 1)  # RGBA, and a filter byte per line
    return width, height


def test_many_settings_are_ranked_with_their_intervals() -> None:
    average = [row for row in ROWS if row.task == AVERAGE]
    (axes,) = figures.ranking_figure(ROWS).axes
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == [row_label(row) for row in sorted(average, key=lambda row: row.score)]
    points = axes.containers[0].lines[0].get_xdata()
    assert points == pytest.approx([100 * row.difference for row in sorted(average, key=lambda row: row.score)])


def test_more_settings_than_colours_have_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_MAX_SETTINGS", len(SETTINGS) - 1)
    found = write_figures(tmp_path / "a", ROWS, ANSWERS, SETTINGS)
    assert [path.name for path in found] == ["a-ranking.png", "a-needles.png"]


def test_a_frontier_has_of_each_method_what_it_does_not_beat_itself() -> None:
    base = next(row for row in ROWS if row.task == AVERAGE)

    def row(num_bytes: float, kl: float, **changes: Any) -> ResultRow:
        return replace(base, bytes_per_prompt_token=num_bytes, kl_mean=kl, kl_median=kl, top1=1.0, **changes)

    a = [row(100, 0.5), row(200, 0.6), row(200, 0.3), row(400, 0.3), row(800, 0.1)]
    plan = [row(100, 0.2, budget="1/8", kept=None), row(300, 0.05, budget="1/4", kept=None)]
    panel = panels_of([*a, *plan])[0]
    curves = frontier([*plan, *a], panel)
    assert curves == {method_of(plan[0]): plan, method_of(a[0]): [a[0], a[2], a[4]]}
    axes = frontier_figure([*a, *plan]).axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.5, 0.3, 0.1], [0.2, 0.05]]


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_pictures_are_whole_and_the_same_again(tmp_path: Path) -> None:
    written = write_figures(tmp_path / "a.b", ROWS, ANSWERS, SETTINGS)
    assert [path.name for path in written] == ["a.b-accuracy.png", "a.b-tasks.png", "a.b-needles.png"]
    for path in written:
        width, height = png_size(path.read_bytes())
        assert 600 <= width <= 5200
        assert 300 <= height <= 3000
    again = write_figures(tmp_path / "again", ROWS, ANSWERS, SETTINGS)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]


def test_the_users_style_changes_nothing(tmp_path: Path) -> None:
    import matplotlib

    plain = write_figures(tmp_path / "plain", ROWS, ANSWERS, SETTINGS)[0].read_bytes()
    with matplotlib.rc_context({"axes.facecolor": "black", "lines.linewidth": 9, "text.color": "white"}):
        assert write_figures(tmp_path / "dark", ROWS, ANSWERS, SETTINGS)[0].read_bytes() == plain
        assert matplotlib.rcParams["lines.linewidth"] == 9


def test_every_policy_and_precision_is_in_the_legend() -> None:
    figure = accuracy_figure(ROWS)
    shown = legend(figure)
    assert sorted(shown) == sorted(
        {policy_label(row) for row in ROWS} | {f"{row.precisions} keys/values" for row in ROWS}
    )
    assert figure.get_facecolor()[:3] == (1, 1, 1)


def test_accuracy_has_a_point_for_every_setting_and_names_its_axes() -> None:
    axes = accuracy_figure(ROWS).axes[0]
    points = {(float(x), float(y)) for line in axes.lines for x, y in zip(*line.get_data(), strict=True)}
    for row in ROWS:
        if row.task == AVERAGE:
            assert (row.bytes_per_prompt_token, 100 * row.score) in points
    assert axes.get_xlabel()
    assert axes.get_ylabel()


def test_queries_have_a_panel_each() -> None:
    both = [FULL, SETTINGS[2], *(type(FULL)(**{**vars(s), "query": "agnostic"}) for s in (FULL, SETTINGS[2]))]
    rows = result_rows(answers(both), both, "ruler", resamples=10)
    assert [axes.get_title() for axes in accuracy_figure(rows).axes] == ["ruler, query-aware", "ruler, query-agnostic"]


def test_bars_are_shares_of_the_full_cache() -> None:
    figure = task_figure(ROWS)
    axes = figure.axes[0]
    groups = [label.get_text() for label in axes.get_xticklabels()]
    assert groups == [AVERAGE, "qa", "code", "needle"]
    rows = {(row_label(row), row.task): row for row in ROWS}
    labels = [row_label(setting) for i, setting in enumerate(SETTINGS) if i not in (0, 1, 7)]
    # The full caches that others are measured by, or that equal them, have no bars.
    assert sorted(legend(figure)) == sorted(labels)
    for bars in axes.containers:
        shares = [rows[bars.get_label(), group] for group in groups]
        heights = [bar.get_height() for bar in bars]
        assert heights == pytest.approx([100 * row.score / row.full_score for row in shares])


def test_a_task_that_the_full_cache_fails_has_no_bar() -> None:
    made = [type(p)(**{**vars(p), "score": 0.0 if p.task == "qa" else p.score}) for p in answers()]
    axes = task_figure(result_rows(made, SETTINGS, "ruler", resamples=10)).axes[0]
    assert all(np.isnan(bars[1].get_height()) and bars[2].get_height() > 0 for bars in axes.containers)


def test_needle_map_has_the_mean_score_at_every_place() -> None:
    figure = needle_figure(ANSWERS, SETTINGS)
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == len(SETTINGS)
    for axes, setting in zip(panels, SETTINGS, strict=True):
        shown = axes.images[0].get_array()
        assert shown.shape == (3, 2)
        for number in range(6):
            own = [p.score for p in ANSWERS if p.item_id == item_id("needle", number) and p.setting_key == setting.key]
            assert shown[number // 2, number % 2] == pytest.approx(100 * np.mean(own))
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1024", "2048"]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "50", "100"]


def test_without_matplotlib_the_fix_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CrushError, match=r"pictures must have matplotlib, got none; pip install 'ov-kvcrush\[plot\]'"):
        write_figures(tmp_path / "x", ROWS, ANSWERS, SETTINGS)


def test_results_have_a_page_with_command_machine_table_and_pictures_of_every_run(tmp_path: Path) -> None:
    runs = [finished(tmp_path / name) for name in ("one", "two")]
    (runs[1] / "notes.md").write_text("Chosen on the even items.\n")
    (tmp_path / "said.md").write_text("What came out.\n")
    target = tmp_path / "docs" / "results.md"
    written = write_results(runs, target, "ov_kvcrush-eval results one two", tmp_path / "said.md")
    front = written[0].read_text()
    assert front.startswith("# Results\n\nWhat came out.\n")
    assert "results one two" in front
    for name in ("one", "two"):
        assert f"[{name}](results/{name}.md)" in front
        text = (tmp_path / "docs" / "results" / f"{name}.md").read_text()
        assert text.startswith("# ruler: tiny-int8\n")
        assert "ov_kvcrush-eval ruler --model tiny-int8 --out c" in text
        assert ("Chosen on the even items." in text) == (name == "two")
        for part in ("a CPU, 2 threads", "openvino 1, ov_kvcrush 0", "fingerprint `abc123`", "seed 7"):
            assert part in text
        for kind in ("accuracy", "tasks", "needles"):
            assert f"({name}-{kind}.png)" in text
            png_size((tmp_path / "docs" / "results" / f"{name}-{kind}.png").read_bytes())
        for setting in SETTINGS:
            assert f"| {row_label(setting)} |" in text
        assert "/models" not in front + text


def test_results_are_the_same_again(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    first, second = (write_results([folder], tmp_path / name / "results.md") for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_results_of_no_run_are_refused(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    with pytest.raises(CrushError, match="folders must be at least one, with different names, got none"):
        write_results([], tmp_path / "results.md")
    with pytest.raises(CrushError, match="with different names"):
        write_results([folder, folder], tmp_path / "results.md")
    with pytest.raises(CrushError, match="must hold a run"):
        write_results([tmp_path], tmp_path / "results.md")
    with pytest.raises(CrushError, match=r"none\.md must be readable UTF-8 text"):
        write_results([folder], tmp_path / "results.md", notes=tmp_path / "none.md")
    assert not (tmp_path / "results.md").exists()

"""The bench of attention alone and the pictures: both sides do the same work, on the bytes that are told."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from ov_kvcrush.bench.attention.graph import Shape, Tokens
from ov_kvcrush.bench.attention.measure import AttentionRow, AttentionSettings, measure_attention
from ov_kvcrush.bench.attention.memory_speed import MemoryReader, _bytes_of, reader_bytes
from ov_kvcrush.bench.attention.steps import CrushAttention, StockAttention
from ov_kvcrush.bench.cli import app
from ov_kvcrush.bench.plot import Point, panels_of, points_of, read_reports, write_plot
from ov_kvcrush.config import PRECISIONS
from ov_kvcrush.errors import CrushError
from ov_kvcrush.model.graph.attention import AttentionLayer
from ov_kvcrush.model.plugin import paged_precisions, plugin_precisions
from ov_kvcrush.utils.process_memory import free_memory_bytes

# Of two widths, one with a sliding window.
LAYERS = [AttentionLayer("a", 4, 2, 32, 0, 0.2), AttentionLayer("b", 6, 2, 48, 0, 0.1)]
SLIDING = replace(LAYERS[0], window=40)
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
SHAPES = [Shape(1, 1), Shape(31, 2), Shape(32, 3), Shape(1100, 2)]


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def crush(layers: Sequence[AttentionLayer], types: str = "f32", threads: Sequence[int] = (1,)) -> CrushAttention:
    store = {"key": types, "value": types, "recent_tokens": 32, "group_size": 16}
    return CrushAttention(layers, store, "f32", threads, F32)


# -- the steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_sides_compute_the_same(shape: Shape) -> None:
    layers = [*LAYERS, SLIDING]
    sides = StockAttention(layers, [1], {**F32, "KV_CACHE_PRECISION": "f32"}), crush(layers)
    tokens = Tokens.random(layers)
    results = []
    for side in sides:
        side.fill(tokens, shape)
        side.prepare(1).infer()
        results.append(side.outputs(1))
    for stock, ours in zip(*results, strict=True):
        assert stock.shape[0] == shape.batch
        np.testing.assert_allclose(ours, stock, rtol=1e-3, atol=1e-5)


def test_every_step_is_the_same_step() -> None:
    side = crush(LAYERS, "u8", threads=[1, 2])
    for shape in SHAPES:
        side.fill(Tokens.random(LAYERS), shape)
        results = []
        for threads in (1, 2, 1, 2):
            side.prepare(threads).infer()
            results.append((side.stored_bytes, side.outputs(threads)))
        for stored, outputs in results[1:]:
            assert stored == results[0][0]
            for output, first in zip(outputs, results[0][1], strict=True):
                np.testing.assert_allclose(output, first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("types", ["f32", "u4"])
def test_bytes_are_those_of_the_store(shape: Shape, types: str) -> None:
    side = crush(LAYERS, types)
    side.fill(Tokens.random(LAYERS), shape)
    assert side.nbytes(shape) == side.stored_bytes


def test_a_window_is_all_that_is_read() -> None:
    side = crush([SLIDING])
    assert side.nbytes(Shape(40, 1)) == side.nbytes(Shape(4000, 1)) < crush(LAYERS[:1]).nbytes(Shape(4000, 1))


# -- types that PagedAttention has -------------------------------------------------------------------------------------


def types_that_run(properties: dict[str, Any]) -> tuple[str, str] | None:
    """Types of cached keys and values of a model that runs with these properties; None if none does."""
    try:
        side = StockAttention(LAYERS[:1], [1], properties)
        side.fill(Tokens.random(LAYERS), Shape(33, 1))
    except RuntimeError:
        return None
    return side.precisions


@pytest.mark.parametrize("hint", [F32, {}], ids=["f32", "default"])
def test_types_are_expressed_exactly_where_they_run(hint: dict[str, str]) -> None:
    for key, value in itertools.product(PRECISIONS, repeat=2):
        asked = {"KEY_CACHE_PRECISION": key, "VALUE_CACHE_PRECISION": value}
        can = types_that_run({**hint, **asked}) == (key, value)
        assert paged_precisions(key, value, hint) == (asked if can else {}), (key, value)


def test_defaults_and_properties_are_seen() -> None:
    assert plugin_precisions({})[:2] == ("u8", "u8")
    assert plugin_precisions({**F32, "KV_CACHE_PRECISION": "f32"}) == ("f32", "f32", "f32")
    assert plugin_precisions({"VALUE_CACHE_PRECISION": "u4"})[:2] == ("u8", "u4")
    assert plugin_precisions({"EXECUTION_MODE_HINT": "ACCURACY"}).inference == "f32"


# -- measuring ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> list[AttentionRow]:
    chosen = AttentionSettings(contexts=(20, 70), batches=(1, 2), threads=(1,), runs=3, key_precision="u4")
    stages: list[str] = []
    measured = list(measure_attention(LAYERS, chosen, stages.append))
    assert len(stages) == chosen.num_stages
    return measured


def test_rows_follow_their_definitions(rows: list[AttentionRow]) -> None:
    assert [(row.context, row.batch) for row in rows] == [(20, 1), (70, 1), (20, 2), (70, 2)]
    for row in rows:
        assert (row.key_precision, row.value_precision, row.num_layers) == ("u4", "u8", 2)
        assert (len(row.stock_ms_each), len(row.crush_ms_each), len(row.memory_gb_s_each)) == (3, 3, 6)
        assert sorted(row.stock_ms_each)[1] == row.stock_ms
        assert sorted(row.crush_ms_each)[1] == row.crush_ms
        assert row.speedup == pytest.approx(row.stock_ms / row.crush_ms)
        assert row.bound_ms == pytest.approx(row.crush_bytes / (row.memory_gb_s * 1e9) * 1e3)
        assert row.over_bound == pytest.approx(row.crush_ms / row.bound_ms)
        assert row.crush_gb_s == pytest.approx(row.memory_gb_s / row.over_bound)


def test_command_measures_a_real_model_and_draws_it(shallow: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    options = ("--attention", "--layers", 2, "--context", "33,64", "--runs", 1, "--threads", "1")
    done = bench(shallow, *options, "--value-precision", "u2", "--json", out, "--plot", picture)
    assert done.exit_code == 0, done.output
    assert "u8/u2" in done.output
    report = json.loads(out.read_text())
    assert [(row["context"], row["num_layers"], row["threads"]) for row in report["attention"]] == [
        (33, 2, 1),
        (64, 2, 1),
    ]
    assert report["settings"]["model"] == str(shallow)
    assert report["environment"]["kernel"].startswith("CrushAttention")
    assert b"</svg>" in picture.read_bytes()


def test_memory_is_read_whole() -> None:
    reader = MemoryReader(1 << 20, 3)
    assert sum(part.nbytes for part in reader._parts) == 1 << 20
    assert reader.read() > 0
    reader._parts[2][-1] = 2
    with pytest.raises(AssertionError, match="something else"):
        reader.read()
    reader.close()


def test_reader_passes_all_caches_and_leaves_memory() -> None:
    assert (_bytes_of("48K\n"), _bytes_of("300M"), _bytes_of("512"), _bytes_of("")) == (48 << 10, 300 << 20, 512, 0)
    assert 0 < reader_bytes() <= free_memory_bytes()


# -- pictures ----------------------------------------------------------------------------------------------------------

MACHINE = {"settings": {"model": "a/model"}, "environment": {"cpu": "a CPU"}}


def points(*places: tuple[int, int, int]) -> list[Point]:
    return [Point("attention", "line", *place, ms=float(sum(place))) for place in places]


def test_panels_vary_one_thing_and_hold_the_others() -> None:
    long_line = points((1, 1, 2), (2, 1, 2), (4, 1, 2))
    panels = panels_of([*long_line, *points((2, 4, 2), (9, 8, 1), (4, 1, 1))])
    assert [(panel.axis, panel.title) for panel in panels] == [
        ("context", "batch 1, threads 2"),
        ("batch", "context 2, threads 2"),
        ("threads", "context 4, batch 1"),
    ]
    assert panels[0].lines == {"line": [(1, 4.0), (2, 5.0), (4, 7.0)]}
    assert panels[1].lines == {"line": [(1, 5.0), (4, 8.0)]}


def test_a_place_measured_twice_is_drawn_once() -> None:
    again = [replace(point, ms=point.ms + 1) for point in points((1, 1, 1))]
    (panel,) = panels_of([*points((1, 1, 1), (2, 1, 1)), *again])
    assert panel.lines == {"line": [(1, 3.5), (2, 4.0)]}
    assert panels_of(points((1, 1, 1), (2, 2, 1))) == []


def test_cost_is_that_of_one_token(rows: list[AttentionRow]) -> None:
    both = [{"attention": [vars(row) for row in rows]}, {"rows": [row_of_engine(4, 200.0)]}]
    found = {(p.label, p.context, p.batch): p for report in both for p in points_of(report)}
    row = rows[3]
    assert found["CrushAttention u4/u8", 70, 2].ms == row.crush_ms / 2
    bound = found["reading u4/u8 at memory speed", 70, 2]
    assert (bound.ms, bound.bound_of) == (row.bound_ms / 2, "CrushAttention u4/u8")
    assert found["genai u8/u8", 64, 4].ms == 5.0


def row_of_engine(batch: int, tokens_per_s: float) -> dict[str, Any]:
    types = {"key_precision": "u8", "value_precision": "u8"}
    return {"engine": "genai", "context": 64, "batch": batch, "tokens_per_s": tokens_per_s, **types}


def test_files_of_several_runs_are_drawn_together(tmp_path: Path) -> None:
    files = []
    for batch in (1, 4):
        files.append(tmp_path / f"{batch}.json")
        files[-1].write_text(json.dumps({**MACHINE, "rows": [row_of_engine(batch, 100.0 * batch)]}))
    picture = tmp_path / "out.png"
    done = bench("--plot", picture, "--from", files[0], "--from", files[1])
    assert done.exit_code == 0, done.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CrushError, match="must have two values"):
        write_plot(picture, read_reports(files[:1]))
    files[0].write_text(json.dumps({**MACHINE, "settings": {"model": "b"}, "rows": [row_of_engine(1, 1.0)]}))
    with pytest.raises(CrushError, match="about one model and one machine, got b, a CPU and model, a CPU"):
        read_reports(files)


BAD_FILES = {
    "no JSON": ("{", "which is no JSON"),
    "a list": ("[]", "with other content"),
    "no model": ('{"rows": [1]}', "with other content"),
    "nothing measured": (json.dumps(MACHINE), "without measurements"),
    "rows of something else": (json.dumps({**MACHINE, "rows": [{"context": 1}]}), "with other 'rows'"),
    "a time of zero": (json.dumps({**MACHINE, "rows": [row_of_engine(1, 0)]}), "with other 'rows'"),
    "a time of nothing": (json.dumps({**MACHINE, "rows": [row_of_engine(1, float("nan"))]}), "with other 'rows'"),
    "a batch of text": (json.dumps({**MACHINE, "rows": [{**row_of_engine(1, 1), "batch": "1"}]}), "with other 'rows'"),
    "an object of rows": (json.dumps({**MACHINE, "attention": {"a": 1}}), "with other 'attention'"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_one_clear_line(case: str, tmp_path: Path) -> None:
    text, message = BAD_FILES[case]
    path = tmp_path / "in.json"
    path.write_text(text)
    done = bench("--plot", tmp_path / "out.png", "--from", path)
    assert done.exit_code == 2, done.output
    (line,) = done.output.splitlines()
    assert line.startswith("error: --from must be")
    assert message in line
    assert not (tmp_path / "out.png").exists()

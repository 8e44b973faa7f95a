"""docs/evaluation.md says what the code does: its names, its example and its limits."""

import re
from typing import Any

import pytest
import typer

from hymba_tune.cli import app
from hymba_tune.data.decontaminate import BOILERPLATE_CONVERSATIONS, EXACT_WORDS, NGRAM_WORDS, SHORT_WORDS
from hymba_tune.evaluation import bfcl, bfcl_decode, bfcl_source, gsm8k, ifeval, own_items, rolebench, scorers
from hymba_tune.evaluation.catalogue import SUITES, TASKS, find_tasks
from hymba_tune.evaluation.own_items import own_rows
from hymba_tune.evaluation.suite import BATCH_TOKENS
from hymba_tune.paths import REPOSITORY

TEXT = (REPOSITORY / "docs" / "evaluation.md").read_text(encoding="utf-8")


def cells(heading: str) -> dict[str, list[str]]:
    """First cell -> the other cells of the table whose header begins so."""
    table = re.search(rf"^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    assert table
    rows = [[cell.strip().strip("`") for cell in line.strip("|\n").split(" | ")] for line in table[1].splitlines()]
    return {row[0].strip("`").strip(): row[1:] for row in rows}


COMMANDS = re.findall(r"^    hymba-tune ((?:eval|data check) .*(?:\n {8,}.*)*)", TEXT, re.MULTILINE)


def parsed(command: str) -> dict[str, Any]:
    """What the command line makes of a command; in a synopsis, of all its options with a number for N."""
    words = re.sub(r"\bN\b", "7", re.sub(r"[\[\]]", "", command)).split()
    context: Any = None
    found: Any = typer.main.get_command(app)
    while isinstance(found, typer.core.TyperGroup):
        context = found.make_context(words[0], [words[0]], parent=context, resilient_parsing=True)
        found = found.commands[words.pop(0)]
    params: dict[str, Any] = found.make_context("", words, parent=context).params
    return params


def test_every_command_is_understood():
    assert len(COMMANDS) >= 5
    settings = [parsed(command) for command in COMMANDS]
    tiny = next(one for one in settings if one.get("max_new_tokens") == 48)
    assert (tiny["model"], tiny["suite"], str(tiny["data"])) == ("tiny", ["paper"], "benchmarks")
    for one in settings:
        find_tasks([name for name in one.get("suite") or [] if name != "SUITE"])


def test_a_synopsis_names_every_option():
    synopses = [command for command in COMMANDS if "[" in command]
    assert len(synopses) == 2
    for command in synopses:
        assert None not in {name: value for name, value in parsed(command).items() if name != "tasks"}.values()


def test_suites_and_their_tasks_are_the_catalogues():
    listed = cells("suite")
    assert listed.keys() == SUITES.keys()
    for name, (tasks,) in listed.items():
        assert tuple(tasks.partition(":")[0].split(", ")) == SUITES[name]


def test_every_task_and_its_headline_are_named():
    for name, row in cells("task").items():
        names = name.split(", ")
        for task in ["rolebench_instruction", "rolebench_role", "rolebench_zh"] if name == "rolebench_*" else names:
            assert TASKS[task].headline == row[1]
    for task in TASKS:
        assert task in TEXT
    named = set(re.findall(r"`((?:gsm8k|mmlu|bfcl_v2|rolebench)_\w+)`", TEXT))
    assert named <= TASKS.keys()


def test_scorers_are_those_that_there_are_and_the_example_is_a_task(tmp_path):
    assert cells("scorer").keys() == scorers.SCORERS.keys()
    example = re.search(r"```json\n(.*?)```", TEXT, re.DOTALL)
    assert example
    path = tmp_path / "example.jsonl"
    path.write_text(example[1])
    assert [row["group"] for row in own_rows(path, "contains")] == ["products", ""]
    assert list(find_tasks([f"{path}:contains"])) == ["example"]


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("IFEval 1,280 new", ifeval._config()["generation_kwargs"]["max_gen_toks"]),
        ("BFCL 1,000;", bfcl.MAX_NEW_TOKENS),
        ("RoleBench 512", rolebench.MAX_NEW_TOKENS),
        ("first 32,768 characters", ifeval.MAX_SCORED_CHARS),
        ("read 20,000", scorers.LONGEST),
        ("read 20,000", rolebench.MAX_SCORED_CHARS),
        ("parses 100,000", bfcl_decode.MAX_ANSWER_CHARS),
        ("8,192 of Java", bfcl_source.MAX_SOURCE_CHARS),
        ("at most 1,024 new", own_items.MAX_NEW_TOKENS),
        ("computed together, 16,384 unless", BATCH_TOKENS),
        ("(5 words or more)", EXACT_WORDS),
        ("or 13 consecutive", NGRAM_WORDS),
        ("item of 8 to 12", SHORT_WORDS),
        ("more than 10 conversations", BOILERPLATE_CONVERSATIONS),
    ],
)
def test_numbers_are_the_codes(words, value):
    assert words in " ".join(TEXT.split())
    assert f"{value:,}" in words


def test_the_length_of_gsm8k_is_the_protocols():
    assert "8192 tokens in all" in gsm8k.PROTOCOLS["gsm8k"]
    assert "GSM8K: 8,192 tokens in all" in " ".join(TEXT.split())

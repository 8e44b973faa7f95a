"""RoleBench: an answer in the voice of a role, compared with references by Rouge-L.

Three tasks, one a split: `rolebench_instruction` (English, known roles, new instructions), `rolebench_role` (English,
new roles) and `rolebench_zh`. Each has up to three parts:

- cus: general instructions, references in the role's voice;
- raw: the same instructions, plain references (RoleBench publishes none: a file raw.jsonl of the user's own);
- spe: questions about the role itself.

The reported value of a split is the mean of the three (RoleLLM, arXiv 2310.00746, table 3); `mean` stands only where
all three have files. A part's value is the mean Rouge-L recall, for each item the best over its references, as
RoleBench's published values are computed (PyPI rouge 1.0.1, case kept, Chinese by character); PART_f1 is the best F1
of the same, PART_first_f1 (English) that of PyPI rouge_score against the first reference, as OpenCompass compares.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hymba_tune.data.benchmarks import BenchmarkNotFound, data_folder, read_jsonl
from hymba_tune.errors import UserError
from hymba_tune.evaluation.averages import mean_of_metrics
from hymba_tune.evaluation.chat_task import ChatItem, Verdict, run_chat_task
from hymba_tune.evaluation.engine import Engine
from hymba_tune.evaluation.results import Metric, Scores, mean_metric
from hymba_tune.evaluation.rouge import rouge_l_f1, union_rouge_l

PROTOCOLS = {
    "rolebench_instruction": "RoleBench English instruction generalization, Rouge-L recall (rouge 1.0.1, max) v1",
    "rolebench_role": "RoleBench English role generalization, Rouge-L recall (rouge 1.0.1, max) v1",
    "rolebench_zh": "RoleBench Chinese, Rouge-L recall by character (rouge 1.0.1, max) v1",
}
HEADLINE = "spe"
FOLDERS = {
    "rolebench_instruction": "rolebench-eng/instruction-generalization",
    "rolebench_role": "rolebench-eng/role-generalization",
    "rolebench_zh": "rolebench-zh",
}
PARTS = {"cus": "general/test.jsonl", "raw": "general/raw.jsonl", "spe": "role_specific/test.jsonl"}
ORIGIN = "huggingface.co/datasets/ZenMoore/RoleBench"
MAX_NEW_TOKENS = 512
MAX_SCORED_CHARS = 20_000
"""Of an answer; the rest is not compared. The longest reference has fewer."""

# Data of the protocol: RoleLLM's system prompts, as OpenCompass gives them; without a profile the clause goes.
SYSTEM_PROMPT = (
    "You are {role}{description}. Now please answer some questions to accurately show your personality traits! Your "
    "speaking style should fully imitate the personality role assigned to you! Please do not expose that you are an "
    "artificial intelligence model or a language model, you must always remember that you are only assigned one "
    "personality role. Don’t be verbose or too formal or polite when speaking."
)
SYSTEM_PROMPT_ZH = (
    "你是{role}{description}。现在请你回答我的一些问题以准确展现你的人格特征！你的说话风格要全面模仿被赋予的人格角色！"
    "请不要暴露你是人工智能模型或者语言模型，你要时刻记住你只被赋予一个人格角色。说话不要啰嗦，也不要太过于正式或礼貌。"
)

Row = dict[str, Any]


def rolebench_rows(task: str, data: str | Path | None) -> list[Row]:
    """The items of all parts that have files: id, part, role, question, references, description (None: no profile).

    Raises BenchmarkNotFound where no part has a file, UserError for a broken line.
    """
    folder = _folder(data)
    profiles = _profiles(folder, task) if folder else {}
    rows = [
        _item(row, f"{part}-{number}", path, part, profiles)
        for part, path in _paths(task, folder).items()
        if path.is_file()
        for number, row in enumerate(read_jsonl(path))
    ]
    if not rows:
        raise BenchmarkNotFound(f"{task}: " + "; ".join(missing_parts(task, data).values()))
    return rows


def missing_parts(task: str, data: str | Path | None) -> dict[str, str]:
    """The parts that cannot run, and how to get their files."""
    reasons = {}
    for part, path in _paths(task, _folder(data)).items():
        if not path.is_file():
            reasons[part] = (
                f"{path} is missing; RoleBench publishes no plain references: write role, question and generated "
                "(a list), one object a line"
                if part == "raw"
                else f"{path} is missing; get it from {ORIGIN} (github.com/rolellm/RoleBench lacks large files)"
            )
    return reasons


def _folder(data: str | Path | None) -> Path | None:
    folder = data_folder(data)
    return folder / "rolebench" if folder else None


def _paths(task: str, folder: Path | None) -> dict[str, Path]:
    return {part: (folder or Path("rolebench")) / FOLDERS[task] / name for part, name in PARTS.items()}


def _profiles(folder: Path, task: str) -> dict[str, str]:
    """Role descriptions, where the user has RoleBench's profiles."""
    path = folder / ("profiles-zh" if task == "rolebench_zh" else "profiles-eng") / "desc.json"
    if not path.is_file():
        return {}
    try:
        profiles = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); get it again from {ORIGIN}") from None
    if not isinstance(profiles, dict):
        raise UserError(f"{path}: needs an object, role to description; get it again from {ORIGIN}")
    return profiles


def _item(row: Row, name: str, path: Path, part: str, profiles: dict[str, str]) -> Row:
    references = row.get("generated")
    texts = [row.get("role"), row.get("question"), *(references if isinstance(references, list) else [None])]
    if len(texts) < 3 or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path}: item {name}: needs role, question and generated (a list of texts)")
    return {
        "id": name,
        "part": part,
        "role": row["role"],
        "question": row["question"],
        "references": references,
        "description": profiles.get(row["role"]),
    }


def prompt_messages(task: str, row: Row) -> list[dict[str, Any]]:
    """The role as system message, the question as the user's."""
    chinese = task == "rolebench_zh"
    clause = "，你的特征描述是：" if chinese else ", your description is: "
    system = (SYSTEM_PROMPT_ZH if chinese else SYSTEM_PROMPT).format(
        role=row["role"], description=f"{clause}{row['description']}" if row["description"] else ""
    )
    return [{"role": "system", "content": system}, {"role": "user", "content": row["question"]}]


def score(task: str, answer: str, references: Sequence[str]) -> Verdict:
    """Rouge-L of an answer: recall and F1, each the best over the references, and first_f1 (English)."""
    text = answer[:MAX_SCORED_CHARS]
    chinese = task == "rolebench_zh"
    found = [union_rouge_l(_words(text, chinese), _words(reference, chinese)) for reference in references]
    scores = {"recall": max(rouge.recall for rouge in found), "f1": max(rouge.f1 for rouge in found)}
    if not chinese:
        scores["first_f1"] = rouge_l_f1(text, references[0])
    cut = f", first {MAX_SCORED_CHARS} characters" if len(answer) > MAX_SCORED_CHARS else ""
    return Verdict(scores, "whole answer" if text.strip() else None, f"best of {len(references)} references{cut}")


def _words(text: str, chinese: bool) -> str:
    return " ".join(text) if chinese else text


def run_rolebench(task: str, engine: Engine, rows: Sequence[Row], limit: int | None) -> Scores:
    """One split, on the first `limit` items of each part (None: all)."""
    taken = [row for part in PARTS for row in [row for row in rows if row["part"] == part][:limit]]
    return run_chat_task(
        engine,
        [ChatItem(row["id"], prompt_messages(task, row), row["references"], None, row["part"]) for row in taken],
        lambda item, answer: score(task, answer, item.target),
        max_new_tokens=MAX_NEW_TOKENS,
        aggregate=aggregate,
    )


def aggregate(items: Sequence[ChatItem], verdicts: Sequence[Verdict]) -> dict[str, Metric]:
    """Each part's recall (named as the part), F1s, and the mean of the three parts where all are there."""
    metrics: dict[str, Metric] = {}
    for part in PARTS:
        scores = [verdict.scores for item, verdict in zip(items, verdicts, strict=True) if item.group == part]
        for name in scores[0] if scores else ():
            metrics[part if name == "recall" else f"{part}_{name}"] = mean_metric([score[name] for score in scores])
    if metrics.keys() >= PARTS.keys():
        metrics["mean"] = mean_of_metrics([metrics[part] for part in PARTS])
    return metrics

"""The embedded tasks: held-out items of data/synthetic, judged by rules.

- tiny_math, tiny_code, tiny_calls: exact match.
- tiny_constraints: all_constraints, the share of answers that meet every constraint of form and content, and
  each_constraint, the share of constraints met.
- tiny_preferences: preference_accuracy, how often the preferred reply of a pair is the likelier one (log-likelihoods
  summed over its tokens and the end of turn), and win_share, how often the model's own answer is as good as the
  preferred reply: it says the right sentence, has a kind phrase, and none that is rude or declines without need.
- tiny_roles: rouge_l, Rouge-L F1 (as PyPI rouge_score), the best over all ways in which the persona may say it.

Answers are data: code is parsed and compared, never run.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hymba_tune.data.pairs import encode_pair
from hymba_tune.data.synthetic import held_out
from hymba_tune.evaluation.chat_task import ChatItem, Verdict, run_chat_task
from hymba_tune.evaluation.embedded_constraints import constraints_met
from hymba_tune.evaluation.engine import Engine
from hymba_tune.evaluation.results import Scores
from hymba_tune.evaluation.rouge import rouge_l_f1
from hymba_tune.evaluation.scorers import LONGEST, METRIC, Scorer, score_calls, score_code, verdict

HEADLINES = {
    "tiny_math": METRIC,
    "tiny_code": METRIC,
    "tiny_calls": METRIC,
    "tiny_constraints": "all_constraints",
    "tiny_preferences": "preference_accuracy",
    "tiny_roles": "rouge_l",
}
ITEMS = {name: 300 if headline == METRIC else 500 for name, headline in HEADLINES.items()}
"""Held-out items a task: a standard error of at most 2.9 points a task, and of 1.7 over the three of exact match."""
PROTOCOLS = {
    name: f"{name}: {ITEMS[name]} embedded held-out items, {headline.replace('_', ' ')} v1"
    for name, headline in HEADLINES.items()
}
MAX_NEW_TOKENS = 96
"""Nearly twice the longest reference answer in the embedded tokenizer."""


def held_out_items(task: str, data: object = None) -> list[dict[str, Any]]:
    """The held-out items of a task; `data`, where other tasks have their files, is not needed."""
    return held_out(task, ITEMS[task])


def run_embedded(engine: Engine, rows: Sequence[dict[str, Any]], limit: int | None) -> Scores:
    """A task on its first `limit` items (None: all)."""
    rows = rows[:limit]
    items = [ChatItem(row["id"], row["messages"], row["target"], row.get("tools")) for row in rows]
    scorer = {row["id"]: SCORERS[row["scorer"]] for row in rows}
    preferred = _preferred(engine, [row for row in rows if row["scorer"] == "preference"])

    def judge(item: ChatItem, answer: str) -> Verdict:
        judged = scorer[item.id](answer, item.target)
        return replace(judged, scores=preferred.get(item.id, {}) | judged.scores)

    return run_chat_task(engine, items, judge, max_new_tokens=MAX_NEW_TOKENS)


def _preferred(engine: Engine, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each pair: whether its chosen reply is likelier than its rejected one."""
    requests = []
    for row in rows:
        replies = {side: [{"role": "assistant", "content": row["target"][side]}] for side in ("chosen", "rejected")}
        pair = {"prompt": row["messages"], "tools": row.get("tools"), **replies}
        prompt, chosen, rejected = encode_pair(engine.tokenizer, pair)
        requests += [(prompt, chosen), (prompt, rejected)]
    found = [total for total, _ in engine.loglikelihood(requests)]
    sides = zip(rows, found[::2], found[1::2], strict=True)
    return {row["id"]: {"preference_accuracy": float(chosen > rejected)} for row, chosen, rejected in sides}


def score_number(answer: str, target: str) -> Verdict:
    """The text after the last "####" against the target, spaces and thousands commas aside."""
    _, mark, number = answer[-LONGEST:].rpartition("####")
    found = number.strip().replace(",", "") if mark else None
    return verdict(found, found == target, target, "no '####' in the answer")


def score_constraints(answer: str, target: list[list[Any]]) -> Verdict:
    """Every constraint of form and content, see embedded_constraints.py."""
    met = constraints_met(answer[:LONGEST], target)
    scores = {"all_constraints": float(all(met.values())), "each_constraint": sum(met.values()) / len(met)}
    missed = [name for name, is_met in met.items() if not is_met]
    return Verdict(scores, answer.strip()[:LONGEST] or None, f"not met: {', '.join(missed)}" if missed else "all met")


def score_preference(answer: str, target: dict[str, Any]) -> Verdict:
    """Right, kind, and nothing that the rule forbids."""
    text = answer[:LONGEST]
    faults = [f"{phrase!r} is in it" for phrase in target["not"] if phrase in text]
    if target["right"] not in text:
        faults.append(f"not {target['right']!r}")
    if not any(phrase in text for phrase in target["kind"]):
        faults.append("no kind phrase")
    return Verdict({"win_share": float(not faults)}, text.strip() or None, "; ".join(faults) or "right and kind")


def score_rouge(answer: str, target: list[str]) -> Verdict:
    """The best Rouge-L F1 over the references."""
    text = answer[:LONGEST]
    best = max(rouge_l_f1(text, reference) for reference in target)
    return Verdict({"rouge_l": best}, text.strip() or None, f"best of {len(target)} references")


SCORERS: dict[str, Scorer] = {
    "number": score_number,
    "code": score_code,
    "calls": score_calls,
    "constraints": score_constraints,
    "preference": score_preference,
    "rouge": score_rouge,
}

"""Which answers a report shows: those that changed, the best and the worst, the same ones every time."""

from typing import Any

from hymba_tune.report.text import shortened

SHOWN = 2
"""Samples of each kind a task."""
CHARACTERS = 4000
"""Longest text of a sample; the task's own file has all of it."""

Result = dict[str, Any]


def choose_samples(before: Result | None, after: Result | None) -> list[dict[str, Any]]:
    """Samples of a task: kind (`improved`, `worsened`, `best`, `worst`), id, prompt, target, answers before and after.

    The score is the headline metric, or the item's first where the headline is a mean over groups. No item is shown
    twice.
    """
    latest = after or before
    if latest is None or not latest["items"]:
        return []
    metric = _item_metric(latest)
    old, new = _by_id(before, metric), _by_id(after, metric)
    scored = new or old
    both = [identifier for identifier in scored if identifier in old and identifier in new]
    gain = {i: _score(new[i], metric) - _score(old[i], metric) for i in both}
    ranked = sorted(scored, key=lambda i: -_score(scored[i], metric))
    kinds = {
        "improved": [i for i in sorted(both, key=lambda i: -gain[i]) if gain[i] > 0],
        "worsened": [i for i in sorted(both, key=lambda i: gain[i]) if gain[i] < 0],
        "best": [i for i in ranked if _score(scored[i], metric) > 0],
        "worst": [i for i in reversed(ranked) if _score(scored[i], metric) < 1],
    }
    shown: dict[str, str] = {}
    for kind, identifiers in kinds.items():
        fresh = [i for i in identifiers if i not in shown]
        shown |= dict.fromkeys(fresh[:SHOWN], kind)
    return [_sample(kind, i, old.get(i), new.get(i), metric) for i, kind in shown.items()]


def _item_metric(result: Result) -> str:
    numbers = [name for name, score in result["items"][0]["verdict"].items() if isinstance(score, int | float)]
    headline: str = result["headline"]
    return headline if headline in numbers else numbers[0]


def _by_id(result: Result | None, metric: str) -> dict[str, dict[str, Any]]:
    return {item["id"]: item for item in (result or {}).get("items", []) if metric in item["verdict"]}


def _score(item: dict[str, Any], metric: str) -> float:
    return float(item["verdict"][metric])


def _sample(
    kind: str, identifier: str, old: dict[str, Any] | None, new: dict[str, Any] | None, metric: str
) -> dict[str, Any]:
    item = new or old
    assert item is not None
    return {
        "kind": kind,
        "id": identifier,
        "prompt": shortened(item["prompt"], CHARACTERS) if item.get("prompt") else None,
        "target": item["target"],
        "before": _answer(old, metric),
        "after": _answer(new, metric),
    }


def _answer(item: dict[str, Any] | None, metric: str) -> dict[str, Any] | None:
    if item is None:
        return None
    return {
        "answer": shortened(item["answer"], CHARACTERS),
        "extracted": item["extracted"],
        "score": _score(item, metric),
        "why": item["why"],
    }

"""The four questions that a report answers first: did it get better, can I trust it, what did it cost, from what."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hymba_tune.report.figures import count, duration, number


def glance(headline: dict[str, Any], stages: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """[{question, answer, detail}] of a stage, or of a pipeline's stages together."""
    return [
        {"question": "Did it get better?", **_better(headline)},
        {"question": "Can I trust it?", **_trust(stages)},
        {"question": "What did it cost?", **_cost(stages)},
        {"question": "What did it learn from?", **_source(stages)},
    ]


def _better(headline: dict[str, Any]) -> dict[str, str]:
    cells = [cell for row in headline["rows"] for cell in row["cells"] if cell and cell["change"]]
    if not cells:
        return {"answer": "not known yet", "detail": "no task has been scored before and after"}
    verdicts = Counter(cell["verdict"] for cell in cells)
    answer = ", ".join(f"{verdicts[name]} {name}" for name in ("better", "worse") if verdicts[name])
    detail = f"of {len(cells)} changes; beyond two standard errors"
    return {"answer": answer or "no clear change", "detail": detail}


def _trust(stages: Sequence[dict[str, Any]]) -> dict[str, str]:
    found = sum(len(stage["doubts"]) for stage in stages)
    answer = f"{found} thing{'s' if found > 1 else ''} to look at" if found else "nothing speaks against it"
    items = [row[side]["n"] for stage in stages for row in stage["scores"] for side in ("after", "before") if row[side]]
    return {"answer": answer, "detail": f"fewest items a score: {min(items)}" if items else "nothing scored yet"}


def _cost(stages: Sequence[dict[str, Any]]) -> dict[str, str]:
    trained = [stage["training"] for stage in stages if stage["training"]]
    seconds = sum(part["seconds"] or 0 for part in trained)
    scoring = sum(_scoring(stage) for stage in stages)
    steps, tokens = (sum(part[key] or 0 for part in trained) for key in ("steps", "tokens"))
    return {
        "answer": f"{duration(seconds)} of training",
        "detail": f"{count(steps)} steps, {count(tokens)} tokens; {duration(scoring)} of scoring",
    }


def _source(stages: Sequence[dict[str, Any]]) -> dict[str, str]:
    sources = [source for stage in stages for source in (stage["data"] or {}).get("sources", [])]
    if not sources:
        return {"answer": "not prepared yet", "detail": ""}
    conversations = sum(source.get("conversations") or 0 for source in sources)
    tokens = sum(source.get("tokens") or 0 for source in sources)
    names = len({source.get("source") for source in sources})
    return {
        "answer": f"{count(conversations)} conversations",
        "detail": f"{number(names)} source{'s' if names > 1 else ''}, {count(tokens)} tokens in rows",
    }


def _scoring(stage: dict[str, Any]) -> float:
    """Seconds; a stage that follows another takes over that one's scores."""
    spent = stage["evaluation_seconds"]
    return float(spent["after"] + (0 if stage["parent"] else spent["before"]))

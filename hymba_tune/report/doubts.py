"""Why a run's figures may not mean what they seem to: what its warnings, its loss and its result files say."""

from typing import Any


def doubts(results: dict[str, Any]) -> list[str]:
    """One sentence each, of `collect`'s results; empty if nothing speaks against them."""
    found = [_warning(warning) for warning in results["warnings"]]
    training, environment = results["training"], results["environment"]
    if training and training["loss_lost_at"] is not None:
        found.append(f"The loss is not a finite number from step {training['loss_lost_at']} on.")
    if environment and (environment.get("git") or {}).get("changed"):
        found.append("The code was changed after the commit that is named below.")
    for row in results["scores"]:
        if row["headline"]:
            found += [f"{row['task']}: {note}" for note in row["notes"]]
    return found


def _warning(warning: dict[str, Any]) -> str:
    at = warning.get("stage_step")
    return str(warning.get("message")) + ("" if at is None else f" (at {at})")

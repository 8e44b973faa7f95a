"""The command that makes the embedded model anew (see tiny.py):

    python -m hymba_tune.make_tiny            (about 37 minutes on one core)

The tokenizer is trained on the embedded data, the base is what recipes/tiny_base.yaml pretrains with it: 6,800 steps,
6.95M tokens. A run that was cut goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from hymba_tune.geometry import CONFIG
from hymba_tune.recipe import load_recipe
from hymba_tune.stage import run_stage
from hymba_tune.tiny import make_tokenizer, tiny_config, tiny_path

RECIPE = "recipes/tiny_base.yaml"


def make_base(out: Path, overrides: Sequence[str] = (), work: Path = Path("runs/tiny_base")) -> None:
    """Make tokenizer and base and write them to a folder; the same settings give the same files.

    Args:
        overrides: `section.key=value` over the recipe's settings.
        work: folder of the tokenizer and of the run.
    """
    from hymba_tune.model import load_model

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(work / "tokenizer")
    config = tiny_config(len(tokenizer))
    settings = [
        f"model.config={json.dumps({key: getattr(config, key) for key in CONFIG})}",
        f"model.tokenizer={json.dumps(str((work / 'tokenizer').absolute()))}",
        f"output.dir={json.dumps(str((work / 'run').absolute()))}",
    ]
    run = run_stage(load_recipe(RECIPE, [*settings, *overrides]), "rerun")
    load_model(run.model).bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hymba_tune.make_tiny", description="Make the embedded model anew.")
    parser.add_argument("--out", type=Path, default=tiny_path(), help="folder to write to (the shipped one)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings over the recipe's: data.seed=1")
    arguments = parser.parse_args()
    make_base(arguments.out, arguments.overrides)


if __name__ == "__main__":
    main()

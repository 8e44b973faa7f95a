"""Which keys a recipe's `trainer` section may hold: TRL's own, less those that hymba-tune sets itself.

`trainer_keys.json` lists the fields of TRL's SFTConfig and DPOConfig; a test keeps it equal to the installed classes,
and `python tests/trl_fields.py` makes it anew. So a wrong key is refused in milliseconds, without importing TRL.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

_TYPES: dict[str, type | tuple[type, ...]] = {
    "bool": bool,
    "dict": dict,
    "float": (int, float),
    "int": int,
    "list": list,
    "null": type(None),
    "str": str,
}

_ROWS = "rows and loss masks are made before training; see the `data` section"
_LAUNCH = "set launch.config"
_MODEL = "set the `model` section"
_DTYPE = "set model.dtype"
_RESUME = "run the same command again to resume"

RESERVED: dict[str, str] = {
    "accelerator_config": _LAUNCH,
    "assistant_only_loss": _ROWS,
    "auto_find_batch_size": "it would change the global batch; set per_device_train_batch_size",
    "bf16": _DTYPE,
    "bf16_full_eval": _DTYPE,
    "chat_template_path": _ROWS,
    "completion_only_loss": _ROWS,
    "data_seed": "set data.seed",
    "dataset_kwargs": _ROWS,
    "dataset_num_proc": _ROWS,
    "dataset_text_field": _ROWS,
    "ddp_backend": _LAUNCH,
    "deepspeed": _LAUNCH,
    "disable_tqdm": "the progress bar is the project's own",
    "do_eval": "set eval_strategy, or eval.after for benchmarks",
    "do_predict": "set eval.after",
    "do_train": "training is what a stage does",
    "eos_token": _ROWS,
    "eval_packing": "set data.packing",
    "fp16": "float16 overflows in the SSM state; set model.dtype",
    "fp16_full_eval": _DTYPE,
    "fsdp": _LAUNCH,
    "fsdp_config": _LAUNCH,
    "gradient_accumulation_steps": "it follows from global_batch; set global_batch",
    "hub_token": "a recipe is no place for a secret; log in with `hf auth login`",
    "ignore_data_skip": _RESUME,
    "label_names": _ROWS,
    "local_rank": _LAUNCH,
    "max_length": "set data.max_length",
    "model_init_kwargs": _MODEL,
    "output_dir": "set output.dir",
    "packing": "set data.packing",
    "packing_strategy": "set data.packing",
    "pad_to_multiple_of": _ROWS,
    "pad_token": _ROWS,
    "padding_free": "set data.packing",
    "parallelism_config": _LAUNCH,
    "push_to_hub": "the run directory holds the finished model; push that",
    "remove_unused_columns": _ROWS,
    "resume_from_checkpoint": _RESUME,
    "router_aux_loss_coef": "Hymba has one expert",
    "trust_remote_code": "the model is part of this package",
    "truncation_mode": "set data.too_long",
    "use_cache": "training keeps no cache",
    "use_cpu": "the device follows from the machine and launch.config",
    "use_liger_kernel": "its kernels do not know Hymba",
}

RENAMED: dict[str, str] = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""transformers' old names, which it warns of at every start, and the new ones; a recipe may use either."""

DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
"""DPOConfig.loss_type: one of these or a list of them; the class names them in its documentation only."""


TRACKERS = ("tensorboard", "wandb", "trackio")
"""What trainer.report_to may name: each is a package of that name."""


@cache
def fields(method: str) -> dict[str, dict[str, list[str]]]:
    """TRL's fields for a method (pretrain trains with the SFT class): name -> {"types": [...], "choices": [...]}."""
    listed = json.loads(Path(__file__).with_name("trainer_keys.json").read_text(encoding="utf-8"))
    return listed["fields"]["dpo" if method == "dpo" else "sft"]


def problem(method: str, key: str, value: Any) -> str | None:
    """What is wrong with one key of the trainer section, and the remedy; None if nothing is."""
    if key in RESERVED:
        return f"set by hymba-tune itself: {RESERVED[key]}"
    known = fields(method)
    if key not in known:
        allowed = [name for name in known if name not in RESERVED]
        return unknown_key(
            key, [*allowed, "global_batch"], f"a field of TRL's {'DPO' if method == 'dpo' else 'SFT'}Config"
        )
    if key == "report_to":
        return _tracker_problem(value)
    if method == "dpo" and key == "loss_type":
        unknown = [name for name in (value if isinstance(value, list) else [value]) if name not in DPO_LOSSES]
        return f"{unknown[0]!r} is no loss; {_nearest(str(unknown[0]), list(DPO_LOSSES))}" if unknown else None
    return _wrong_value(value, known[key].get("types", []), known[key].get("choices", []))


def _tracker_problem(value: Any) -> str | None:
    """What is wrong with report_to: an unknown tracker, or one whose package is not installed here."""
    for name in value if isinstance(value, list) else [value]:
        if name == "none":
            continue
        if name not in TRACKERS:
            return f"{name!r} is not known; use none, {', '.join(TRACKERS)}"
        if importlib.util.find_spec(name) is None:
            return f"{name}: the package is not installed; pip install {name}, or set it to none"
    return None


def unknown_key(key: str, known: list[str], otherwise: str = "") -> str:
    """`unknown key; did you mean learning_rate?`, or what there is if nothing is near."""
    return f"unknown key; {_nearest(key, known, otherwise)}"


def _nearest(word: str, known: list[str], otherwise: str = "") -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"use {otherwise or 'one of ' + ', '.join(known)}"


def _wrong_value(value: Any, types: list[str], choices: list[str]) -> str | None:
    if isinstance(value, str) and choices:
        return None if value in choices else f"{value!r} is not known; {_nearest(value, choices)}"
    if any(_is(value, name) for name in types):
        return None
    if isinstance(value, bool) and choices:  # YAML reads a bare `no` as false
        return f"{str(value).lower()} is not one of {', '.join(choices)}; a word like no is written in quotes"
    return f"{value!r} must be {' or '.join([*types, *(['one of ' + ', '.join(choices)] if choices else [])])}"


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):  # bool is a subclass of int in Python, and no number in a recipe
        return name == "bool"
    return isinstance(value, _TYPES[name])

"""Weights for others: adapters folded in, and checkpoints ready for from_pretrained, on disk or on the hub.

merge   an adapter, or a stack of them, in the order they were trained in -> a float32 checkpoint
export  any weights -> official names, tokenizer, chat template, generation settings, model card
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from hymba_tune.data.chat import load_tokenizer
from hymba_tune.errors import UserError
from hymba_tune.hub import upload
from hymba_tune.paths import is_hub_id
from hymba_tune.report.card import PLACE, lineage, model_card
from hymba_tune.weights import Weights, find_weights, load_weights, whole_folder

Dtype = Literal["float32", "bfloat16"]


def merge(name: str, out: Path, base: str | None = None) -> Weights:
    """Fold the adapters called `name` into their base and write the checkpoint; float32, so that nothing is lost.

    Args:
        base: the weights under the lowest adapter, where they have moved since it was trained.

    Returns:
        The base and the adapters, in the order they were folded in.

    Raises:
        UserError: there is no adapter, its base is not there, or `out` exists.
    """
    weights = find_weights(name)
    if not weights.adapters:
        raise UserError(f"{name}: has no adapter to fold in; `hymba-tune export` writes a plain checkpoint")
    if base is not None:
        below = find_weights(base)
        weights = Weights(below.base, (*below.adapters, *weights.adapters))
    write_checkpoint(weights, out, "float32")
    return weights


def export(name: str, out: Path, dtype: Dtype = "bfloat16", repository: str | None = None) -> Weights:
    """Write the weights called `name` for others, adapters folded in.

    Args:
        dtype: of the weights on disk; the scan's decay rates and skip stay in float32, as from_pretrained keeps them.
        repository: owner/name on the hub that the folder is uploaded to.

    Raises:
        UserError: the weights can't be used, `out` exists, or the upload failed (then the folder is there).
    """
    weights = find_weights(name)
    write_checkpoint(weights, out, dtype, repository or PLACE)
    if repository is not None:
        upload(out, repository)
    return weights


def write_checkpoint(weights: Weights, out: Path, dtype: Dtype, place: str = PLACE) -> None:
    """The whole folder or nothing: config, weights, tokenizer, chat template, generation settings, model card."""
    if out.exists():
        raise UserError(f"{out}: is there already; name another folder, or delete it")
    if not (Path(weights.base).is_dir() or is_hub_id(weights.base)):
        raise UserError(
            f"{weights.source}: its base {weights.base} is not there; merge it with --base and the place of the base"
        )
    tokenizer = load_tokenizer(weights.tokenizer)
    model = narrowed(load_weights(weights), getattr(torch, dtype))
    model.generation_config = _generation_config(model.generation_config, tokenizer)
    card = model_card(lineage(weights.source), "model", place, weights.base, dtype)
    with whole_folder(out) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        (draft / "README.md").write_text(card, encoding="utf-8")


def narrowed(model: Any, dtype: torch.dtype) -> Any:
    """The model with its parameters in `dtype`, but for those that from_pretrained would keep in float32."""
    kept = set(model._keep_in_fp32_modules_strict)
    for name, parameter in model.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


def _generation_config(saved: GenerationConfig, tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """The checkpoint's own settings; turns end where our chat template ends them, and the cache is used."""
    settings = {key: value for key, value in saved.to_diff_dict().items() if not key.startswith("_")}
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return GenerationConfig(**{**settings, **ids, "use_cache": True})

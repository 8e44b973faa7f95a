"""Native Hymba. Importing this registers `hymba` with transformers' Auto classes, so no remote code is ever needed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from hymba_tune.errors import UserError
from hymba_tune.model.cache import HymbaCache
from hymba_tune.model.config import HymbaConfig
from hymba_tune.model.modeling import HymbaForCausalLM, HymbaModel

__all__ = ["HymbaCache", "HymbaConfig", "HymbaForCausalLM", "HymbaModel", "load_model"]

AutoConfig.register("hymba", HymbaConfig)
AutoModelForCausalLM.register(HymbaConfig, HymbaForCausalLM)


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    changes: Mapping[str, Any] | None = None,
) -> HymbaForCausalLM:
    """A Hymba checkpoint from a folder or a hub id: safetensors only, no remote code.

    Args:
        changes: keys of the configuration that are to differ from the checkpoint's (another RoPE, a longer context).

    Raises:
        UserError: nothing usable there, another model, or weights that do not fit the configuration.
    """
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    try:
        config = _changed(AutoConfig.from_pretrained(str(path)), changes) if changes else None
        model, loaded = from_pretrained(
            str(path),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"model {path}: {' '.join(str(error).split())}; give a Hymba folder or hub id") from error
    if not isinstance(model, HymbaForCausalLM):
        raise UserError(f"model {path}: a {type(model).__name__}, not a Hymba; give a Hymba folder or hub id")
    for what in ("missing", "unexpected", "mismatched"):
        if names := sorted(str(name) for name in loaded[f"{what}_keys"]):
            raise UserError(
                f"model {path}: {len(names)} {what} weights, the first is {names[0]}; "
                "give the config.json that belongs to these weights"
            )
    # The published generation_config switches the cache off, because it was wrong there.
    model.generation_config.use_cache = True
    return model.to(device)  # type: ignore[arg-type]


def _changed(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A configuration made anew, and so checked anew, with some keys changed."""
    return type(config)(**{**config.to_dict(), **changes})

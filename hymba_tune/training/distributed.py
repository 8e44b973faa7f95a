"""What training in several processes asks for: DeepSpeed's settings, whole weights out of pieces, sums over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_first_process() -> bool:
    """Whether this process is the one that writes: rank 0, or the only one."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def processes() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def summed(*counts: int, device: torch.device | str) -> list[int]:
    """Each count added up over all processes."""
    if processes() == 1:
        return list(counts)
    total = torch.tensor(counts, dtype=torch.int64, device=device)
    torch.distributed.all_reduce(total)
    return [int(count) for count in total]


def uses_deepspeed(arguments: Any) -> bool:
    """Whether accelerate was started with a DeepSpeed configuration; `arguments` are TrainingArguments."""
    return arguments.deepspeed_plugin is not None


def set_up_deepspeed(arguments: Any, bfloat16: bool) -> None:
    """Complete the configuration that accelerate made from the topology file with what the recipe says.

    DeepSpeed's own bf16 mode casts every parameter, the decay rates too. Its torch_autocast mode keeps float32
    parameters and lets autocast choose a dtype an operation, as without DeepSpeed; with an empty list of
    lower_precision_safe_modules gradients and gathered weights are sent in float32 as well.
    """
    if not uses_deepspeed(arguments):
        return
    config = arguments.deepspeed_plugin.deepspeed_config
    config["gradient_clipping"] = arguments.max_grad_norm
    config["gradient_accumulation_steps"] = arguments.gradient_accumulation_steps
    if bfloat16:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


def whole_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """All weights by name, on the CPU of the first process, where each process holds a piece of them; else None.

    Every process must call it. The others get an empty dictionary.
    """
    parameters = dict(model.named_parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
        return _gathered(model)
    if any(isinstance(parameter, torch.distributed.tensor.DTensor) for parameter in parameters.values()):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return dict(state)
    return None


def _gathered(model: nn.Module) -> dict[str, Tensor]:
    """ZeRO-3's pieces put together, one parameter at a time; of tied weights the first name."""
    import deepspeed

    whole: dict[str, Tensor] = {}
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        with deepspeed.zero.GatheredParameters([value] if hasattr(value, "ds_id") else []):
            if is_first_process():
                whole[name] = value.detach().cpu().clone()
    return whole

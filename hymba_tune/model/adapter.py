"""DoRA and LoRA adapters on Hymba: attach, audit, merge. The only place that imports peft.

Fused Mamba kernels elsewhere read `out_proj.weight` and friends directly, so that adapters on them silently do nothing.
Here every projection is called as a module, and the audit proves it: before training each target must have matched in
every layer, and after the first backward each adapted module must have received a gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from hymba_tune.errors import UserError
from hymba_tune.model.config import HymbaConfig
from hymba_tune.model.modeling import HymbaForCausalLM

DEFAULT_TARGETS = ("in_proj", "out_proj", "x_proj.0", "dt_proj.0", "gate_proj", "up_proj", "down_proj")
_SSM_TARGETS = ("x_proj.0", "dt_proj.0")


def attach_adapter(
    model: HymbaForCausalLM,
    kind: str = "dora",
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    targets: Sequence[str] = DEFAULT_TARGETS,
    base: str | None = None,
) -> PeftModel:
    """The model with a fresh adapter on `targets` of every layer; only the adapter is trained.

    Args:
        kind: "dora" (weight-decomposed, arXiv 2402.09353) or "lora".
        base: what the saved adapter names as the weights it belongs to; default: where the model was loaded from.

    Raises:
        UserError: a target matches nothing, or not in every layer, or can't be adapted.
    """
    _check_targets(model, targets)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        use_dora=kind == "dora",
        task_type="CAUSAL_LM",
    )
    with _old_names():
        adapted = get_peft_model(model, config)
    _check_attached(adapted, model.config, targets)
    if base is not None:
        adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def load_adapter(model: HymbaForCausalLM, path: str | Path, trainable: bool = False) -> PeftModel:
    """The model with the adapter saved at `path` (safetensors).

    Raises:
        UserError: there is no adapter at `path`, or it belongs to another model.
    """
    try:
        with _old_names():
            return PeftModel.from_pretrained(model, str(path), is_trainable=trainable, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"adapter {path}: {reason}; give a folder that an adapter run of this base wrote") from error


@contextmanager
def _old_names() -> Iterator[None]:
    """peft asks transformers by an old name; its warning is nothing that a user could do anything about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def merge_adapter(model: PeftModel) -> HymbaForCausalLM:
    """Plain trainable weights with the adapter folded in; the adapter is gone from the returned model."""
    merged = model.merge_and_unload(safe_merge=True)
    assert isinstance(merged, HymbaForCausalLM)
    return merged.requires_grad_(True)


class GradientAudit:
    """Watches from before the first backward that every adapted module gets a gradient that is not zero.

    LoRA's B starts at zero and gets a gradient at once, A only from the second step on, so one of them is enough. It
    looks at gradients when they are made: DeepSpeed takes them out of `.grad` at once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.silent = set(_adapted(model))
        self._hooks = [
            parameter.register_hook(lambda gradient, name=name: self._heard(name, gradient))
            for name, module in _adapted(model).items()
            for parameter in module.parameters()
            if parameter.requires_grad
        ]

    def _heard(self, name: str, gradient: Tensor) -> None:
        if name in self.silent and bool(gradient.any()):
            self.silent.discard(name)

    def finish(self) -> None:
        """Stop watching.

        Raises:
            UserError: naming the modules that received nothing.
        """
        for hook in self._hooks:
            hook.remove()
        if self.silent:
            raise UserError(
                f"adapter.targets: no gradient reached {_some(sorted(self.silent))}; the adapter there would never "
                "train: remove the target, or check that the data has supervised tokens"
            )


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if issubclass(type(module), LoraLayer)}


def _check_targets(model: HymbaForCausalLM, targets: Sequence[str]) -> None:
    if not targets:
        raise UserError(f"adapter.targets: empty; name modules, for instance {', '.join(DEFAULT_TARGETS)}")
    for target in targets:
        found = [module for name, module in model.named_modules() if name.endswith("." + target)]
        if not found:
            raise UserError(f"adapter.targets: {target!r} matches no module; use some of {', '.join(DEFAULT_TARGETS)}")
        if not all(isinstance(module, nn.Linear) for module in found):
            kind = type(found[0]).__name__
            raise UserError(
                f"adapter.targets: {target!r} is a {kind}, which can't be adapted; use some of "
                f"{', '.join(DEFAULT_TARGETS)}"
            )
        if target in ("lm_head", "embed_tokens"):
            raise UserError(f"adapter.targets: {target!r} is tied to the embedding and can't be adapted; leave it out")


def _check_attached(model: nn.Module, config: HymbaConfig, targets: Sequence[str]) -> None:
    adapted = _adapted(model)
    for target in targets:
        layers = [i for i in range(config.num_hidden_layers) if target not in _SSM_TARGETS or config.has_ssm(i)]
        missing = [i for i in layers if not any(f".layers.{i}." in n and n.endswith("." + target) for n in adapted)]
        if missing:
            raise UserError(f"adapter.targets: {target!r} has no adapter in layers {_some(missing)}; report this model")


def _some(items: Sequence[object]) -> str:
    shown = ", ".join(str(item) for item in items[:3])
    return shown if len(items) <= 3 else f"{shown} and {len(items) - 3} more"

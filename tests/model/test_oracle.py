"""The official model's outputs on two tiny random models: every array of them, and every gradient.

What they leave out is the official *cached* decoding, whose window is one token shorter than the one it was trained
with. Ours has one window, so that cached generation equals the official generation without a cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hymba_tune.model import HymbaCache, HymbaForCausalLM, load_model, modeling
from hymba_tune.model.norm import RMSNorm, mean_of_norms
from tests.model.models import generate

# The official code itself moves by 4.6e-5 (logits, states) and 1.4e-5 of the largest element (gradients) between
# float32 and float64.
LOGITS: dict[str, Any] = {"rtol": 0.0, "atol": 3e-4}
GRADIENT_OF_LARGEST = 1e-4
LOSS: dict[str, Any] = {"rtol": 0.0, "atol": 2e-6}
LENGTHS = (5, 16, 17, 40, 100)
PROMPTS = ("gen30", "genshort")


class Oracle:
    """One folder of official outputs, and our model with its weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model: HymbaForCausalLM = load_model(folder).eval()
        self._arrays = load_file(folder / "outputs.safetensors")
        self._passed: dict[Callable[[Oracle], set[str]], set[str]] = {}

    def passes(self, check: Callable[[Oracle], set[str]]) -> set[str]:
        """Run a check, once; returns the names of the arrays that it compared or used."""
        if check not in self._passed:
            self._passed[check] = check(self)
        return self._passed[check]

    def array(self, name: str) -> Tensor:
        return self._arrays[name]

    def names(self) -> set[str]:
        return set(self._arrays)

    @cached_property
    def seen_at_length_17(self) -> dict[str, list[Tensor]]:
        """Inputs and outputs of modules, meta positions included, by kind and layer, in one forward of 17 tokens."""
        seen: dict[str, list[Tensor]] = {"layer_in": [], "layer_out": [], "mixer_out": [], "final": []}
        hooks = [self._watch_output(self.model.model.final_layernorm, seen["final"])]
        for layer in self.model.model.layers:
            hooks.append(layer.register_forward_pre_hook(lambda module, args: seen["layer_in"].append(args[0])))
            hooks.append(self._watch_output(layer, seen["layer_out"]))
            hooks.append(self._watch_output(layer.mamba, seen["mixer_out"]))
        with torch.no_grad():
            self.model(self.array("ids_len17"))
        for hook in hooks:
            hook.remove()
        return seen

    @cached_property
    def branches_at_length_17(self) -> list[tuple[Tensor, Tensor]]:
        """Of each layer what attention and SSM heads give to the mean of their norms, in one forward of 17 tokens."""
        seen: list[tuple[Tensor, Tensor]] = []

        def watched(norm_a: RMSNorm, a: Tensor, norm_b: RMSNorm, b: Tensor) -> Tensor:
            seen.append((a, b))
            return mean_of_norms(norm_a, a, norm_b, b)

        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(modeling, "mean_of_norms", watched)
            self.model(self.array("ids_len17"))
        return seen

    @staticmethod
    def _watch_output(module: torch.nn.Module, into: list[Tensor]) -> torch.utils.hooks.RemovableHandle:
        def take(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            into.append(output if isinstance(output, Tensor) else output[0])

        return module.register_forward_hook(take)


@pytest.fixture(scope="module", params=["A", "B"])
def oracle(request: pytest.FixtureRequest, data_dir: Path) -> Oracle:
    return Oracle(data_dir / "oracle" / request.param)


def check_logits(oracle: Oracle) -> set[str]:
    names = {f"ids_len{n}": f"logits_len{n}" for n in LENGTHS} | {"ids_batch2": "logits_batch2"}
    for ids, logits in names.items():
        with torch.no_grad():
            torch.testing.assert_close(oracle.model(oracle.array(ids)).logits, oracle.array(logits), **LOGITS)
    return {*names, *names.values()}


def check_hidden_states(oracle: Oracle) -> set[str]:
    seen = oracle.seen_at_length_17
    states = torch.stack([*seen["layer_in"], *seen["final"]])
    torch.testing.assert_close(states, oracle.array("hidden_len17"), **LOGITS)
    torch.testing.assert_close(seen["layer_out"][-1], oracle.array("hidden_len17_last_layer_raw"), **LOGITS)
    torch.testing.assert_close(torch.stack(seen["mixer_out"]), oracle.array("mixer_out_len17"), **LOGITS)
    return {"hidden_len17", "hidden_len17_last_layer_raw", "mixer_out_len17"}


def check_hidden_states_that_are_returned(oracle: Oracle) -> set[str]:
    with torch.no_grad():
        outputs = oracle.model(oracle.array("ids_len17"), output_hidden_states=True)
    meta = oracle.model.config.num_memory_tokens
    returned = torch.cat(outputs.hidden_states)
    torch.testing.assert_close(returned, oracle.array("hidden_len17")[:, meta:], **LOGITS)
    return {"hidden_len17"}


def check_branches(oracle: Oracle) -> set[str]:
    checked = set()
    for layer in range(3):
        for branch, found in zip(("attn", "ssm"), oracle.branches_at_length_17[layer], strict=True):
            name = f"layer{layer}_{branch}_branch_len17"
            torch.testing.assert_close(found, oracle.array(name), **LOGITS)
            checked.add(name)
    return checked


def check_prefill_cache(oracle: Oracle) -> set[str]:
    """K/V as (heads, meta tokens + positions, features); a windowed layer keeps the last W positions of them."""
    cache = HymbaCache(oracle.model.config)
    with torch.no_grad():
        oracle.model(oracle.array("gen30_prompt"), past_key_values=cache)
    layer, window = cache.layers[1], oracle.model.config.sliding_window
    assert layer.conv is not None
    assert layer.ssm is not None
    torch.testing.assert_close(layer.conv[0], oracle.array("prefill30_conv_state_layer1"), **LOGITS)
    torch.testing.assert_close(layer.ssm[0], oracle.array("prefill30_ssm_state_layer1"), **LOGITS)
    ring = torch.arange(30 - window, 30) % window
    for name, meta, kept in (("key", layer.meta_k, layer.k), ("value", layer.meta_v, layer.v)):
        assert meta is not None
        assert kept is not None
        official = oracle.array(f"prefill30_{name}_layer1")
        torch.testing.assert_close(meta.transpose(0, 1), official[:, : -30 or None], **LOGITS)
        torch.testing.assert_close(kept[0, :, ring], official[:, -window:], **LOGITS)
    return {f"prefill30_{what}_layer1" for what in ("conv_state", "ssm_state", "key", "value")}


def check_generation(oracle: Oracle) -> set[str]:
    """Greedy tokens and the logits of each step, with our cache and without, are the official ones without a cache."""
    checked = set()
    for prompt, use_cache in (("gen30", True), ("genshort", True), ("genshort", False)):
        tokens, logits = (oracle.array(f"{prompt}_official_nocache_{what}") for what in ("tokens", "logits"))
        checked |= {f"{prompt}_prompt", f"{prompt}_official_nocache_tokens", f"{prompt}_official_nocache_logits"}
        ours = generate(
            oracle.model,
            oracle.array(f"{prompt}_prompt"),
            max_new_tokens=len(logits),
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert torch.equal(ours.sequences[:, -len(logits) :], tokens)
        torch.testing.assert_close(torch.cat(ours.logits), logits, **LOGITS)
    return checked


def check_forward_over_generated_tokens(oracle: Oracle) -> set[str]:
    names = ["gen30_prompt", "gen30_official_nocache_tokens", "gen30_official_nocache_logits"]
    prompt, tokens, logits = map(oracle.array, names)
    with torch.no_grad():
        ours = oracle.model(torch.cat([prompt, tokens], dim=1)).logits[0, -len(logits) - 1 : -1]
    torch.testing.assert_close(ours, logits, **LOGITS)
    return set(names)


def check_same_tokens(oracle: Oracle) -> set[str]:
    """The official no-cache logits over the tokens that its cached run chose; row s predicts new token s."""
    checked = set()
    for prompt in PROMPTS:
        ids = torch.cat([oracle.array(f"{prompt}_prompt"), oracle.array(f"{prompt}_official_cached_tokens")], dim=1)
        expected = oracle.array(f"{prompt}_nocache_logits_same_tokens")
        with torch.no_grad():
            logits = oracle.model(ids).logits[0, -len(expected) - 1 : -1]
        torch.testing.assert_close(logits, expected, **LOGITS)
        checked |= {f"{prompt}_nocache_logits_same_tokens", f"{prompt}_prompt"}
    return checked


def check_loss(oracle: Oracle) -> set[str]:
    ids = oracle.array("grad_ids")
    loss = oracle.model(ids, labels=ids).loss
    torch.testing.assert_close(loss[None], oracle.array("loss"), **LOSS)
    return {"grad_ids", "loss"}


CHECKS: list[Callable[[Oracle], set[str]]] = [
    check_logits,
    check_hidden_states,
    check_hidden_states_that_are_returned,
    check_branches,
    check_prefill_cache,
    check_generation,
    check_forward_over_generated_tokens,
    check_same_tokens,
    check_loss,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_our_arrays_equal_the_official_ones(oracle: Oracle, check: Callable[[Oracle], set[str]]) -> None:
    assert oracle.passes(check) <= oracle.names()


def test_every_official_array_is_checked_but_the_cached_generations(oracle: Oracle) -> None:
    checked = set().union(*(oracle.passes(check) for check in CHECKS))
    left = {f"{prompt}_official_cached_{what}" for prompt in PROMPTS for what in ("tokens", "logits")}
    assert oracle.names() - checked == left


def test_the_official_cached_generation_differs_from_ours_as_documented(oracle: Oracle) -> None:
    """It is the official no-cache one until a token falls out of the shorter window, and then another one."""
    window = oracle.model.config.sliding_window
    for prompt in PROMPTS:
        cached = oracle.array(f"{prompt}_official_cached_logits")
        ours = oracle.array(f"{prompt}_nocache_logits_same_tokens")
        crossed = max(1, window + 1 - oracle.array(f"{prompt}_prompt").shape[1])
        torch.testing.assert_close(cached[:crossed], ours[:crossed], **LOGITS)
        assert (cached[crossed] - ours[crossed]).abs().max() > 100 * LOGITS["atol"]


def official_gradients(oracle: Oracle) -> dict[str, Tensor]:
    """Our gradients under the official file's names: whole parameters, and rows of two projections."""
    ids = oracle.array("grad_ids")
    oracle.model.zero_grad()
    oracle.model(ids, labels=ids).loss.backward()
    ours = {name: p.grad for name, p in oracle.model.named_parameters() if p.grad is not None}
    producer, consumer = (oracle.model.model.layers[i].mamba for i in (1, 2))
    queries, keys, values = producer.sizes[:3]
    rows = {
        "grad_kv_rows.model.layers.1.mamba.in_proj.weight": producer.in_proj.weight.grad[
            queries : queries + keys + values
        ],
        "grad_q_rows.model.layers.2.mamba.in_proj.weight": consumer.in_proj.weight.grad[: consumer.sizes[0]],
    }
    return {f"grad.{name}": gradient for name, gradient in ours.items()} | rows


def test_every_official_gradient_equals_ours(oracle: Oracle) -> None:
    ours = official_gradients(oracle)
    for name, official in load_file(oracle.folder / "grads.safetensors").items():
        worst = (ours[name] - official).abs().max() / official.abs().max()
        assert worst < GRADIENT_OF_LARGEST, f"{name}: {worst:.1e} of the largest element"


def test_the_norm_of_every_parameters_gradient_equals_the_official_one(oracle: Oracle) -> None:
    ours = official_gradients(oracle)
    for norms in json.loads((oracle.folder / "grad_norms.json").read_text()).values():
        assert {name.removeprefix("grad.") for name in ours if name.startswith("grad.")} == set(norms)
        for name, norm in norms.items():
            assert ours[f"grad.{name}"].norm().item() == pytest.approx(norm, rel=GRADIENT_OF_LARGEST), name

"""ZeRO's states: the arithmetic of each stage, and DeepSpeed's own estimator where it has one."""

import pytest
import torch

from hymba_tune.geometry import PUBLISHED, Geometry, parameters
from hymba_tune.zero import States, largest_layer, zero_states


def on_gpu(states: States) -> int:
    return states.weights + states.gradients + states.optimizer


def test_the_stages_share_what_they_say():
    states = zero_states(total=1000, trained=1000, largest=100, processes=4)
    assert {name: (on_gpu(part), part.host) for name, part in states.items()} == {
        "ZeRO-0 (DDP)": (20_000, 0),
        "ZeRO-1": (8_000, 0),
        "ZeRO-2": (6_500, 0),
        "ZeRO-3": (4_900, 0),
        "ZeRO-3, offload": (400, 4_500),
    }


def test_frozen_weights_have_no_gradients_and_no_moments():
    states = zero_states(total=1000, trained=10, largest=100, processes=1)
    assert states["ZeRO-2"] == States(2000, 60, 120)


def test_the_largest_layer_is_that_of_the_model():
    from hymba_tune.model import HymbaConfig, HymbaForCausalLM

    config = PUBLISHED["nvidia/Hymba-1.5B-Base"]
    with torch.device("meta"):
        model = HymbaForCausalLM(HymbaConfig(**config))
    counts = [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    assert largest_layer(Geometry.of(config)) == max(counts)


@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2, 8, 64])
def test_weights_gradients_and_optimizer_are_what_deepspeed_estimates(processes):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    geometry = Geometry.of(PUBLISHED["nvidia/Hymba-1.5B-Base"])
    total, largest = sum(parameters(geometry).values()), largest_layer(geometry)
    ours = zero_states(total, total, largest, processes)
    _, second = estimate_zero2_model_states_mem_needs(total, processes, 1, cpu_offload=False)
    _, third, _ = estimate_zero3_model_states_mem_needs(
        total, largest, processes, 1, cpu_offload=False, cpu_offload_params=False
    )
    host, offloaded, _ = estimate_zero3_model_states_mem_needs(
        total, largest, processes, 1, cpu_offload=True, cpu_offload_params=True, additional_buffer_factor=1
    )
    rounding = 4  # bytes: each part is a whole number
    assert abs(on_gpu(ours["ZeRO-2"]) - second) <= rounding
    assert abs(on_gpu(ours["ZeRO-3"]) - third) <= rounding
    assert on_gpu(ours["ZeRO-3, offload"]) == offloaded
    assert abs(ours["ZeRO-3, offload"].host * processes - host) <= rounding * processes

"""FlexAttention's masks and values equal the reference; without a GPU on its plain path, which has no backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from hymba_tune.model.ops import flex_attention, reference
from tests.model.ops.test_cpu_attention import boundaries, operands, results

LENGTHS = ([1], [63], [1, 0, 40, 1, 30], [3] * 20)
# The plain path sums in another order.
ATOL = 1e-12


def without_gradient(given: dict[str, Any]) -> dict[str, Any]:
    return {name: None if t is None else t.detach() for name, t in given.items()}


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("window", [None, 0, 3, 200])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}_segments_of_{max(lengths)}")
def test_a_query_sees_what_the_reference_lets_it_see(lengths, window, prefix):
    tokens, ends = sum(lengths), boundaries(lengths)
    visible = flex_attention.visible_tokens(ends, tokens, prefix, window)
    found = create_mask(visible, 1, 1, tokens, prefix + tokens, "cpu")[0, 0]
    assert found[:, :prefix].all()
    assert torch.equal(found[:, prefix:], reference.visible_tokens(ends, tokens, window))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("prefix", [None, 5])
@pytest.mark.parametrize("window", [None, 3])
def test_values_are_the_reference_s(window, prefix):
    lengths = [1, 0, 40, 1, 30]
    given = without_gradient(operands(sum(lengths), prefix))
    ends = boundaries(lengths)
    found = flex_attention.segment_attention(**given, cu_seqlens=ends, window=window)
    expected = reference.segment_attention(**given, cu_seqlens=ends, window=window)
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


def test_no_tokens_give_none():
    given = without_gradient(operands(0, 5))
    assert flex_attention.segment_attention(**given, cu_seqlens=boundaries([0])).shape == (0, 4, 16)


def test_a_forward_needs_two_block_masks_however_many_layers_it_has():
    ends = boundaries([30, 20])
    cpu = torch.device("cpu")
    masks = [flex_attention.block_mask(ends, 50, 4, window, cpu) for window in (None, 8, 8, 8, None, 8)]
    assert len(set(map(id, masks))) == 2
    assert flex_attention.block_mask(boundaries([30, 20]), 50, 4, 8, cpu) is not masks[1], "other documents, other mask"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("window", [None, 100])
def test_on_a_gpu_values_and_gradients_are_the_reference_s(window):
    class OnGpu:
        @staticmethod
        def segment_attention(**named):
            moved: dict[str, Any] = {n: t.cuda() if isinstance(t, torch.Tensor) else t for n, t in named.items()}
            return flex_attention.segment_attention(**moved).cpu()

    lengths = [300, 1, 200]
    given = operands(sum(lengths), 16, torch.float32)
    # TF32 is off by default for FlexAttention's float32 products ("ieee").
    for ours, truth in zip(
        results(OnGpu, given, lengths, window),  # type: ignore[arg-type]
        results(reference, given, lengths, window),
        strict=True,
    ):
        torch.testing.assert_close(ours, truth, atol=2e-4, rtol=0)

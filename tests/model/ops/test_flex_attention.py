"""FlexAttention's masks and values equal the reference; without a GPU on its plain path, which has no backward."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from hymba_tune.model.ops import flex_attention, reference
from tests.model.ops.test_cpu_attention import boundaries, operands, results

LENGTHS = ([1], [63], [1, 0, 40, 1, 30], [3] * 20)
# The plain path sums in another order.
ATOL = 1e-12


def without_gradient(given: dict[str, Any]) -> dict[str, Any]:
    return {name: None if t is None else t.detach() for name, t in given.items()}


def mask_of(lengths: list[int], prefix: int, window: int | None) -> BlockMask:
    tokens = sum(lengths)
    return flex_attention.seen(boundaries(lengths), tokens, prefix, window).block_mask(tokens, prefix + tokens)


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("window", [None, 0, 3, 200])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}_segments_of_{max(lengths)}")
def test_a_query_sees_what_the_reference_lets_it_see(lengths, window, prefix):
    tokens = sum(lengths)
    found = create_mask(mask_of(lengths, prefix, window).mask_mod, 1, 1, tokens, prefix + tokens, "cpu")[0, 0]
    assert found[:, :prefix].all()
    assert torch.equal(found[:, prefix:], reference.visible_tokens(boundaries(lengths), tokens, window))


def random_layout(seed: int) -> tuple[list[int], int, int | None]:
    """Documents, prefix, window; lengths at and around multiples of a block as well as any others."""
    dice = random.Random(seed)
    size = dice.choice([3, 60, 300, 900])
    lengths = [dice.choice([0, 1, 128, 256, dice.randint(1, size)]) for _ in range(dice.randint(1, 12))] + [1]
    return lengths, dice.choice([0, 1, 100, 127, 128, 129, 256, 300]), dice.choice([None, 0, 1, 127, 128, 129, 500])


@pytest.mark.parametrize("seed", range(60))
def test_the_blocks_are_those_of_the_whole_mask(seed):
    """So also the backward's, which go from keys to queries; nothing of torch's own rule is shared with ours."""
    lengths, prefix, window = random_layout(seed)
    tokens = sum(lengths)
    ours = mask_of(lengths, prefix, window)
    theirs = create_block_mask(ours.mask_mod, None, None, tokens, prefix + tokens, "cpu")
    assert ours.shape == theirs.shape
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, wanted = (getattr(mask, f"{kind}_num_blocks") for mask in (ours, theirs))
        indices, wanted_indices = (getattr(mask, f"{kind}_indices") for mask in (ours, theirs))
        assert torch.equal(counts, wanted), kind
        assert torch.equal(indices, wanted_indices), kind
        assert counts.dtype == indices.dtype == torch.int32
        assert indices.is_contiguous(), "what the kernels read, whatever the strides"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("prefix", [None, 5])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [[1, 0, 40, 1, 30], [1, 0, 140, 1, 130]], ids=["dense", "blocks"])
def test_values_are_the_reference_s(lengths, window, prefix):
    given = without_gradient(operands(sum(lengths), prefix))
    ends = boundaries(lengths)
    found = flex_attention.segment_attention(**given, cu_seqlens=ends, window=window)
    expected = reference.segment_attention(**given, cu_seqlens=ends, window=window)
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


def test_no_tokens_give_none():
    given = without_gradient(operands(0, 5))
    assert flex_attention.segment_attention(**given, cu_seqlens=boundaries([0])).shape == (0, 4, 16)


def test_a_forward_derives_its_blocks_twice_however_many_layers_it_has():
    ends = boundaries([30, 20])
    found = [flex_attention.seen(ends, 50, 4, window) for window in (None, 8, 8, 8, None, 8)]
    assert len(set(map(id, found))) == 2
    assert flex_attention.seen(boundaries([30, 20]), 50, 4, 8) is not found[1], "other documents, other blocks"


def test_a_head_that_is_wide_enough_is_not_copied():
    wide = torch.zeros(3, 2, flex_attention.NARROWEST)
    assert flex_attention._wide(wide) is wide
    assert flex_attention._wide(wide[..., :8]).shape == wide.shape


def test_one_graph_serves_every_length_prefix_window_and_layout():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    attend = flex_attention.compiled(counter)
    for lengths, prefix, window in [([300], 128, None), ([20, 500], 128, 64), ([384], 0, 64), ([700, 1], 3, None)]:
        given: dict[str, Tensor] = without_gradient(operands(sum(lengths), prefix, torch.float32))
        ends = boundaries(lengths)
        of = flex_attention.seen(ends, sum(lengths), prefix, window)
        k, v = torch.cat([given["prefix_k"], given["k"]]), torch.cat([given["prefix_v"], given["v"]])
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (given["q"], k, v))
        flex_attention.mark_lengths(q, k, v, of)
        found = attend(q, k, v, of, 8**-0.5).squeeze(0).transpose(0, 1)
        expected = reference.segment_attention(**given, cu_seqlens=ends, window=window)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert counter.frame_count == 1


class OnGpu:
    """The module as `results` wants it: operands go to the GPU, the output comes back."""

    @staticmethod
    def segment_attention(**named: Any) -> Tensor:
        moved: dict[str, Any] = {n: t.cuda() if isinstance(t, Tensor) else t for n, t in named.items()}
        return flex_attention.segment_attention(**moved).cpu()


def assert_as_the_reference(given: dict[str, Any], lengths: list[int], window: int | None, of_largest: float) -> None:
    """Off by at most a part of the largest value; the truth is computed in float64 from the same numbers."""
    truth = {name: None if t is None else t.detach().double().requires_grad_() for name, t in given.items()}
    ours = results(OnGpu, given, lengths, window)  # type: ignore[arg-type]
    for found, expected in zip(ours, results(reference, truth, lengths, window), strict=True):
        atol = of_largest * float(expected.detach().abs().max())
        torch.testing.assert_close(found.double(), expected, atol=atol, rtol=0)


def hymba_operands(tokens: int, prefix: int, dtype: torch.dtype) -> dict[str, Any]:
    """25 query heads on 5 key/value heads, 64 wide, values 128 wide."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = {"q": (tokens, 25, 64), "k": (tokens, 5, 64), "v": (tokens, 5, 128)}
    shapes |= {"prefix_k": (prefix, 5, 64), "prefix_v": (prefix, 5, 128)}
    return {n: torch.randn(s, generator=generator).to(dtype).requires_grad_() for n, s in shapes.items()}


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("window", [None, 100])
def test_on_a_gpu_narrow_heads_give_the_reference_s_values_and_gradients(window):
    lengths = [300, 1, 200]
    # TF32 is off by default for FlexAttention's float32 products ("ieee").
    assert_as_the_reference(operands(sum(lengths), 16, torch.float32), lengths, window, 1e-5)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize(("dtype", "of_largest"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("window", [None, 200])
def test_on_a_gpu_heads_as_hymba_s_give_the_reference_s_values_and_gradients(window, dtype, of_largest):
    """Two rows of tokens after one another: the second has another length and other documents."""
    for lengths in ([300, 1, 211], [1, 0, 640, 130]):
        assert_as_the_reference(hymba_operands(sum(lengths), 128, dtype), lengths, window, of_largest)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_a_short_stream_without_a_prefix_is_the_reference_s(dtype):
    given = hymba_operands(128, 0, dtype) | {"prefix_k": None, "prefix_v": None}
    assert_as_the_reference(given, [128], None, 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.gpu
@on_a_gpu
def test_on_a_gpu_ever_new_lengths_windows_and_prefixes_compile_one_graph(monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("inductor")
    monkeypatch.setattr(flex_attention, "compiled", lambda backend, real=flex_attention.compiled: real(counter))
    for lengths, prefix, window in [([300], 128, None), ([20, 500], 128, 64), ([384], 0, 64), ([700, 1], 3, None)]:
        given = hymba_operands(sum(lengths), prefix, torch.float32)
        assert_as_the_reference(given, lengths, window, 1e-5)
    assert counter.frame_count == 1

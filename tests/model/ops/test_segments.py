"""What is derived from document boundaries is made once for a tensor and goes with it."""

from __future__ import annotations

import gc
import weakref

import torch

from hymba_tune.model.ops import segments
from tests.model.ops.test_cpu_attention import boundaries


def test_tokens_know_their_segment_and_where_it_starts():
    owners = segments.owners(boundaries([2, 0, 3]), 5)
    assert owners.segments.tolist() == [0, 0, 2, 2, 2]
    assert owners.firsts.tolist() == [0, 0, 2, 2, 2]


def test_the_same_tensor_is_asked_once_and_another_one_again():
    ends = boundaries([2, 3])
    assert segments.owners(ends, 5) is segments.owners(ends, 5)
    assert segments.owners(boundaries([2, 3]), 5) is not segments.owners(ends, 5)


def test_boundaries_that_fit_are_taken_as_they_are_and_others_copied_once():
    cpu, ends = torch.device("cpu"), boundaries([2, 3])
    assert segments.boundaries(ends, cpu) is ends
    for awkward in (ends.int(), ends.repeat_interleave(2)[::2]):
        copy = segments.boundaries(awkward, cpu)
        assert torch.equal(copy, ends)
        assert copy.dtype == torch.long
        assert copy.is_contiguous()
        assert segments.boundaries(awkward, cpu) is copy


def test_what_is_derived_goes_with_its_tensor():
    ends = boundaries([2, 3]).int()
    copy = segments.boundaries(ends, torch.device("cpu"))
    gone = [weakref.ref(segments.owners(copy, 5).firsts), weakref.ref(copy)]
    del ends, copy
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_what_evaluation_derived_serves_training():
    with torch.inference_mode():
        ends = boundaries([2, 3])
        segments.owners(ends, 5)
    assert not any(t.is_inference() for t in segments.owners(ends, 5))

"""Batched log-likelihoods are those of a plain forward over each request."""

import random
from typing import Any

import pytest
import torch

from hymba_tune.errors import UserError
from hymba_tune.evaluation.likelihood import loglikelihood_as_finished

# Two float32 orders of summation over 40 positions.
TOLERANCE = 1e-4


@torch.no_grad()
def alone(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    ids = torch.tensor([context + continuation])
    logprobs = torch.log_softmax(model(ids, use_cache=False).logits[0].double(), -1)[len(context) - 1 : -1]
    tokens = torch.tensor(continuation)
    return float(logprobs.gather(1, tokens[:, None]).sum()), bool((logprobs.argmax(-1) == tokens).all())


@pytest.mark.parametrize("model_name", ["tiny_llama", "tiny_hymba"])
def test_likelihoods_equal_a_plain_forward(model_name, request):
    model, rng = request.getfixturevalue(model_name), random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, 300) for _ in range(count)]

    shared = tokens(20)
    requests = [(shared, [choice]) for choice in (70, 71, 72, 73)]
    requests += [(tokens(rng.randint(1, 30)), tokens(rng.randint(1, 6))) for _ in range(12)]
    found = dict(loglikelihood_as_finished(model, requests, batch_tokens=200))
    assert sorted(found) == list(range(len(requests)))
    for index, (context, continuation) in enumerate(requests):
        logprob, greedy = alone(model, context, continuation)
        assert found[index][0] == pytest.approx(logprob, abs=TOLERANCE)
        assert found[index][1] == greedy


@pytest.mark.parametrize("model_name", ["tiny_llama", "tiny_hymba"])
def test_rows_that_begin_alike_share_their_beginning(model_name, request, monkeypatch):
    model, rng = request.getfixturevalue(model_name), random.Random(1)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, 300) for _ in range(count)]

    shots = {subject: tokens(80) for subject in range(2)}
    requests = [
        (shots[i % 2] + question, [10, letter])
        for i, question in enumerate([tokens(rng.randint(1, 12)) for _ in range(9)])
        for letter in (70, 71)
    ]
    requests += [(tokens(5), [3])]
    seen: list[int] = []
    forward = type(model).forward

    def counted(self: Any, input_ids: torch.Tensor, **settings: Any) -> Any:
        seen.append(input_ids.numel())
        return forward(self, input_ids=input_ids, **settings)

    monkeypatch.setattr(type(model), "forward", counted)
    found = dict(loglikelihood_as_finished(model, requests, batch_tokens=300))
    assert sum(seen) < 2 * 80 + 9 * 14 + 40
    monkeypatch.setattr(type(model), "forward", forward)
    for index, (context, continuation) in enumerate(requests):
        logprob, greedy = alone(model, context, continuation)
        assert found[index][0] == pytest.approx(logprob, abs=TOLERANCE)
        assert found[index][1] == greedy


def test_the_greedy_continuation_is_recognised(tiny_llama):
    context = [5, 6, 7]
    best = int(tiny_llama(torch.tensor([context])).logits[0, -1].argmax())
    found = dict(loglikelihood_as_finished(tiny_llama, [(context, [best]), (context, [best + 1])]))
    assert (found[0][1], found[1][1]) == (True, False)


def test_a_long_context_loses_its_left(tiny_llama):
    context = [3 + i % 300 for i in range(100)]
    [(_, cut)] = loglikelihood_as_finished(tiny_llama, [(context, [9])], max_length=20)
    [(_, short)] = loglikelihood_as_finished(tiny_llama, [(context[-20:], [9])], max_length=20)
    assert cut == short


@pytest.mark.parametrize("request_", [([], [3]), ([3], []), ([3], [4] * 21)])
def test_requests_without_a_likelihood_are_refused(tiny_llama, request_):
    with pytest.raises(UserError, match="request 0"):
        list(loglikelihood_as_finished(tiny_llama, [request_], max_length=20))

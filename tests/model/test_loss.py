"""The chunked loss is plain cross-entropy, with its gradients, without the logits of a whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_tune.model.loss import CHUNK, IGNORED, chunked_cross_entropy
from tests.model.models import EXACT, VOCABULARY, gradients, random_ids, random_model, tiny_config


def head_and_hidden(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[torch.nn.Linear, Tensor]:
    torch.manual_seed(0)
    head = torch.nn.Linear(6, VOCABULARY, bias=False, dtype=dtype)
    return head, torch.randn(*shape, 6, dtype=dtype, requires_grad=True)


def some_labels(*shape: int) -> Tensor:
    labels = random_ids(*shape)
    labels[torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.3] = IGNORED
    return labels


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)], ids=["mean", "int", "tensor"])
def test_loss_and_gradients_equal_plain_cross_entropy(length: int, num_items: Tensor | int | None) -> None:
    head, hidden = head_and_hidden(2, length)
    labels = some_labels(2, length)
    labels[0, 0] = 5
    plain = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
    plain = plain / (7 if num_items is not None else (labels != IGNORED).sum())
    ours = chunked_cross_entropy(hidden, head, labels, num_items)
    torch.testing.assert_close(ours, plain, **EXACT)
    wanted = torch.autograd.grad(plain, [hidden, head.weight])
    torch.testing.assert_close(torch.autograd.grad(ours, [hidden, head.weight]), wanted, **EXACT)


def test_no_more_than_a_chunk_is_scored_at_a_time_and_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden = head_and_hidden(1, 5 * CHUNK)
    sizes: list[int] = []

    def counted(x: Tensor, weight: Tensor) -> Tensor:
        sizes.append(len(x))
        return x @ weight.T

    monkeypatch.setattr(F, "linear", counted)
    chunked_cross_entropy(hidden, head, random_ids(1, 5 * CHUNK)).backward()
    assert sizes == [CHUNK] * 5


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)], ids=["mean", "int", "tensor"])
def test_labels_that_score_nothing_give_zero_with_zero_gradients(num_items: Tensor | int | None) -> None:
    head, hidden = head_and_hidden(2, 3)
    loss = chunked_cross_entropy(hidden, head, torch.full((2, 3), IGNORED), num_items)
    assert loss.item() == 0
    loss.backward()
    assert hidden.grad is not None
    assert head.weight.grad is not None
    assert torch.count_nonzero(hidden.grad) == torch.count_nonzero(head.weight.grad) == 0


def test_bfloat16_is_summed_in_float32() -> None:
    head, hidden = head_and_hidden(1, 4 * CHUNK, dtype=torch.bfloat16)
    labels = random_ids(1, 4 * CHUNK)
    loss = chunked_cross_entropy(hidden, head, labels)
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(head(hidden).double().flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_under_autocast_the_head_s_gradient_is_added_up_in_float32() -> None:
    """64 chunks of one token and label: a sum in bfloat16 would stop growing long before, or lose its last bits."""
    head, hidden = head_and_hidden(1, 1, dtype=torch.float32)
    label = random_ids(1, 1)

    def gradient(chunks: int) -> Tensor:
        many, labels = hidden.detach().expand(1, chunks * CHUNK, -1), label.expand(1, chunks * CHUNK)
        with torch.autocast("cpu", torch.bfloat16):
            return torch.autograd.grad(chunked_cross_entropy(many, head, labels, 1), head.weight)[0]

    of_one, of_all = gradient(1), gradient(64)
    assert of_all.dtype == torch.float32
    torch.testing.assert_close(of_all, 64 * of_one, rtol=1e-5, atol=0)


def test_the_models_loss_is_the_mean_over_shifted_labels_and_takes_the_trainers_count() -> None:
    model, ids = random_model(tiny_config()), random_ids(2, 9)
    labels = ids.masked_fill(some_labels(2, 9) == IGNORED, IGNORED)
    outputs = model(ids, labels=labels)
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    torch.testing.assert_close(outputs.loss, F.cross_entropy(logits, targets), **EXACT)
    counted = model(ids, labels=labels, num_items_in_batch=torch.tensor(5)).loss
    torch.testing.assert_close(counted, F.cross_entropy(logits, targets, reduction="sum") / 5, **EXACT)


def test_training_returns_no_logits_and_the_same_loss_and_gradients() -> None:
    model, ids = random_model(tiny_config()), random_ids(2, 9)
    evaluated = model(ids, labels=ids)
    expected = gradients(model, evaluated.loss)
    trained = model.train()(ids, labels=ids)
    assert trained.logits is None
    assert torch.equal(trained.loss, evaluated.loss)
    torch.testing.assert_close(gradients(model, trained.loss), expected, **EXACT)

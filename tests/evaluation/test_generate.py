"""Batched generation gives each prompt the answer it gets alone, and always ends."""

import copy
import random
from typing import Any

import pytest
import torch

from hymba_tune.errors import UserError
from hymba_tune.evaluation.beginning import shared_beginning
from hymba_tune.evaluation.generate import StopStrings, batches_by_budget, generate
from hymba_tune.model.static_cache import StaticDecoder


def random_prompts(vocabulary: int, count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, vocabulary) for _ in range(rng.randint(1, 40))] for _ in range(count)]


@torch.no_grad()
def greedy_alone(model: Any, prompt: list[int], limit: int) -> list[int]:
    """One prompt, no cache, no batch: the definition of a greedy answer."""
    ids = list(prompt)
    while len(ids) - len(prompt) < limit:
        token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == 2:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("model_name", ["tiny_llama", "tiny_hymba"])
def test_a_batch_answers_like_each_prompt_alone(model_name, character_tokenizer, request):
    model = request.getfixturevalue(model_name)
    prompts = random_prompts(len(character_tokenizer), 16)
    limits = [random.Random(i).randint(1, 24) for i in range(16)]
    together = generate(model, character_tokenizer, prompts, max_new_tokens=limits, batch_tokens=500)
    assert len({len(answer.token_ids) for answer in together}) > 5
    for prompt, limit, answer in zip(prompts, limits, together, strict=True):
        assert answer.token_ids == greedy_alone(model, prompt, limit)
        assert (answer.finish_reason == "length") == (len(answer.token_ids) == limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fixed_buffers_give_the_same_answers(tiny_hymba, character_tokenizer, monkeypatch, dtype):
    """As on a GPU, but for the graph: ragged prompts, rows that leave, answers that cross the window."""
    model = copy.deepcopy(tiny_hymba).to(dtype)
    prompts = random_prompts(len(character_tokenizer), 12)
    limits = [random.Random(i).randint(1, 40) for i in range(12)]
    expected = generate(model, character_tokenizer, prompts, max_new_tokens=limits, batch_tokens=500)
    restarts: list[int] = []
    start = StaticDecoder._start

    def counted(self: StaticDecoder, cache: Any) -> None:
        restarts.append(cache.batch_size)
        start(self, cache)

    monkeypatch.setattr(StaticDecoder, "_start", counted)
    monkeypatch.setattr("hymba_tune.evaluation.generate.has_static_cache", lambda model: True)
    assert generate(model, character_tokenizer, prompts, max_new_tokens=limits, batch_tokens=500) == expected
    assert len(restarts) > len(batches_by_budget(prompts, limits, 500)), "no batch was made smaller"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_cuda_graph_gives_the_same_answers(tiny_hymba, character_tokenizer, monkeypatch):
    model = copy.deepcopy(tiny_hymba).to("cuda")
    prompts = random_prompts(len(character_tokenizer), 12)
    answers = generate(model, character_tokenizer, prompts, max_new_tokens=30)
    monkeypatch.setattr("hymba_tune.evaluation.generate.has_static_cache", lambda model: False)
    assert generate(model, character_tokenizer, prompts, max_new_tokens=30) == answers


def test_rows_that_end_early_leave_the_batch_without_moving_the_others(tiny_llama, character_tokenizer):
    prompts = random_prompts(len(character_tokenizer), 8, seed=1)
    full = generate(tiny_llama, character_tokenizer, prompts, max_new_tokens=24)
    stops = sorted({answer.text[5] for answer in full if len(answer.text) > 5})[:3]
    stopped = generate(tiny_llama, character_tokenizer, prompts, max_new_tokens=24, stop=stops)
    assert any(answer.finish_reason == "stop" for answer in stopped)
    for whole, cut in zip(full, stopped, strict=True):
        first = min((at for stop in stops if (at := whole.text.find(stop)) >= 0), default=len(whole.text))
        assert cut.text == whole.text[:first]
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


def test_batches_keep_the_token_budget_and_hold_every_prompt_once():
    prompts = [[3] * n for n in (5, 50, 7, 49, 1, 1, 30)]
    limits = [10, 1, 10, 10, 100, 1, 1]
    batches = batches_by_budget(prompts, limits, 120)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    for batch in batches:
        cost = len(batch) * (max(len(prompts[i]) for i in batch) + max(limits[i] for i in batch))
        assert cost <= 120 or len(batch) == 1


def test_a_prompt_longer_than_the_model_loses_its_left_and_says_so(tiny_llama, character_tokenizer):
    prompt = random_prompts(len(character_tokenizer), 1)[0] * 40
    [answer] = generate(tiny_llama, character_tokenizer, [prompt], max_new_tokens=4, max_length=64)
    assert answer.dropped_prompt_tokens == len(prompt) - 60
    [kept] = generate(tiny_llama, character_tokenizer, [prompt[-60:]], max_new_tokens=4)
    assert kept.token_ids == answer.token_ids


@pytest.mark.parametrize(("limit", "length"), [(0, 64), (64, 64)])
def test_limits_that_cannot_be_met_are_refused(tiny_llama, character_tokenizer, limit, length):
    with pytest.raises(UserError, match="max_new_tokens"):
        generate(tiny_llama, character_tokenizer, [[3, 4]], max_new_tokens=limit, max_length=length)


def test_an_empty_prompt_is_refused(tiny_llama, character_tokenizer):
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        generate(tiny_llama, character_tokenizer, [[3], []], max_new_tokens=2)


def test_progress_counts_to_the_end(tiny_llama, character_tokenizer):
    seen: list[tuple[int, int]] = []

    def note(done: int, total: int) -> None:
        seen.append((done, total))

    prompts = random_prompts(len(character_tokenizer), 5)
    generate(tiny_llama, character_tokenizer, prompts, max_new_tokens=3, progress=note)
    assert seen == [(n, 5) for n in range(1, 6)]


@pytest.mark.parametrize("stop", ["Question:", "</s>", " q", "é!", "a b\n", "\n\n", "\N{GRINNING FACE}"])
def test_a_stop_string_is_found_at_the_token_that_completes_it(character_tokenizer, stop):
    text = f"an ordinary  start é{stop}and more"
    ids = character_tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    stops = StopStrings(character_tokenizer, [stop])
    at = next(n for n in range(1, len(ids) + 1) if stops.found(ids[:n]))
    assert stop in character_tokenizer.decode(ids[:at])
    assert stop not in character_tokenizer.decode(ids[: at - 1])
    assert stops.trim(ids) == character_tokenizer.decode(ids).split(stop)[0]


def test_a_special_token_between_its_letters_does_not_hide_a_stop_string(character_tokenizer):
    q, colon = character_tokenizer.encode("q:", add_special_tokens=False)[-2:]
    assert StopStrings(character_tokenizer, ["q:"]).found([q, 1, 1, 1, 1, 1, colon])


def test_the_real_tokenizer_finds_stop_strings_across_its_merges(data_dir):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(data_dir / "hymba-1.5b")
    cases = {"Question:": "so 5 apples. Question: how", "<|im_end|>": "a<|im_end|>b", "</s>": "x </s> y"}
    for stop, text in cases.items():
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        stops = StopStrings(tokenizer, [stop])
        found = [n for n in range(1, len(ids) + 1) if stops.found(ids[:n])]
        assert found, f"{stop!r} in {text!r}"
        assert stop not in tokenizer.decode(ids[: found[0] - 1])
        assert stops.trim(ids) == text.split(stop)[0]


@pytest.mark.parametrize("fixed_buffers", [False, True], ids=["growing", "fixed buffers"])
@pytest.mark.parametrize("model_name", ["tiny_llama", "tiny_hymba"])
def test_what_all_prompts_begin_with_is_computed_once_and_changes_no_answer(
    model_name, fixed_buffers, character_tokenizer, request, monkeypatch
):
    model = request.getfixturevalue(model_name)
    if fixed_buffers and model_name == "tiny_llama":
        pytest.skip("fixed buffers are Hymba's")
    model = copy.deepcopy(model).double()
    monkeypatch.setattr("hymba_tune.evaluation.generate.has_static_cache", lambda model: fixed_buffers)
    # A prompt that is all beginning but for one token, and rests of many lengths.
    shots, *rests = random_prompts(len(character_tokenizer), 8, seed=3)
    shots = (shots * 70)[:70]
    prompts = [shots + rest for rest in [*rests, [5]]]
    computed: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, args, named: computed.append(_shape(args, named)), with_kwargs=True)
    together = generate(model, character_tokenizer, prompts, max_new_tokens=12)
    assert computed[:2] == [(1, 70), (8, max(map(len, rests)))]
    alone = [generate(model, character_tokenizer, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert together == alone


def _shape(args: tuple[Any, ...], named: dict[str, Any]) -> tuple[int, ...]:
    return tuple((args[0] if args else named["input_ids"]).shape)


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        ([[1] * 80 + [n] for n in range(3)], 80),
        ([[1] * 80, [1] * 90, [1] * 100], 79),
        ([[1] * 80, [1] * 80], 0),
        ([[1] * 63 + [n] * 50 for n in range(9)], 0),
    ],
    ids=["of equal length", "one is all beginning", "too few rows", "too short"],
)
def test_a_beginning_is_shared_where_that_pays_and_leaves_each_prompt_a_token(prompts, shared):
    assert len(shared_beginning(prompts)) == shared


@pytest.mark.parametrize("fixed_buffers", [False, True], ids=["growing", "fixed buffers"])
def test_prompts_read_a_few_at_a_time_get_the_same_answers(fixed_buffers, tiny_hymba, character_tokenizer, monkeypatch):
    """One prompt longer than what is read at a time, and groups whose rows have less padding than the batch."""
    model = copy.deepcopy(tiny_hymba).double()
    monkeypatch.setattr("hymba_tune.evaluation.generate.has_static_cache", lambda model: fixed_buffers)
    prompts = random_prompts(len(character_tokenizer), 14, seed=5)
    expected = generate(model, character_tokenizer, prompts, max_new_tokens=20)
    monkeypatch.setattr("hymba_tune.evaluation.generate.PREFILL_TOKENS_ON_CPU", 39)
    read: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, args, named: read.append(_shape(args, named)), with_kwargs=True)
    assert generate(model, character_tokenizer, prompts, max_new_tokens=20) == expected
    assert len([shape for shape in read if shape[1] > 1]) > 5

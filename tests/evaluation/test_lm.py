"""Our lm-eval model class answers like lm-eval's own Hugging Face backend at batch size 1."""

import pytest

from hymba_tune.errors import UserError
from hymba_tune.evaluation.engine import Engine

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from hymba_tune.evaluation.lm import HymbaLM

# Likelihoods of a batch and of a single row differ by the order of float32 sums.
TOLERANCE = 1e-3


@pytest.fixture
def ours(tiny_llama, character_tokenizer):
    return HymbaLM(Engine(tiny_llama, character_tokenizer))


@pytest.fixture
def theirs(tiny_llama, character_tokenizer):
    return HFLM(pretrained=tiny_llama, tokenizer=character_tokenizer, batch_size=1, add_bos_token=False, device="cpu")


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, 0, ("t", i, 1)) for i, args in enumerate(arguments)]


CHATS = [
    [{"role": "user", "content": f"Question: what is {n} + {n}?\n"}, *extra, {"role": "user", "content": "Again?"}]
    for n in range(4)
    for extra in ([{"role": "assistant", "content": f"#### {2 * n}"}], [{"role": "assistant", "content": "no " * n}])
]


def test_generations_are_the_same(ours, theirs):
    settings = {"until": ["Q", "#"], "do_sample": False, "max_gen_toks": 24}
    texts = [ours.apply_chat_template(chat) for chat in CHATS]
    assert texts == [theirs.apply_chat_template(chat) for chat in CHATS]
    asked = [(text, settings) for text in [*texts, "plain text", "another one"]]
    answers = ours.generate_until(requests("generate_until", asked))
    assert answers == theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert len(set(answers)) > 5


def test_likelihoods_are_the_same(ours, theirs):
    contexts = [*[ours.apply_chat_template(chat) for chat in CHATS], "plain ", ""]
    asked = [(context, choice) for context in contexts for choice in (" A", " B", "no way", "\n")]
    mine = ours.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
    for (logprob, greedy), (expected, expected_greedy) in zip(
        mine, theirs.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True), strict=True
    ):
        assert logprob == pytest.approx(expected, abs=TOLERANCE)
        assert greedy == expected_greedy


def test_rolling_likelihoods_are_the_same(tiny_llama, character_tokenizer):
    ours = HymbaLM(Engine(tiny_llama, character_tokenizer, max_length=16))
    theirs = HFLM(
        pretrained=tiny_llama,
        tokenizer=character_tokenizer,
        batch_size=1,
        add_bos_token=False,
        device="cpu",
        max_length=16,
    )
    asked = requests("loglikelihood_rolling", [("a text of more than sixteen tokens, in windows",), ("short",)])
    mine = ours.loglikelihood_rolling(asked)
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert mine == pytest.approx(expected, abs=TOLERANCE)


def test_a_control_token_typed_by_a_user_stays_text(ours, character_tokenizer):
    chat = [{"role": "user", "content": "the end</s>[assistant]"}]
    ids = ours.tok_encode(ours.apply_chat_template(chat))
    assert character_tokenizer.eos_token_id not in ids
    [(logprob, _)] = ours.loglikelihood(
        requests("loglikelihood", [(ours.apply_chat_template(chat), " A")]), disable_tqdm=True
    )
    assert logprob < 0


def test_sampling_is_refused(ours):
    with pytest.raises(UserError, match="asks for sampling"):
        ours.generate_until(requests("generate_until", [("a", {"do_sample": True, "until": []})]))


@pytest.mark.parametrize(("prompt_tokens", "limit"), [(100, 412), (500, 256), (5000, 256)])
def test_max_length_bounds_prompt_and_answer_but_leaves_room_for_one(ours, prompt_tokens, limit):
    assert ours._limit({"max_length": 8192}, prompt_tokens) == limit

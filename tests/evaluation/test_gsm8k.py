"""GSM8K's prompts and verdicts are lm-eval's and NVlabs', item by item."""

import json
import random
import time
from typing import Any

import pytest

from hymba_tune.data.benchmarks import benchmark_rows
from hymba_tune.evaluation import gsm8k
from hymba_tune.evaluation.engine import Answer, Engine
from hymba_tune.evaluation.harness import read_task

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def filters():
    """The filters of tasks/gsm8k.yaml as lm-eval builds them."""
    from lm_eval.filters import build_filter_ensemble

    def build(entry):
        steps = [[step["function"], {k: v for k, v in step.items() if k != "function"}] for step in entry["filter"]]
        return build_filter_ensemble(entry["name"], steps)

    return {entry["name"]: build(entry) for entry in read_task("gsm8k")["filter_list"]}


def extract(ensemble: Any, response: str) -> str:
    from lm_eval.api.instance import Instance

    instance = Instance("generate_until", {}, (), 0, ("gsm8k", 0, 1), resps=[response])
    ensemble.apply([instance])
    return instance.filtered_resps[ensemble.name]


def test_every_gold_answer_gets_the_official_extraction_and_verdict(data_dir, filters):
    references = benchmark_rows("gsm8k", "test", data_dir)
    gold = data_dir / "scoring_gold" / "gsm8k" / "openai_example_solutions.public.jsonl"
    rows = [json.loads(line) for line in gold.read_text().splitlines()]
    assert len(rows) == 903 * 4 * 2  # documents, systems, forms
    disagreements = []
    for row in rows:
        for filter_name, field in (("strict-match", "strict"), ("flexible-extract", "flexible")):
            extracted = extract(filters[filter_name], row["response"])
            verdict = gsm8k.exact_match(extracted, references[row["doc_id"]]["answer"])
            official = row["strict_match" if field == "strict" else "flexible_extract"]
            if (extracted, verdict) != (row[f"{field}_filtered"], official):
                disagreements.append((row["doc_id"], row["system"], row["variant"], filter_name))
    assert disagreements == []


def test_our_exact_match_is_lm_evals(filters):
    from lm_eval.api.metrics import exact_match_fn

    [metric] = read_task("gsm8k")["metric_list"]
    settings = {k: v for k, v in metric.items() if k not in ("metric", "aggregation", "higher_is_better")}
    rng = random.Random(0)
    pieces = ["18", ",", "$", "#### ", ".", "\n", "-", "a", "A", "é", " "]
    for _ in range(2000):
        one, other = ("".join(rng.choices(pieces, k=rng.randint(0, 6))) for _ in range(2))
        for answer, reference in ((one, other), (one, one), (one, one.replace(",", ""))):
            theirs = exact_match_fn(predictions=[answer], references=[reference], **settings)["exact_match"]
            assert gsm8k.exact_match(answer, reference) == theirs, (answer, reference)


@pytest.mark.parametrize(
    "answer", ["7" * 100_000, "#### " + "1," * 50_000, "<b>" * 33_000, "\x00\x1b[31m" * 20_000, "(" * 100_000]
)
def test_a_very_long_answer_is_judged_at_once(filters, answer):
    start = time.perf_counter()
    for ensemble in filters.values():
        assert gsm8k.exact_match(extract(ensemble, answer), "so\n#### 18") == 0.0
    assert time.perf_counter() - start < 2.0


def test_the_shots_are_those_lm_eval_draws(data_dir, tiny_llama, character_tokenizer, monkeypatch):
    indices = json.loads((data_dir / "scoring_gold" / "gsm8k" / "lm_eval_fewshot_indices_seed1234.json").read_text())
    splits = gsm8k.gsm8k_splits(data_dir)
    seen: list[list[dict[str, str]]] = []
    engine = Engine(tiny_llama, character_tokenizer)

    def render_chat(messages: list[dict[str, str]]) -> tuple[str, list[int]]:
        seen.append(messages)
        return str(messages), [3]

    monkeypatch.setattr(engine, "render_chat", render_chat)
    monkeypatch.setattr(
        engine, "generate", lambda prompts, max_new_tokens, stop: [Answer("", 0, "eos", 0) for _ in prompts]
    )
    gsm8k.run_gsm8k("gsm8k", engine, splits, 200)
    assert len(seen) == 200
    for messages, drawn, row in zip(seen, indices["indices"], splits["test"], strict=False):
        shots = [(f"Question: {splits['train'][i]['question']}\n", splits["train"][i]["answer"]) for i in drawn]
        asked = [(q["content"], a["content"]) for q, a in zip(messages[0:10:2], messages[1:10:2], strict=True)]
        assert asked == shots
        assert messages[10:] == [{"role": "user", "content": f"Question: {row['question']}\n"}]

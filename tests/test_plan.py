"""Plans: what is counted is what the run makes, what is unknown says why, and nothing heavy is loaded."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.planned_memory import CASES, compare
from hymba_tune import plan as planning
from hymba_tune.errors import UserError
from hymba_tune.geometry import Geometry
from hymba_tune.plan import Plan, make_plans, memory_bytes, show
from hymba_tune.recipe import Recipe, load_recipe

CONFIG = "{vocab_size: 97, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 2,"
CONFIG += " num_key_value_heads: 1, v_head_dim: 64}"
RECIPE = """
stage: one
method: sft
model: {from: nvidia/Hymba-1.5B-Base}
data: {mix: mix.yaml, max_length: 8, decontaminate: false}
trainer: {global_batch: 4, num_train_epochs: 2}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe, a mix of ten local conversations and a word-level tokenizer."""
    monkeypatch.chdir(tmp_path)
    Path("one.yaml").write_text(RECIPE)
    Path("mix.yaml").write_text("sources:\n  mine:\n    path: mine.jsonl\n")
    turns = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three four"}]
    Path("mine.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 10)
    return tmp_path


def make_plan(recipe: Recipe) -> Plan:
    return make_plans([recipe])[0]


def printed(plan: Plan) -> str:
    stream = io.StringIO()
    show(plan, Console(file=stream, width=120))
    return stream.getvalue()


def test_the_published_model_is_counted_without_a_hub(folder):
    plan = make_plan(load_recipe("one.yaml"))
    assert plan.parts is not None
    assert sum(plan.parts.values()) == plan.trained == 1_522_797_824
    assert plan.data is None
    assert plan.steps is None
    text = printed(plan)
    assert "1,522,797,824" in text
    assert "not known: the tokenizer is on the hub" in text
    assert "4 = 1 a device x 4 accumulated x 1 process, at most 32 tokens" in text


def test_an_adapter_trains_few_parameters(folder):
    plan = make_plan(load_recipe("one.yaml", ["adapter={type: dora, r: 8}"]))
    assert plan.parts is not None
    assert plan.trained is not None
    assert plan.trained < 0.01 * sum(plan.parts.values())
    assert plan.memory is not None
    assert plan.memory["gradients"] == 4 * plan.trained


def test_an_unknown_hub_model_and_another_stages_model_say_why_they_are_not_counted(folder):
    assert "not known: hub: someone/else, not in the local cache" in printed(
        make_plan(load_recipe("one.yaml", ["model.from=someone/else"]))
    )
    assert "not known: what stage sft1 writes" in printed(make_plan(load_recipe("one.yaml", ["model.from=stage:sft1"])))


def test_a_stage_is_planned_with_what_the_stages_before_it_write(folder):
    first = load_recipe("one.yaml", ["stage=first"])
    second = load_recipe("one.yaml", ["stage=second", "model.from=stage:first", "adapter={type: dora, r: 8}"])
    third = load_recipe("one.yaml", ["stage=third", "model.from=stage:second", "model.handoff=continue"])
    plans = make_plans([first, second, third])
    assert plans[0].parts == plans[1].parts == plans[2].parts
    assert plans[0].trained != plans[1].trained == plans[2].trained
    assert "what stage second writes" in printed(plans[2])
    assert "dora, r 8" in printed(plans[2])


def test_sources_on_the_hub_are_named_and_not_counted(folder):
    Path("mix.yaml").write_text("sources:\n  far:\n    hub: {id: someone/data}\n")
    assert make_plan(load_recipe("one.yaml")).data_note == "on the hub, not counted: far"


def test_a_folder_without_a_hymba_is_refused(folder):
    Path("weights").mkdir()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        make_plan(load_recipe("one.yaml", ["model.from=weights"]))
    Path("weights/config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="model_type is 'llama', not 'hymba'"):
        make_plan(load_recipe("one.yaml", ["model.from=weights"]))


def test_tokens_rows_and_steps_are_those_of_the_run(folder, data_dir):
    from hymba_tune.data.chat import load_tokenizer
    from hymba_tune.data.mix import load_mix, realise_mix
    from hymba_tune.data.packing import build_rows

    tokenizer = data_dir / "hymba-1.5b"
    recipe = load_recipe(
        "one.yaml", [f"model={{from: scratch, config: {CONFIG}, tokenizer: {tokenizer}}}", "data.max_length=100"]
    )
    plan = make_plan(recipe)
    conversations, _ = realise_mix(load_mix(recipe.data.mix), 0)
    rows, _ = build_rows(conversations, load_tokenizer(tokenizer), 100, folder=folder / "rows")
    assert plan.data is not None
    assert plan.data.conversations == 10
    assert plan.data.tokens == sum(map(len, rows["input_ids"]))
    assert plan.data.supervised == sum(label != -100 for row in rows["labels"] for label in row)
    assert plan.data.rows == len(rows)
    assert plan.steps == -(-len(rows) // 4) * 2


def test_documents_are_counted_in_the_pieces_of_the_run(folder, data_dir):
    from hymba_tune.data.chat import load_tokenizer
    from hymba_tune.data.mix import load_mix, realise_mix
    from hymba_tune.data.packing import build_rows

    Path("mix.yaml").write_text("kind: documents\nsources:\n  mine:\n    path: texts.jsonl\n")
    Path("texts.jsonl").write_text("".join(json.dumps({"text": "one two " * n}) + "\n" for n in range(1, 40)))
    tokenizer = data_dir / "hymba-1.5b"
    model = f"model={{from: scratch, config: {CONFIG}, tokenizer: {tokenizer}}}"
    recipe = load_recipe("one.yaml", [model, "method=pretrain", "data.max_length=20", "data.too_long=split"])
    plan = make_plan(recipe)
    documents, _ = realise_mix(load_mix(recipe.data.mix), 0)
    _, counts = build_rows(documents, load_tokenizer(tokenizer), 20, too_long="split", folder=folder / "rows")
    assert counts.split > 0
    assert plan.data is not None
    assert (plan.data.conversations, plan.data.rows) == (39, counts.rows)
    assert (plan.data.tokens, plan.data.supervised) == (counts.tokens, counts.supervised_tokens)
    assert "documents" in printed(plan)


def test_max_steps_decides_the_steps(folder):
    assert make_plan(load_recipe("one.yaml", ["trainer.max_steps=7"])).steps == 7


def test_a_large_mix_is_extrapolated_from_some_of_it(folder, data_dir, monkeypatch):
    model = f"model={{from: scratch, config: {CONFIG}, tokenizer: {data_dir / 'hymba-1.5b'}}}"
    recipe = load_recipe("one.yaml", [model, "data.max_length=100"])
    whole = make_plan(recipe).data
    monkeypatch.setattr(planning, "SAMPLE", 5)
    sampled = make_plan(recipe).data
    assert whole is not None
    assert sampled is not None
    assert (whole.exact, sampled.exact) == (True, False)
    assert sampled.tokens == whole.tokens  # ten equal conversations


def test_memory_follows_the_formulas(folder):
    geometry = Geometry.of({})
    recipe = load_recipe("one.yaml", ["model.dtype=float32", "trainer.gradient_checkpointing=false"])
    whole = memory_bytes(recipe, geometry, trained=1000, adapted=False, on_gpu=False)
    assert (whole["gradients"], whole["optimizer"], whole["logits"]) == (4000, 8000, 8 * 32001 * 33)
    halved = memory_bytes(
        load_recipe("one.yaml", ["model.dtype=bfloat16"]), geometry, trained=1000, adapted=False, on_gpu=False
    )
    assert halved["activations"] < whole["activations"] / 2  # checkpointed, too
    assert halved["weights"] == whole["weights"] == 2 * halved["bfloat16 copies"]


def test_each_stage_of_zero_is_told_and_time_from_a_given_or_measured_rate(folder):
    plan = make_plan(load_recipe("one.yaml", ["trainer.max_steps=100", f"output.dir={folder / 'run'}"]))
    text = printed(plan)
    assert "each of 8 GPUs with DeepSpeed" in text
    assert all(name in text for name in ("ZeRO-0 (DDP)", "ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-3, offload"))
    assert plan.shared is not None
    assert plan.shared.logits == 8 * 32001 * 2
    assert planning.seconds(plan, 10) == 100 * 4 * 8 / 10
    assert "tokens/s" not in text
    Path("run").mkdir()
    Path("run/metrics.jsonl").write_text('{"tokens": 1600, "seconds": 32}\n')
    assert "1.1 min at 50 tokens/s (measured by the run in output.dir)" in printed(plan)


@pytest.mark.full
@pytest.mark.parametrize("size", CASES)
def test_planned_memory_is_within_a_fifth_of_that_of_real_steps(size):
    assert compare(size)["planned_over_measured"] == pytest.approx(1, abs=0.2)


def test_a_plan_loads_no_torch(folder):
    code = (
        "import sys\nfrom hymba_tune.recipe import Recipe, load_recipe\nfrom hymba_tune.plan import make_plans, show\n"
        "show(make_plans([load_recipe('one.yaml')])[0])\nassert not {'torch', 'trl', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)

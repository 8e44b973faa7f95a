"""A stage from recipe to report on a model made in the test; stopped, killed, changed and broken."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hymba_tune.errors import UserError
from hymba_tune.model import load_model
from hymba_tune.recipe import load_recipe
from hymba_tune.run_dir import RunDir
from hymba_tune.stage import run_stage

CONFIG = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "v_head_dim": 16, "sliding_window": 8, "global_attn_idx": [0, 3],
    "kv_reuse_group": [[1, 2]], "num_memory_tokens": 4, "mamba_d_state": 4, "mamba_dt_rank": 3, "rope_type": None,
}  # fmt: skip
STEPS = 12


@pytest.fixture
def recipe_file(tmp_path: Path, small_tokenizer: Any) -> Path:
    """A recipe of 12 steps in tmp_path, its mix, data and tokenizer beside it."""
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"How many? {i}"},
                {"role": "assistant", "content": f"There are {i}."},
            ]
        }
        for i in range(48)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mix = {"sources": {"chats": {"path": "chats.jsonl", "format": "messages", "licence": "MIT"}}}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(mix))
    recipe = {
        "stage": "count",
        "method": "sft",
        "model": {"from": "scratch", "config": CONFIG, "tokenizer": "tokenizer"},
        "data": {"mix": "mix.yaml", "max_length": 256, "packing": "none", "decontaminate": False},
        "trainer": {
            "learning_rate": 1e-2, "global_batch": 4, "num_train_epochs": 1, "logging_steps": 1, "save_steps": 2,
            "gradient_checkpointing": False,
        },
        "eval": {"suites": ["tiny_math"], "limit": 3, "max_new_tokens": 4},
        "output": {"dir": str(tmp_path / "run")},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_one_recipe_goes_all_the_way_and_a_second_start_does_nothing(recipe_file: Path) -> None:
    run = run_stage(load_recipe(recipe_file))
    assert load_recipe(run.recipe) == load_recipe(recipe_file)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    results = run.read_json(run.results)
    assert results["finished"] == ["data", "before", "training", "after"]
    assert (run.model / "model.safetensors").exists()
    assert "tiny_math" in run.report.read_text()
    assert not run.checkpoints.exists()
    written = {path: path.stat().st_mtime_ns for path in run.model.iterdir()}
    run_stage(load_recipe(recipe_file))
    assert {path: path.stat().st_mtime_ns for path in run.model.iterdir()} == written


def test_an_adapter_run_writes_an_adapter_that_evaluates(recipe_file: Path) -> None:
    run = run_stage(load_recipe(recipe_file, ["adapter={type: dora, r: 2, alpha: 4}", "trainer.max_steps=2"]))
    assert (run.adapter / "adapter_model.safetensors").exists()
    assert not run.model.exists()
    assert "library_name: peft" in (run.adapter / "README.md").read_text()
    assert run.read_json(run.evaluation("after") / "tiny_math.json")["metrics"]


def test_conversations_that_repeat_a_test_item_are_dropped_and_counted_in_data_and_report(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = recipe_file.parent / "benchmarks" / "gsm8k"
    folder.mkdir(parents=True)
    question = "How many apples does Ann keep of her nine?"
    (folder / "test.jsonl").write_text(json.dumps({"question": question, "answer": "#### 6"}) + "\n")
    copied = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "Six."}]}
    with (recipe_file.parent / "chats.jsonl").open("a") as file:
        file.write(json.dumps(copied) + "\n")
    settings = ["trainer.max_steps=1", "eval.suites=[]", f"eval.data={folder.parent}"]
    run = run_stage(load_recipe(recipe_file, [*settings, "data.decontaminate=true"]))
    data = run.read_json(run.data)
    assert (data["contaminated"], data["compared"], data["sources"][0]["contaminated"]) == (1, {"gsm8k": 1}, 1)
    assert data["sources"][0]["conversations"] == 48
    assert "mmlu" in data["not_compared"]
    assert [hit["item"] for hit in run.read_json(run.contamination)["hits"]] == ["0"]
    assert "contaminated: 1" in run.report.read_text()


def test_another_recipe_in_the_same_directory_is_refused_unless_forced(recipe_file: Path) -> None:
    short = ["trainer.max_steps=2", "eval.suites=[]"]
    run_stage(load_recipe(recipe_file, short))
    changed = load_recipe(recipe_file, [*short, "trainer.learning_rate=1e-3"])
    with pytest.raises(UserError, match=r"different: trainer.learning_rate.*--force"):
        run_stage(changed)
    run = run_stage(changed, "rerun")
    assert json.loads(run.metrics.read_text().splitlines()[-1])["step"] == 2


def test_changed_data_is_another_run(recipe_file: Path) -> None:
    short = ["trainer.max_steps=2", "eval.suites=[]"]
    run_stage(load_recipe(recipe_file, short))
    chats = recipe_file.parent / "chats.jsonl"
    chats.write_text("".join(chats.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="different: the files it starts from"):
        run_stage(load_recipe(recipe_file, short))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"chats\.jsonl:49"),
        ('{"messages": [{"role": "user", "content": "alone"}]}', r"chats\.jsonl:49.*assistant"),
    ],
)
def test_broken_data_is_named_and_leaves_no_run(recipe_file: Path, line: str, message: str) -> None:
    with (recipe_file.parent / "chats.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=message):
        run_stage(load_recipe(recipe_file))
    assert not (recipe_file.parent / "run").exists()


def test_documents_longer_than_every_row_leave_no_run(recipe_file: Path) -> None:
    with pytest.raises(UserError, match=r"data\.max_length: 4"):
        run_stage(load_recipe(recipe_file, ["data.max_length=4"]))
    assert not (recipe_file.parent / "run").exists()


@pytest.mark.parametrize(
    ("long", "too_long", "said"),
    [
        (2, "drop", None),  # 4 %
        (3, "drop", "6% of the documents are dropped (3 of 51): see the dropped_ counts in data.json"),
        (3, "truncate", "6% of the documents are cut at the end (3 of 51): raise data.max_length"),
    ],
)
def test_over_five_percent_of_the_documents_dropped_or_cut_is_said_before_training(
    recipe_file: Path, long: int, too_long: str, said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    question = {"role": "user", "content": "How many?"}
    row = {"messages": [question, {"role": "assistant", "content": "There are 12. " * 60}]}
    with (recipe_file.parent / "chats.jsonl").open("a") as file:
        file.write((json.dumps(row) + "\n") * long)
    settings = [f"data.too_long={too_long}", "trainer.max_steps=1", "eval.suites=[]"]
    run = run_stage(load_recipe(recipe_file, settings))
    warnings = [warning["message"] for warning in run.read_json(run.warnings) or []]
    assert [message.startswith(said or "") for message in warnings] == ([] if said is None else [True])
    error = capsys.readouterr().err
    assert ("warning: data: " in error) is (said is not None)
    assert (said or "") in error


def test_an_unknown_suite_is_refused_before_anything_is_written(recipe_file: Path) -> None:
    with pytest.raises(UserError, match=r"no suite or task nonsense"):
        run_stage(load_recipe(recipe_file, ["eval.suites=[nonsense]"]))
    assert not (recipe_file.parent / "run").exists()


def test_a_directory_in_use_is_refused(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    with RunDir(recipe.output.dir).locked(), pytest.raises(UserError, match="in use by process"):
        run_stage(recipe)


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(recipe_file: Path) -> None:
    settings = ["eval.suites=[]"]
    whole = run_stage(load_recipe(recipe_file, [*settings, f"output.dir={recipe_file.parent / 'whole'}"]))
    recipe = load_recipe(recipe_file, settings)
    killed = RunDir(recipe.output.dir)
    command = [sys.executable, "-m", "hymba_tune.cli", "run", str(recipe_file), *settings]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if killed.metrics.exists() and killed.metrics.read_text().count("\n") >= 3:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "training" not in (killed.read_json(killed.state) or {"finished": []})["finished"]
    run_stage(recipe)
    for name, value in load_file(whole.model / "model.safetensors").items():
        assert value.equal(load_file(killed.model / "model.safetensors")[name]), name
    steps = [json.loads(line)["step"] for line in killed.metrics.read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


def test_a_context_is_extended_on_the_weights_of_pretraining(recipe_file: Path) -> None:
    folder = recipe_file.parent
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"There are {i}. " * 9}) + "\n" for i in range(24)))
    (folder / "texts.yaml").write_text("kind: documents\nsources: {texts: {path: text.jsonl, licence: MIT}}\n")
    plain = [
        "method=pretrain",
        "eval.suites=[]",
        f"data.mix={folder / 'texts.yaml'}",
        "data.packing=bfd",
        "data.too_long=split",
    ]
    first = [*plain, "stage=short", "data.max_length=64", f"output.dir={folder / 'short-x'}", "trainer.max_steps=6"]
    rope = ("rope_type=ntk", "max_position_embeddings=64", "orig_max_position_embeddings=64")
    first += [f"model.config.{part}" for part in rope]
    short = run_stage(load_recipe(recipe_file, first))
    assert short.read_json(short.data)["split"] == 24
    longer = ["stage=long", "data.max_length=256", f"output.dir={folder / 'long-x'}", "trainer.max_steps=2"]
    start = ["model={from: stage:short, config: {max_position_embeddings: 256}}", "trainer.learning_rate=0.0"]
    text = yaml.safe_load(recipe_file.read_text())
    del text["model"]
    recipe_file.write_text(yaml.safe_dump(text))
    long = run_stage(load_recipe(recipe_file, [*plain, *longer, *start]))
    before, after = load_model(short.model), load_model(long.model)
    assert before.config.rope_base() == 10000
    assert after.config.rope_base() == pytest.approx(10000 * 7 ** (8 / 6))
    assert after.config.max_position_embeddings == 256
    assert all(torch.equal(*pair) for pair in zip(before.parameters(), after.parameters(), strict=True))
    ids = torch.arange(4, 24)[None]
    assert not torch.allclose(before(ids).logits, after(ids).logits, atol=1e-4)

"""Scoring outside a run: which weights a name means, and that scores come out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.errors import UserError
from hymba_tune.run_dir import RunDir

CONFIG: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "v_head_dim": 32,
    "num_memory_tokens": 1,
    "mamba_d_state": 2,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """A checkpoint with random weights and the real tokenizer."""
    from hymba_tune.model import HymbaConfig, HymbaForCausalLM

    folder = tmp_path_factory.mktemp("weights")
    HymbaForCausalLM(HymbaConfig(**CONFIG)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(data_dir / "hymba-1.5b" / name, folder / name)
    return folder


def test_scores_are_printed_and_written(weights, tmp_path, capsys):
    from hymba_tune.evaluate import evaluate

    evaluate(str(weights), ["tiny_math"], tmp_path / "out", limit=2, data=None, max_new_tokens=2)
    result = json.loads((tmp_path / "out" / "tiny_math.json").read_text())
    metric, score = next(iter(result["metrics"].items()))
    shown = capsys.readouterr().out
    assert score["n"] == 2
    assert "tiny_math" in shown
    assert metric in shown


def test_an_adapter_is_folded_into_its_base(weights, tmp_path):
    import torch

    from hymba_tune.model import load_model
    from hymba_tune.model.adapter import attach_adapter
    from hymba_tune.weights import find_weights, load_weights

    adapted = attach_adapter(load_model(weights), r=2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(tmp_path)
    ids = torch.arange(5)[None]
    assert torch.allclose(load_weights(find_weights(str(tmp_path)))(ids).logits, adapted.eval()(ids).logits, atol=1e-5)


def test_a_run_stands_for_what_it_trained(tmp_path):
    from hymba_tune.weights import find_weights

    run = RunDir(tmp_path / "run")
    run.write_text(run.recipe, "")
    with pytest.raises(UserError, match="has no weights yet"):
        find_weights(str(run.path))
    run.model.mkdir()
    assert find_weights(str(run.path)).source == str(run.model)
    assert find_weights("someone/model").source == "someone/model"


def test_two_processes_give_the_results_of_one(weights, tmp_path):
    from hymba_tune.evaluate import evaluate

    task = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"{n} " + "word " * 2000, "target": "x"} for n in range(9)]  # two batches
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for processes in (1, 2):
        out = tmp_path / str(processes)
        evaluate(str(weights), [f"{task}:exact"], out, limit=None, data=None, max_new_tokens=3, processes=processes)
    one, two = (json.loads((tmp_path / name / "mine.json").read_text()) for name in ("1", "2"))
    for result in (one, two):
        assert result.pop("seconds") > 0
        assert result.pop("tokens_per_second") > 0
    assert one == two
    assert sorted(path.name for path in (tmp_path / "2").iterdir()) == ["answers.jsonl", "mine.json"]


@pytest.mark.parametrize("answered", [False, True])
def test_what_a_process_refuses_before_any_answer_leaves_nothing(weights, tmp_path, monkeypatch, answered):
    from hymba_tune import evaluate

    out = tmp_path / "out"

    def refuse(function: str, request: list[str], topology: Any, reports: Path) -> None:
        reports.mkdir(parents=True)
        (reports / "rank-1.json").write_text("{}")
        (out / "answers-1.jsonl").write_text("{}\n" if answered else "")
        raise UserError("model broken: no weights")

    monkeypatch.setattr(evaluate, "launch", refuse)
    with pytest.raises(UserError, match="no weights"):
        evaluate.evaluate(str(weights), ["tiny_math"], out, limit=1, data=None, max_new_tokens=1, processes=2)
    assert out.exists() == answered


def test_a_broken_file_is_found_before_processes_start(weights, tmp_path):
    from hymba_tune.evaluate import evaluate

    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text('{"question": "cut o\n')
    with pytest.raises(UserError, match=r"train\.jsonl:1: not JSON"):
        evaluate(str(weights), ["gsm8k"], tmp_path / "out", limit=1, data=tmp_path, max_new_tokens=1, processes=2)
    assert not (tmp_path / "out").exists()


def test_more_processes_than_gpus_are_refused(weights, tmp_path, monkeypatch):
    import torch

    from hymba_tune.evaluate import evaluate

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--processes: 3, but there are 2 GPUs here; give at most 2"):
        evaluate(str(weights), ["tiny_math"], tmp_path / "out", limit=1, data=None, max_new_tokens=1, processes=3)
    assert not (tmp_path / "out").exists()

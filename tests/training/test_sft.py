"""Training with TRL: what is learned, what is written, and that a cut run ends as if it had not been cut."""

import copy
import json
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from hymba_tune import run_dir
from hymba_tune.errors import UserError
from hymba_tune.model import HymbaForCausalLM
from hymba_tune.model.adapter import attach_adapter, load_adapter, merge_adapter
from hymba_tune.run_dir import RunDir
from hymba_tune.training import sft
from hymba_tune.training.sft import HymbaSFTTrainer, train_sft
from hymba_tune.training.trainer import last_whole_checkpoint
from tests.training.conftest import make_recipe

# float32 sums over a step in another order.
LOSS_TOLERANCE = 2e-6

TIMING = ("seconds", "tokens_per_second", "memory_gib")
"""What of a line depends on the machine and the moment."""


def train(model: Any, tokenizer: Any, rows: Dataset, folder: Path, **trainer: object) -> Any:
    adapter = trainer.pop("adapter", None)
    validation: Any = trainer.pop("validation", None)
    recipe = make_recipe(adapter, **trainer)  # type: ignore[arg-type]
    return train_sft(recipe, model, tokenizer, rows, validation, RunDir(folder))


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def test_the_loss_falls_and_every_logging_step_is_a_line(
    model: HymbaForCausalLM, tokenizer: Any, rows: Dataset, tmp_path: Path
) -> None:
    train(model, tokenizer, rows, tmp_path)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert lines[-1]["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert lines[-1]["supervised_tokens"] == sum(label != -100 for row in rows for label in row["labels"])
    assert {"learning_rate", "grad_norm", "supervised_share", "epoch", *TIMING} <= set(lines[0])


def test_the_loss_of_packed_rows_is_that_of_their_documents_alone(
    model: HymbaForCausalLM, tokenizer: Any, rows: Dataset, tmp_path: Path
) -> None:
    reference = copy.deepcopy(model)
    total, count = 0.0, 0
    for row in rows.select(range(2)):
        start = 0
        for length in row["seq_lengths"]:
            ids = torch.tensor([row["input_ids"][start : start + length]])
            labels = torch.tensor(row["labels"][start : start + length])
            with torch.no_grad():
                logits = reference(ids).logits[0, :-1]
            total += float(F.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100))
            count += int((labels[1:] != -100).sum())
            start += length
    train(model, tokenizer, rows.select(range(2)), tmp_path, logging_steps=1, save_steps=1)
    assert abs(metrics(tmp_path)[0]["loss"] - total / count) < LOSS_TOLERANCE * 10


def test_the_rate_warms_up_stays_and_decays_over_shares_of_the_run(
    model: HymbaForCausalLM, tokenizer: Any, rows: Dataset, tmp_path: Path
) -> None:
    """20 steps: the first 2 warm up, the last 5 decay; the rate of a line is the one after its step."""
    schedule = {"num_decay_steps": 0.25, "decay_type": "linear", "min_lr_ratio": 0.1}
    settings = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": schedule, "warmup_steps": 0.1}
    train(model, tokenizer, rows, tmp_path, max_steps=20, logging_steps=1, learning_rate=1e-3, **settings)
    rates = [line["learning_rate"] * 1e3 for line in metrics(tmp_path)]
    warm_up, decay = [0.1, 0.55], [1 - 0.9 * step / 5 for step in range(5)]
    assert rates == pytest.approx([*warm_up, *[1.0] * 13, *decay])


def test_checkpointing_layers_is_no_reason_for_a_warning(
    model: HymbaForCausalLM, tokenizer: Any, rows: Dataset, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    adapted = attach_adapter(model, r=2, alpha=4)
    train(adapted, tokenizer, rows.select(range(4)), tmp_path, activation_checkpointing=True)
    assert model.is_activation_checkpointing
    assert [str(warning.message) for warning in recwarn if "checkpointing" in str(warning.message)] == []


class Cut(TrainerCallback):
    """Ends the process' training in the middle of a step, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("adapter", [None, {"type": "dora", "r": 2, "alpha": 4, "dropout": 0.1}])
def test_a_cut_run_ends_with_the_same_weights_and_metrics(
    adapter: dict[str, object] | None,
    model: HymbaForCausalLM,
    tokenizer: Any,
    rows: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start() -> Any:
        torch.manual_seed(1)
        fresh = copy.deepcopy(model)
        return fresh if adapter is None else attach_adapter(fresh, r=2, alpha=4, dropout=0.1)

    whole = train(start(), tokenizer, rows, tmp_path / "whole", adapter=adapter)
    for cut in (3, 7, 10):
        monkeypatch.setattr(sft, "HymbaSFTTrainer", _with(Cut(cut)))
        with pytest.raises(KeyboardInterrupt):
            train(start(), tokenizer, rows, tmp_path / "cut", adapter=adapter)
    monkeypatch.undo()
    resumed = train(start(), tokenizer, rows, tmp_path / "cut", adapter=adapter)
    for (name, expected), (_, got) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(expected, got), name
    assert timeless(metrics(tmp_path / "whole")) == timeless(metrics(tmp_path / "cut"))


def _with(callback: TrainerCallback) -> Any:
    class WithCallback(HymbaSFTTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "callbacks": [callback]})

    return WithCallback


def test_a_checkpoint_that_was_not_written_to_its_end_is_not_used(tmp_path: Path) -> None:
    for step, state in ((4, '{"global_step": 4}'), (8, '{"global_'), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4"]


def test_a_step_that_is_saved_is_logged(model: HymbaForCausalLM, tokenizer: Any, rows: Dataset, tmp_path: Path) -> None:
    train(model, tokenizer, rows, tmp_path, save_steps=5)
    assert [line["step"] for line in metrics(tmp_path)] == [2, 4, 5, 6, 8, 10, 12]


def test_a_run_cut_after_its_last_checkpoint_takes_no_further_step(
    model: HymbaForCausalLM, tokenizer: Any, rows: Dataset, tmp_path: Path
) -> None:
    trained = train(copy.deepcopy(model), tokenizer, rows, tmp_path, max_steps=5)
    again = train(copy.deepcopy(model), tokenizer, rows, tmp_path, max_steps=5)
    for (name, expected), (_, got) in zip(trained.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(expected, got), name
    assert [line["step"] for line in metrics(tmp_path)] == [2, 4, 5]


def test_a_loss_that_is_no_number_stops_the_run(
    model: HymbaForCausalLM, tokenizer: Any, rows: Dataset, tmp_path: Path
) -> None:
    with torch.no_grad():
        model.model.final_layernorm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match=r"loss is nan, .* at step 1; .* bad-batch-0|bad-batch-0\.json"):
        train(model, tokenizer, rows, tmp_path)
    kept = json.loads((tmp_path / "bad-batch-0.json").read_text())
    shown = [row["input_ids"] for row in kept["rows"]]
    documents = [ids for row in rows for ids in _split(row)]
    assert shown
    assert all(ids in documents for ids in shown)
    assert kept["rows"][0]["text"] == tokenizer.decode(shown[0])
    assert kept["rows"][0]["labels"][:2] == [None, None]


def _split(row: dict[str, Any]) -> list[list[int]]:
    ends = list(accumulate(row["seq_lengths"]))
    return [row["input_ids"][start:end] for start, end in pairwise([0, *ends])]


class Spoil(TrainerCallback):
    """Makes the weights no number before a step that is not logged."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            with torch.no_grad():
                kwargs["model"].model.final_layernorm.weight.fill_(torch.inf)


def test_the_step_itself_stops_the_run_and_the_checkpoint_before_it_stays(
    model: HymbaForCausalLM, tokenizer: Any, rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft, "HymbaSFTTrainer", _with(Spoil()))
    with pytest.raises(UserError, match=r"at step 5; the last good checkpoint"):
        train(model, tokenizer, rows, tmp_path)
    kept = last_whole_checkpoint(tmp_path / "checkpoints")
    assert kept is not None
    assert kept.name == "checkpoint-4"
    weights = load_file(kept / "model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())


def test_a_disk_without_room_stops_the_run_before_a_checkpoint_is_begun(
    model: HymbaForCausalLM, tokenizer: Any, rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([10**12, 10**3])
    monkeypatch.setattr(run_dir.shutil, "disk_usage", lambda path: SimpleNamespace(free=next(free)))
    with pytest.raises(UserError, match=r"the next checkpoint needs .* free"):
        train(model, tokenizer, rows, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-4"]


def test_held_out_sources_are_lines_of_their_own_and_the_best_checkpoint_survives_a_cut(
    model: HymbaForCausalLM, tokenizer: Any, rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {"counting": rows.select(range(3)), "more": rows.select(range(3, 4))}
    settings: dict[str, Any] = {
        "validation": held, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
        "save_total_limit": 1,
    }  # fmt: skip
    whole = train(copy.deepcopy(model), tokenizer, rows, tmp_path / "whole", **settings)
    for cut in (3, 9):
        monkeypatch.setattr(sft, "HymbaSFTTrainer", _with(Cut(cut)))
        with pytest.raises(KeyboardInterrupt):
            train(copy.deepcopy(model), tokenizer, rows, tmp_path / "cut", **settings)
    monkeypatch.undo()
    resumed = train(copy.deepcopy(model), tokenizer, rows, tmp_path / "cut", **settings)
    lines = timeless(metrics(tmp_path / "whole"))
    assert timeless(metrics(tmp_path / "cut")) == lines
    evaluated = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [2, 4, 6, 8, 10, 12]
    assert evaluated[0]["sources"].keys() == {"counting", "more"}
    mean = (3 * evaluated[0]["sources"]["counting"] + evaluated[0]["sources"]["more"]) / 4
    assert evaluated[0]["eval_loss"] == pytest.approx(mean)
    best = max(evaluated, key=lambda line: line["eval_loss"])["step"]
    assert best < 12, "the highest loss is not the last one"
    assert (tmp_path / "cut" / "checkpoints" / f"checkpoint-{best}").exists()
    saved = load_file(tmp_path / "cut" / "checkpoints" / f"checkpoint-{best}" / "model.safetensors")
    for (name, expected), (_, got) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(expected, got), name
        assert torch.equal(saved[name], got), name


def test_a_learning_rate_of_zero_is_said_once(
    model: HymbaForCausalLM, tokenizer: Any, rows: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(model, tokenizer, rows, tmp_path, learning_rate=0.0)
    (warning,) = json.loads((tmp_path / "warnings.json").read_text())
    assert warning == {"stage_step": "training", "message": "the learning rate is 0 at step 2: nothing is learned"}
    assert capsys.readouterr().err.count("the learning rate is 0") == 1


def test_only_the_adapter_learns_and_it_survives_saving(
    model: HymbaForCausalLM, tokenizer: Any, rows: Dataset, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    base = copy.deepcopy(model)
    trained = train(attach_adapter(model, r=2, alpha=4), tokenizer, rows, tmp_path, adapter={"type": "dora"})
    held = trained.get_base_model().state_dict()
    for name, value in before.items():
        module, _, parameter = name.rpartition(".")
        key = name if name in held else f"{module}.base_layer.{parameter}"
        assert torch.equal(held[key], value), name
    trained.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    trained.eval()
    with torch.no_grad():
        expected = trained.get_base_model()(input_ids=ids, use_cache=False).logits
        again = load_adapter(base, tmp_path / "adapter").eval()
        merged = merge_adapter(again).eval()
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=0)
    assert metrics(tmp_path)[-1]["loss"] < metrics(tmp_path)[0]["loss"]


def test_decay_spares_rates_skips_norms_biases_and_meta_tokens(
    model: HymbaForCausalLM, tokenizer: Any, rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, float] = {}

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            names = {id(p): n for n, p in kwargs["model"].named_parameters()}
            for group in kwargs["optimizer"].param_groups:
                seen.update({names[id(p)]: group["weight_decay"] for p in group["params"]})

    monkeypatch.setattr(sft, "HymbaSFTTrainer", _with(Look()))
    train(model, tokenizer, rows, tmp_path, weight_decay=0.1, max_steps=2)
    spared = {name for name, decay in seen.items() if decay == 0}
    expected = ("A_log.0", "D.0", "norm.weight", "norm1.weight", "norm2.weight", "bias", "memory_tokens")
    assert spared == {name for name in seen if name.endswith(expected)}
    assert len(seen) == len(list(model.parameters()))

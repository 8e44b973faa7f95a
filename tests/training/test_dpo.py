"""DPO with TRL: the reference in all cases, log-probabilities without padding, losses by name, and a cut run's end."""

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import trl.trainer.utils
from datasets import Dataset, load_from_disk
from trl import DPOConfig

from hymba_tune.errors import UserError
from hymba_tune.model import HymbaForCausalLM
from hymba_tune.model.adapter import attach_adapter, load_adapter
from hymba_tune.run_dir import RunDir
from hymba_tune.trainer_keys import DPO_LOSSES
from hymba_tune.training import dpo
from hymba_tune.training.dpo import HymbaDPOTrainer, train_dpo
from hymba_tune.training.trainer import last_whole_checkpoint
from tests.training.conftest import VOCABULARY, make_recipe
from tests.training.test_sft import Cut, metrics, timeless

# float32 sums over a sequence in another order.
LOG_PROB_TOLERANCE = 2e-5
BETA = 0.1
DORA: dict[str, object] = {"type": "dora", "r": 2, "alpha": 4}


@pytest.fixture
def pairs() -> Dataset:
    """24 pairs of all lengths: the chosen reply counts on from the prompt, the rejected one is noise."""
    rng = random.Random(0)
    made = []
    for _ in range(24):
        start, prompt, reply = rng.randrange(VOCABULARY), rng.randrange(2, 9), rng.randrange(1, 6)
        ids = [4 + (start + i) % (VOCABULARY - 4) for i in range(prompt + reply)]
        noise = [rng.randrange(4, VOCABULARY) for _ in range(rng.randrange(1, 6))]
        made.append({"prompt_ids": ids[:prompt], "chosen_ids": [*ids[prompt:], 2], "rejected_ids": [*noise, 2]})
    return Dataset.from_list(made)


def adapted(model: HymbaForCausalLM, continued: bool = False) -> Any:
    torch.manual_seed(1)
    peft = attach_adapter(copy.deepcopy(model), r=2, alpha=4)
    for name, value in peft.named_parameters():
        if continued and "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05)
    return peft


def train(model: Any, tokenizer: Any, rows: Dataset, folder: Path, **trainer: Any) -> Any:
    adapter, validation = trainer.pop("adapter", None), trainer.pop("validation", None)
    recipe = make_recipe(adapter, method="dpo", **trainer)
    return train_dpo(recipe, model, tokenizer, rows, validation, RunDir(folder))


def trainer_of(model: Any, tokenizer: Any, rows: Dataset, folder: Path, batch: int, **settings: Any) -> HymbaDPOTrainer:
    """TRL's trainer as train_dpo makes it, with the rows for evaluation too."""
    arguments = DPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", max_length=None, beta=BETA,
        per_device_train_batch_size=batch, per_device_eval_batch_size=batch, precompute_ref_log_probs=True, **settings,
    )  # fmt: skip
    return HymbaDPOTrainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )


def reply_log_prob(model: Any, prompt: list[int], reply: list[int]) -> float:
    """log p(reply | prompt), from the logits of this one sequence."""
    with torch.no_grad():
        log_probs = F.log_softmax(model(torch.tensor([prompt + reply])).logits[0].double(), dim=-1)
    return sum(float(log_probs[len(prompt) + i - 1, token]) for i, token in enumerate(reply))


def log_probs(model: Any, pairs: Dataset) -> torch.Tensor:
    """(pairs, 2) float64: of the chosen and the rejected reply."""
    replies = [(row["prompt_ids"], row[f"{side}_ids"]) for row in pairs for side in ("chosen", "rejected")]
    return torch.tensor([reply_log_prob(model, *reply) for reply in replies], dtype=torch.float64).view(-1, 2)


@pytest.mark.parametrize("batch", [1, 7])
def test_a_pairs_log_probabilities_are_those_of_each_conversation_alone(
    batch: int, model: HymbaForCausalLM, tokenizer: Any, pairs: Dataset, tmp_path: Path
) -> None:
    expected = log_probs(model, pairs)
    rows: Any = trainer_of(model, tokenizer, pairs, tmp_path, batch).train_dataset
    found = torch.tensor([rows["ref_chosen_logps"][:], rows["ref_rejected_logps"][:]], dtype=torch.float64).T
    torch.testing.assert_close(found, expected, atol=LOG_PROB_TOLERANCE, rtol=0)


def test_only_tokens_with_a_label_are_projected_onto_the_vocabulary(
    model: HymbaForCausalLM, tokenizer: Any, pairs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    projected = []
    head = trl.trainer.utils._ChunkedLogProbFunction

    class Counted(head):  # type: ignore[valid-type, misc]
        @classmethod
        def apply(cls, hidden: torch.Tensor, *args: Any) -> Any:
            projected.append(len(hidden))
            return head.apply(hidden, *args)

    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Counted)
    trainer_of(model, tokenizer, pairs.select(range(4)), tmp_path, batch=4)
    replies = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in pairs.select(range(4)))
    assert projected == [replies, replies], "once for the training rows, once for the held-out ones"


@pytest.mark.parametrize("continued", [False, True, None], ids=["fresh adapter", "trained adapter", "full weights"])
def test_the_reference_is_the_model_as_it_came_however_it_is_computed(
    continued: bool | None, model: HymbaForCausalLM, tokenizer: Any, pairs: Dataset, tmp_path: Path
) -> None:
    losses = []
    for precompute in (True, False):
        start = copy.deepcopy(model) if continued is None else adapted(model, continued)
        settings: dict[str, Any] = {"adapter": None if continued is None else DORA, "logging_steps": 1, "max_steps": 4}
        folder = tmp_path / str(precompute)
        rows = pairs.select(range(8))
        trained = train(start, tokenizer, rows, folder, precompute_ref_log_probs=precompute, **settings)
        losses.append([line["loss"] for line in metrics(folder)])
        assert set(getattr(trained, "peft_config", {})) <= {"default"}
    assert abs(losses[0][0] - math.log(2)) < LOG_PROB_TOLERANCE
    assert abs(losses[0][1] - math.log(2)) > 100 * LOG_PROB_TOLERANCE
    torch.testing.assert_close(*map(torch.tensor, losses), atol=LOG_PROB_TOLERANCE, rtol=0)


def sigmoid_loss(ratio: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return -F.logsigmoid(BETA * (ratio[:, 0] - ratio[:, 1]))


def ipo_loss(ratio: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    mean = ratio / lengths
    return (mean[:, 0] - mean[:, 1] - 1 / (2 * BETA)) ** 2


def hinge_loss(ratio: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return torch.relu(1 - BETA * (ratio[:, 0] - ratio[:, 1]))


def apo_zero_loss(ratio: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return 1 - torch.sigmoid(BETA * ratio[:, 0]) + torch.sigmoid(BETA * ratio[:, 1])


@pytest.mark.parametrize(
    ("name", "formula"),
    [("sigmoid", sigmoid_loss), ("ipo", ipo_loss), ("hinge", hinge_loss), ("apo_zero", apo_zero_loss)],
)
def test_a_loss_is_what_its_paper_says(
    name: str, formula: Any, model: HymbaForCausalLM, tokenizer: Any, pairs: Dataset, tmp_path: Path
) -> None:
    trainer = trainer_of(model, tokenizer, pairs, tmp_path, batch=8, loss_type=name)
    before = log_probs(model, pairs)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(1.05)
    ratio = log_probs(model, pairs) - before
    lengths = torch.tensor([[len(row["chosen_ids"]), len(row["rejected_ids"])] for row in pairs])
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(float(formula(ratio, lengths).mean()), abs=10 * LOG_PROB_TOLERANCE)
    assert found["eval_rewards/accuracies"] == pytest.approx(float((ratio[:, 0] > ratio[:, 1]).double().mean()))


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_every_loss_that_a_recipe_may_name_is_trls(
    name: str, model: HymbaForCausalLM, tokenizer: Any, pairs: Dataset, tmp_path: Path
) -> None:
    smoothing = {"label_smoothing": 1e-3} if name == "exo_pair" else {}
    trainer = trainer_of(model, tokenizer, pairs.select(range(4)), tmp_path, batch=4, loss_type=[name], **smoothing)
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_what_trl_refuses_is_an_error_of_the_recipe(
    model: HymbaForCausalLM, tokenizer: Any, pairs: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"trainer: Label smoothing must be greater than 0"):
        train(model, tokenizer, pairs, tmp_path, loss_type="exo_pair")


def test_preferences_are_learned_and_counted(
    model: HymbaForCausalLM, tokenizer: Any, pairs: Dataset, tmp_path: Path
) -> None:
    held = pairs.select(range(4))
    settings = {"num_train_epochs": 2, "eval_strategy": "steps", "eval_steps": 12}
    train(model, tokenizer, pairs, tmp_path, validation=held, **settings)
    lines = [line for line in metrics(tmp_path) if "loss" in line]
    assert lines[-1]["rewards/accuracies"] > 0.9 > lines[0]["rewards/accuracies"]
    assert lines[-1]["rewards/margins"] > 0.3
    replies = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in pairs)
    prompts = sum(len(row["prompt_ids"]) for row in pairs)
    assert lines[-1]["tokens"] == 2 * (2 * prompts + replies)
    assert lines[-1]["supervised_tokens"] == 2 * replies
    last = last_whole_checkpoint(tmp_path / "checkpoints")
    assert last is not None
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    evaluated = [line["eval_rewards/accuracies"] for line in history if "eval_loss" in line]
    assert len(evaluated) == 2
    assert evaluated[-1] == 1


def test_accumulated_pairs_weigh_as_much_as_those_of_one_batch(
    model: HymbaForCausalLM, tokenizer: Any, pairs: Dataset, tmp_path: Path
) -> None:
    for size in (1, 4):
        settings = {"per_device_train_batch_size": size, "global_batch": 4, "logging_steps": 1, "max_steps": 2}
        train(copy.deepcopy(model), tokenizer, pairs, tmp_path / str(size), **settings)
    one, four = metrics(tmp_path / "1"), metrics(tmp_path / "4")
    for key in ("loss", "grad_norm", "tokens"):
        assert [line[key] for line in one] == pytest.approx([line[key] for line in four], rel=1e-4), key


@pytest.mark.parametrize(
    ("adapter", "settings"),
    [
        (None, {"activation_checkpointing": True}),
        (DORA, {"disable_dropout": False}),
        (DORA, {"precompute_ref_log_probs": False}),
    ],
    ids=["full weights", "adapter with dropout", "adapter and its frozen copy"],
)
def test_a_cut_run_ends_with_the_same_weights_and_metrics(
    adapter: dict[str, object] | None,
    settings: dict[str, Any],
    model: HymbaForCausalLM,
    tokenizer: Any,
    pairs: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(folder: str) -> Any:
        start = copy.deepcopy(model) if adapter is None else adapted(model, continued=True)
        rows = load_from_disk(tmp_path / "rows")
        return train(start, tokenizer, rows, tmp_path / folder, adapter=adapter, save_steps=2, **settings)

    pairs.select(range(12)).save_to_disk(tmp_path / "rows")
    whole = run("whole")
    for cut in (1, 5):
        monkeypatch.setattr(dpo, "HymbaDPOTrainer", _with(Cut(cut)))
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    monkeypatch.undo()
    resumed = run("cut")
    for (name, expected), (_, got) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(expected, got), name
    assert timeless(metrics(tmp_path / "whole")) == timeless(metrics(tmp_path / "cut"))
    kept = list((tmp_path / "rows").glob("cache-*.arrow"))
    assert len(kept) == settings.get("precompute_ref_log_probs", True), "computed once, read by every later start"


def test_a_loss_of_zero_is_said_once(
    model: HymbaForCausalLM, tokenizer: Any, pairs: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hinge is at rest as soon as the margin of the one pair there is passes 1 / beta."""
    train(model, tokenizer, pairs.select([0] * 24), tmp_path, loss_type="hinge", beta=100.0, logging_steps=1)
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert losses[0] == 1
    (warning,) = json.loads((tmp_path / "warnings.json").read_text())
    message = f"the loss is 0 at step {losses.index(0) + 1}: has any token a label?"
    assert warning == {"stage_step": "training", "message": message}
    assert capsys.readouterr().err.count("the loss is 0") == 1


def _with(callback: Any) -> Any:
    class WithCallback(HymbaDPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "callbacks": [callback]})

    return WithCallback


def test_a_trained_adapter_is_saved_alone(
    model: HymbaForCausalLM, tokenizer: Any, pairs: Dataset, tmp_path: Path
) -> None:
    start = adapted(model, continued=True)
    trained = train(start, tokenizer, pairs, tmp_path, adapter=DORA, precompute_ref_log_probs=False, max_steps=4)
    trained.save_pretrained(tmp_path / "adapter")
    assert not [path for path in (tmp_path / "adapter").iterdir() if path.is_dir()]
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = trained.eval().get_base_model()(ids, use_cache=False).logits
        found = load_adapter(copy.deepcopy(model), tmp_path / "adapter").eval()(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

"""What can't work in several processes is refused by `plan` and `run` alike, before anything is written."""

from pathlib import Path

import pytest

from hymba_tune import launch
from hymba_tune.errors import UserError
from hymba_tune.pipeline import load_pipeline, run_pipeline
from hymba_tune.plan import make_plans
from hymba_tune.recipe import load_recipe

RECIPE = """
stage: one
method: sft
model: {from: tiny}
data: {mix: mix.yaml, max_length: 64, packing: none, decontaminate: false}
trainer: {global_batch: 8}
"""
ZERO2, ZERO3 = "{config: zero2, processes: 2}", "{config: zero3, processes: 2}"
ADAPTER = "adapter={type: dora}"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that can be planned, on a machine without GPUs and with every package that is asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "gpus", list)
    monkeypatch.setattr(launch, "version", lambda package: "1.0")
    Path("one.yaml").write_text(RECIPE)
    Path("mix.yaml").write_text("sources:\n  mine:\n    path: mine.jsonl\n")
    Path("mine.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    return tmp_path / "one.yaml"


def refusal(recipe: Path, *overrides: str) -> str:
    """What `plan` says; `run` says the same, and leaves nothing."""
    with pytest.raises(UserError) as planned:
        make_plans([load_recipe(recipe, overrides)])
    with pytest.raises(UserError) as run:
        run_pipeline(load_pipeline(recipe, overrides))
    assert str(run.value) == str(planned.value)
    assert not Path("runs").exists()
    return str(planned.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launch={config: single, processes: 2}"], "launch.processes: 2: launch.config single is one process"),
        (["launch={config: ddp}"], "launch.processes: 1: ddp shares the work of several; set it to the number of GPUs"),
        (["launch={config: zero4, processes: 2}"], "launch.config: no configuration zero4; use ddp, fsdp2, "),
        (["launch={config: ddp, processes: 3}"], "trainer.global_batch: 8 is not a multiple of "),
        (
            [f"launch={ZERO3}", "trainer.optim=adamw_8bit"],
            "trainer.optim: adamw_8bit: its blocks of quantised state would cross the borders between processes under "
            "launch.config zero3; use adamw_torch",
        ),
        (
            ["launch={config: fsdp2, processes: 2}", "trainer.optim=adamw_torch_4bit"],
            "trainer.optim: adamw_torch_4bit: its blocks of quantised state",
        ),
        (
            [f"launch={ZERO2}", "trainer.optim=adafactor"],
            "trainer.optim: adafactor: it works on whole matrices, which are cut in pieces under launch.config zero2",
        ),
        (
            ["launch={config: zero3_offload, processes: 2}", "trainer.optim=sgd"],
            "trainer.optim: sgd: steps are taken by DeepSpeed's CPU Adam under launch.config zero3_offload",
        ),
        (
            [f"launch={ZERO3}", "method=dpo", "trainer.precompute_ref_log_probs=false"],
            "trainer.precompute_ref_log_probs: false: under zero3 the reference would be a second model",
        ),
        (
            ["launch={config: fsdp2, processes: 2}", "method=dpo"],
            "launch.config: fsdp2: TRL would read the reference again from model.from, without its adapters; use zero3",
        ),
        (
            [f"launch={ZERO3}", ADAPTER, "trainer.gradient_checkpointing_kwargs={selective: true}"],
            "trainer.activation_checkpointing_kwargs: selective: true: an adapter under ZeRO-3 needs reentrant",
        ),
        (
            [f"launch={ZERO3}", ADAPTER, "trainer.gradient_checkpointing_kwargs={use_reentrant: no}"],
            "trainer.activation_checkpointing_kwargs: use_reentrant: false: an adapter under ZeRO-3 needs reentrant",
        ),
    ],
)  # fmt: skip
def test_what_can_never_work_is_refused_with_the_reason(recipe: Path, overrides: list[str], message: str) -> None:
    assert message in refusal(recipe, *overrides)


def test_an_adapter_on_what_is_no_linear_module_is_refused_by_the_plan(recipe: Path) -> None:
    with pytest.raises(
        UserError, match=r"adapter\.targets: 'conv1d' is no linear module of Hymba; use some of in_proj"
    ):
        make_plans([load_recipe(recipe, [f"launch={ZERO3}", "adapter={type: dora, targets: [conv1d]}"])])


def test_fsdp2_without_gpus_is_refused_because_accelerate_would_run_plain_ddp(recipe: Path) -> None:
    assert "fsdp2: FSDP2 needs GPUs, and there is none here (on a CPU accelerate would run plain DDP" in refusal(
        recipe, "launch={config: fsdp2, processes: 2}"
    )


def test_more_processes_than_gpus_are_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "gpus", lambda: ["one", "two"])
    assert "launch.processes: 8, but there are 2 GPUs here; set it to 2" in refusal(
        recipe, "launch={config: ddp, processes: 8}"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"launch={ZERO2}"], "launch.config: zero2 needs DeepSpeed: pip install 'hymba"),
        (["trainer.optim=adamw_8bit"], "trainer.optim: adamw_8bit needs bitsandbytes: pip install bitsandbytes"),
        (["trainer.optim=adamw_torch_8bit"], "trainer.optim: adamw_torch_8bit needs torchao: pip install torchao"),
        (["trainer.optim=galore_adamw_8bit"], "trainer.optim: galore_adamw_8bit needs galore-torch: pip install"),
    ],
)  # fmt: skip
def test_a_package_that_is_missing_is_named(
    recipe: Path, overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "version", lambda package: None)
    assert message in refusal(recipe, *overrides)


@pytest.mark.parametrize(("missing", "remedy"), [("g++", "install g++"), ("ninja", "pip install ninja")])
def test_deepspeed_without_what_it_compiles_with_is_refused(
    recipe: Path, missing: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {"g++": ("c++", "g++"), "ninja": ("ninja",)}
    monkeypatch.setattr(launch.shutil, "which", lambda tool, path: None if tool in others[missing] else tool)
    message = refusal(recipe, f"launch={ZERO2}")
    assert f"launch.config: zero2: DeepSpeed compiles here and finds no {missing}; {remedy}" in message


@pytest.mark.parametrize("config", ["ddp", "zero1", "zero2", "zero3", "zero3_offload"])
@pytest.mark.parametrize("sections", [[], [ADAPTER], ["method=dpo"], ["method=dpo", ADAPTER]])
def test_what_the_parity_matrix_measures_is_planned(recipe: Path, config: str, sections: list[str]) -> None:
    Path("mix.yaml").write_text("kind: preferences\n" * ("method=dpo" in sections) + Path("mix.yaml").read_text())
    plans = make_plans([load_recipe(recipe, [f"launch={{config: {config}, processes: 2}}", *sections])])
    assert plans[0].trained


def test_fsdp2_with_gpus_is_planned(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "gpus", lambda: ["one", "two"])
    for sections in ([], [ADAPTER]):
        assert make_plans([load_recipe(recipe, ["launch={config: fsdp2, processes: 2}", *sections])])

"""Recipes: what is merged in which order, what is refused and how the message reads."""

import json
import os
from pathlib import Path

import pytest
import yaml

from hymba_tune import trainer_keys
from hymba_tune.errors import UserError
from hymba_tune.geometry import CONFIG, PUBLISHED
from hymba_tune.paths import REPOSITORY
from hymba_tune.pipeline import load_pipeline
from hymba_tune.recipe import DORA_TARGETS, Recipe, load_recipe
from hymba_tune.yaml_reader import read_yaml

MINIMAL = """
stage: one
method: sft
model:
  from: tiny
data:
  mix: mix.yaml
trainer:
  learning_rate: 5e-5
"""


@pytest.fixture
def recipe_file(tmp_path, monkeypatch):
    """Write text as recipes/one.yaml beside an (empty) mix, and stand in its parent folder."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mix.yaml").touch()
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "one.yaml") -> Path:
        path = Path("recipes") / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path: Path, *overrides: str, tiny: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides, tiny=tiny)
    return str(caught.value)


def test_a_minimal_recipe_takes_the_defaults(recipe_file):
    recipe = load_recipe(recipe_file(MINIMAL))
    assert recipe.model.source == "tiny"
    assert recipe.data.max_length == 8192
    assert recipe.data.mix == str(Path.cwd() / "recipes" / "mix.yaml")
    assert recipe.adapter is None
    assert recipe.output.dir == str(Path.cwd() / "runs" / "one")
    assert recipe.trainer_arguments == {
        "learning_rate": 5e-5,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
    }


def test_a_recipe_is_frozen(recipe_file):
    recipe = load_recipe(recipe_file(MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        recipe.stage = "two"


def test_files_extend_files_and_the_command_line_comes_last(recipe_file):
    recipe_file(MINIMAL + "  max_steps: 1\n  seed: 1\n  adam_beta1: 0.5\n", "base.yaml")
    recipe_file("extends: base.yaml\ntrainer:\n  max_steps: 2\n  seed: 2\n", "middle.yaml")
    path = recipe_file("extends: middle.yaml\ntrainer:\n  max_steps: 3\n")
    trainer = load_recipe(path, ["trainer.adam_beta1=0.6"]).trainer_arguments
    assert (trainer["max_steps"], trainer["seed"], trainer["adam_beta1"]) == (3, 2, 0.6)


def test_tiny_lies_over_the_recipe_and_under_the_command_line(recipe_file):
    recipe_file(MINIMAL + "tiny:\n  trainer: {max_steps: 5, seed: 5}\n  data: {limit: 5}\n", "base.yaml")
    path = recipe_file("extends: base.yaml\ntrainer: {max_steps: 1}\ntiny:\n  trainer: {seed: 6}\n")
    assert load_recipe(path).data.limit is None
    recipe = load_recipe(path, ["data.limit=7"], tiny=True)
    assert (recipe.trainer_arguments["max_steps"], recipe.trainer_arguments["seed"], recipe.data.limit) == (5, 6, 7)


def test_tiny_needs_a_tiny_section(recipe_file):
    assert "has no `tiny` section" in refusal(recipe_file(MINIMAL), tiny=True)


def test_a_circle_of_extends_is_refused(recipe_file):
    recipe_file("extends: one.yaml\n", "two.yaml")
    message = refusal(recipe_file("extends: two.yaml\n"))
    assert message == (
        "recipes/two.yaml:1: extends: one.yaml closes a circle (one.yaml -> two.yaml -> one.yaml); remove one `extends`"
    )


def test_a_missing_base_is_refused(recipe_file):
    assert "recipes/one.yaml:1: extends: no file recipes/gone.yaml" in refusal(recipe_file("extends: gone.yaml\n"))


def test_a_missing_recipe_is_refused():
    assert "nowhere.yaml" in refusal(Path("nowhere.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  learning_rat: 1\n", "recipes/one.yaml:10: trainer.learning_rat: unknown key; did you mean learning_rate?"),
        ("  max_length: 1\n", "recipes/one.yaml:10: trainer.max_length: set by hymba-tune itself: set data.max_length"),
        ("  max_steps: soon\n", "recipes/one.yaml:10: trainer.max_steps: 'soon' must be int"),
        ("  max_steps: true\n", "recipes/one.yaml:10: trainer.max_steps: True must be int"),
        (
            "  optim: adamw_toch\n",
            "recipes/one.yaml:10: trainer.optim: 'adamw_toch' is not known; did you mean adamw_torch?",
        ),
        ("  eval_strategy: no\n", "recipes/one.yaml:10: trainer.eval_strategy: false is not one of no, steps, epoch; "),
        ("  beta: 0.1\n", "recipes/one.yaml:10: trainer.beta: unknown key; "),
        ("  global_batch: 0\n", "recipes/one.yaml:10: trainer.global_batch: 0: input should be greater than 0"),
        ("datta:\n  limit: 1\n", "recipes/one.yaml:10: datta: unknown key; did you mean data?"),
        ("learning_rate: 1\n", "recipes/one.yaml:10: learning_rate: unknown key; did you mean trainer.learning_rate?"),
        ("adapter:\n  type: dor\n", "recipes/one.yaml:11: adapter.type: 'dor' is not 'dora' or 'lora'"),
        ("adapter:\n  r: 8\n", "recipes/one.yaml:10: adapter.type: missing; add it"),
        ("eval:\n  limit: '5'\n", "recipes/one.yaml:11: eval.limit: '5': input should be a valid integer"),
        ("launch:\n  processes: 2\n", "recipes/one.yaml:11: launch.processes: 2: launch.config single is one process"),
        (
            "launch: {config: ddp, processes: 3, machines: 2}\n",
            "recipes/one.yaml:10: launch.processes: 3: over all machines, as many on each: make it a multiple of",
        ),
    ],
)
def test_a_mistake_in_the_file_is_named_with_line_field_value_and_remedy(recipe_file, text, message):
    assert refusal(recipe_file(MINIMAL.lstrip("\n") + "  save_steps: 2\n" + text)).startswith(message)


def test_every_mistake_is_reported_at_once(recipe_file):
    path = recipe_file(MINIMAL)
    message = refusal(path, "trainer.learning_rat=1", "trainer.output_dir=x")
    assert message.splitlines() == [
        "command line: trainer.learning_rat: unknown key; did you mean learning_rate?",
        "command line: trainer.output_dir: set by hymba-tune itself: set output.dir",
    ]


@pytest.mark.parametrize("text", ["trainer.max_steps", "=3", "trainer..x=3", "--tiny"])
def test_an_override_without_key_and_value_is_refused(recipe_file, text):
    assert "is not of the form section.key=value" in refusal(recipe_file(MINIMAL), text)


def test_override_values_are_read_as_yaml(recipe_file):
    overrides = [
        "trainer.learning_rate=1e-4",
        "eval.suites=[gsm8k, tiny_math]",
        "adapter={type: lora, r: 4}",
        "data.limit=null",
    ]
    recipe = load_recipe(recipe_file(MINIMAL), overrides)
    assert recipe.trainer_arguments["learning_rate"] == 1e-4
    assert recipe.eval.suites == ["gsm8k", "tiny_math"]
    assert recipe.adapter is not None
    assert (recipe.adapter.type, recipe.adapter.r, tuple(recipe.adapter.targets)) == ("lora", 4, DORA_TARGETS)


def test_an_override_cannot_smuggle_in_a_second_key(recipe_file):
    assert "must be one value" in refusal(recipe_file(MINIMAL), "data.limit=1\nstage: two")


def test_global_batch_gives_the_accumulation(recipe_file):
    overrides = ["trainer.global_batch=1024", "trainer.per_device_train_batch_size=4"]
    assert load_recipe(recipe_file(MINIMAL), overrides).gradient_accumulation_steps == 256
    message = refusal(recipe_file(MINIMAL), "trainer.global_batch=7", "trainer.per_device_train_batch_size=4")
    assert "trainer.global_batch: 7 is not a multiple of per_device_train_batch_size x launch.processes = 4" in message


def test_preference_pairs_are_not_packed_and_take_dpo_keys(recipe_file):
    assert "preference pairs are not packed" in refusal(recipe_file(MINIMAL), "method=dpo")
    recipe = load_recipe(recipe_file(MINIMAL), ["method=dpo", "data.packing=none", "trainer.beta=0.1"])
    assert recipe.trainer_arguments["beta"] == 0.1


def test_the_later_of_two_names_of_one_setting_wins(recipe_file):
    recipe_file(MINIMAL + "  activation_checkpointing: true\n", "base.yaml")
    path = recipe_file("extends: base.yaml\ntrainer: {gradient_checkpointing: false}\ntiny: {trainer: {save_steps: 5}}")
    assert load_recipe(path).trainer_arguments["activation_checkpointing"] is False
    assert load_recipe(path, tiny=True).trainer_arguments["activation_checkpointing"] is False
    again = load_recipe(path, ["trainer.gradient_checkpointing=true"]).trainer_arguments
    assert again["activation_checkpointing"] is True
    assert "gradient_checkpointing" not in again


def test_two_names_of_one_setting_in_one_file_are_refused(recipe_file):
    path = recipe_file(MINIMAL + "  activation_checkpointing: true\n  gradient_checkpointing: false\n")
    assert "trainer.gradient_checkpointing: the old name of activation_checkpointing, which is there" in refusal(path)


def test_scratch_needs_a_config_and_a_tokenizer_and_nothing_else_takes_a_config(recipe_file):
    path = recipe_file(MINIMAL)
    message = refusal(path, "model.from=scratch")
    assert "scratch needs model.config" in message
    assert "scratch needs model.tokenizer" in message
    assert "model.config.hidden_size: tiny has weights for its own value; only max_position_embeddings, " in refusal(
        path, "model.config={hidden_size: 64}"
    )


def test_the_context_of_weights_may_be_extended_but_not_under_an_adapter(recipe_file):
    path = recipe_file(MINIMAL)
    longer = "model.config={max_position_embeddings: 4096}"
    assert load_recipe(path, [longer]).model.config == {"max_position_embeddings": 4096}
    message = "model.config: an adapter goes on its weights as they are"
    assert message in refusal(path, longer, "adapter={type: dora}")
    assert message in refusal(path, longer, "model.handoff=continue")


def test_only_plain_text_is_split(recipe_file):
    path = recipe_file(MINIMAL)
    assert "data.too_long: split: only plain text is; for method sft use drop" in refusal(path, "data.too_long=split")
    assert load_recipe(path, ["data.too_long=split", "method=pretrain"]).data.too_long == "split"
    message = refusal(path, "data.too_long=split", "method=pretrain", "data.max_length=1")
    assert "data.max_length: 1: pieces of a text need 2 tokens" in message


@pytest.mark.parametrize("kwargs", ["null", "{min_lr_ratio: 0.1}", "{num_decay_steps: -1}", "{num_decay_steps: soon}"])
def test_a_decay_needs_its_length(recipe_file, kwargs):
    settings = ["trainer.lr_scheduler_type=warmup_stable_decay", f"trainer.lr_scheduler_kwargs={kwargs}"]
    assert "warmup_stable_decay needs it: a number of steps, or a share" in refusal(recipe_file(MINIMAL), *settings)


def test_a_config_file_is_read_and_single_keys_lie_over_it(recipe_file):
    Path("recipes/config.json").write_text(json.dumps({"hidden_size": 64, "vocab_size": 97}))
    path = recipe_file(MINIMAL.replace("from: tiny", "from: scratch\n  config: config.json\n  tokenizer: tiny"))
    assert load_recipe(path, ["model.config.hidden_size=128"]).model.config == {"hidden_size": 128, "vocab_size": 97}


def test_model_config_keys_are_checked_and_leftovers_of_a_config_file_dropped(recipe_file):
    Path("recipes/config.json").write_text(json.dumps({"hidden_size": 64, "auto_map": {}, "architectures": ["x"]}))
    path = recipe_file(MINIMAL.replace("from: tiny", "from: scratch\n  config: config.json\n  tokenizer: tiny"))
    assert load_recipe(path).model.config == {"hidden_size": 64}
    assert refusal(path, "model.config.hiden_size=1") == (
        "command line: model.config.hiden_size: unknown key; did you mean hidden_size?"
    )


def test_weights_are_a_folder_a_hub_id_or_a_word(recipe_file):
    path = recipe_file(MINIMAL)
    Path("weights").mkdir()
    assert load_recipe(path, ["model.from=weights"]).model.source == str(Path("weights").absolute())
    assert load_recipe(path, ["model.from=nvidia/Hymba-1.5B-Base"]).model.source == "nvidia/Hymba-1.5B-Base"
    assert load_recipe(path, ["model.from=stage:sft1"]).model.source == "stage:sft1"
    assert "model.from: no folder ./gone" in refusal(path, "model.from=./gone")


def test_an_unset_variable_is_named(recipe_file, monkeypatch):
    monkeypatch.delenv("HYMBA_TUNE_DATA", raising=False)
    message = refusal(recipe_file(MINIMAL + "eval:\n  data: ${HYMBA_TUNE_DATA}/data\n"))
    assert message.startswith(
        "recipes/one.yaml:11: eval.data: ${HYMBA_TUNE_DATA}/data: the variable HYMBA_TUNE_DATA is"
    )


def test_a_missing_mix_is_refused(recipe_file):
    assert refusal(recipe_file(MINIMAL), "data.mix=gone") == (
        "command line: data.mix: no mix gone; give a .yaml file or the name of one in data_mixes/"
    )


def test_a_mix_is_found_by_name_from_any_folder(recipe_file, tmp_path, monkeypatch):
    (tmp_path / "data_mixes").mkdir()
    (tmp_path / "data_mixes" / "mine.yaml").touch()
    path = recipe_file(MINIMAL.replace("mix.yaml", "mine")).absolute()
    monkeypatch.chdir("/")
    assert load_recipe(path).data.mix == str(tmp_path / "data_mixes" / "mine.yaml")


def test_the_resolved_recipe_loads_back_unchanged(recipe_file):
    recipe = load_recipe(recipe_file(MINIMAL), ["adapter={type: dora}", "output.dir=out/{stage}"])
    saved = recipe_file(recipe.to_yaml(), "saved.yaml")
    assert load_recipe(saved) == recipe


SHIPPED = sorted((REPOSITORY / "recipes").glob("*.yaml"))
PIPELINES = [path for path in SHIPPED if "stages" in read_yaml(path)[0]]


@pytest.fixture
def data_names(tmp_path, monkeypatch):
    """HYMBA_TUNE_DATA as it is, else a folder with the names that recipes look for."""
    if not os.environ.get("HYMBA_TUNE_DATA"):
        for folder in ("hymba-1.5b", "data"):
            (tmp_path / folder).mkdir()
        monkeypatch.setenv("HYMBA_TUNE_DATA", str(tmp_path))


@pytest.mark.parametrize("tiny", [False, True], ids=["real", "tiny"])
@pytest.mark.parametrize("path", [path for path in SHIPPED if path not in PIPELINES], ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path, tiny, data_names):
    recipe = load_recipe(path, tiny=tiny)
    assert isinstance(recipe, Recipe)
    assert ("-tiny" in recipe.output.dir) == tiny


def test_the_embedded_pipeline_hands_on_from_stage_to_stage_and_scores_what_was_learned_before():
    stages = load_pipeline(REPOSITORY / "recipes" / "pipeline.yaml", tiny=True).stages
    assert [recipe.model.source for recipe in stages] == ["tiny", "stage:sft1", "stage:sft2", "stage:dpo"]
    assert all(recipe.data.mix.endswith("_tiny.yaml") for recipe in stages)
    sft1, sft2, dpo, roleplay = (set(recipe.eval.suites) for recipe in stages)
    assert sft1 < sft2 < dpo
    assert roleplay - dpo == {"tiny_roles"}
    for recipe in stages[1:]:  # alone, a stage finds what the pipeline left
        alone = load_recipe(REPOSITORY / "recipes" / f"{recipe.stage}.yaml", tiny=True)
        assert alone.output.dir.endswith(f"runs/pipeline-tiny/{recipe.stage}")


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_every_shipped_pipeline_loads(path, data_names):
    assert len(load_pipeline(path).stages) > 1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_first_line_of_a_recipe_is_the_command_that_runs_it(path):
    assert path.read_text(encoding="utf-8").startswith(f"# hymba-tune run recipes/{path.name}")


@pytest.mark.parametrize(("name", "learning_rate"), [("sft1", 5e-5), ("sft2", 5e-5), ("dpo", 3e-6)])
def test_stages_state_the_papers_settings(name, learning_rate):
    trainer = load_recipe(REPOSITORY / "recipes" / f"{name}.yaml").trainer_arguments
    assert trainer["learning_rate"] == learning_rate
    assert trainer["lr_scheduler_type"] == "cosine"
    assert trainer["num_train_epochs"] == 1
    assert trainer["gradient_accumulation_steps"] * trainer["per_device_train_batch_size"] == 1024


def test_pretraining_states_the_papers_settings():
    recipe = load_recipe(REPOSITORY / "recipes" / "pretrain.yaml")
    trainer = recipe.trainer_arguments
    assert (trainer["learning_rate"], trainer["warmup_steps"]) == (3e-3, 0.01)
    assert trainer["lr_scheduler_kwargs"]["num_decay_steps"] == 0.2
    assert trainer["learning_rate"] * trainer["lr_scheduler_kwargs"]["min_lr_ratio"] == pytest.approx(1e-5)
    assert recipe.data.max_length * (recipe.trainer.global_batch or 0) == 2**21
    model = {**CONFIG, **(recipe.model.config or {})}
    longer = load_recipe(REPOSITORY / "recipes" / "pretrain_8k.yaml")
    assert longer.data.max_length * (longer.trainer.global_batch or 0) == 2**21
    published = PUBLISHED["nvidia/Hymba-1.5B-Base"]
    assert {**model, **(longer.model.config or {})} == {**published, "global_attn_idx": [0, 15, 31]}


DPO = MINIMAL.replace("method: sft", "method: dpo").replace("data:\n", "data:\n  packing: none\n")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.loss_type=sigmod", "trainer.loss_type: 'sigmod' is no loss; did you mean sigmoid?"),
        ("trainer.loss_type=[ipo, 3]", "trainer.loss_type: 3 is no loss; use one of sigmoid, hinge"),
        ("trainer.lossy_type=ipo", "trainer.lossy_type: unknown key; did you mean loss_type?"),
        ("data.packing=bfd", "data.packing: bfd: preference pairs are not packed; set it to none"),
        ("adapter={type: lora, dropout: 0.1}", "adapter.dropout: 0.1: DPO switches dropout off; set it to 0"),
    ],
)
def test_dpo_settings_are_checked(recipe_file, override, message):
    assert message in refusal(recipe_file(DPO), override)


@pytest.mark.parametrize("loss", ["ipo", "[sigmoid, sft]"])
def test_dpo_losses_have_names(recipe_file, loss):
    recipe = load_recipe(recipe_file(DPO), [f"trainer.loss_type={loss}", "adapter={type: lora, dropout: 0.1}",
                                            "trainer.disable_dropout=false"])  # fmt: skip
    assert recipe.trainer_arguments["loss_type"] in ("ipo", ["sigmoid", "sft"])


@pytest.mark.parametrize("path", sorted((REPOSITORY / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_accelerate_config_loads(path):
    read_yaml(path)
    assert yaml.safe_load(path.read_text())["main_training_function"] == "main"


def test_trainer_keys_equal_the_installed_classes():
    import transformers
    import trl

    from tests.trl_fields import listing

    written = json.loads(Path(trainer_keys.__file__).with_suffix(".json").read_text(encoding="utf-8"))
    installed = {"trl": trl.__version__, "transformers": transformers.__version__}
    if written["versions"] != installed:
        pytest.skip(f"trainer_keys.json was made with {written['versions']}, installed are {installed}")
    assert written == listing(), "run: python tests/trl_fields.py"


def test_reserved_trainer_keys_are_trl_fields():
    fields = {**trainer_keys.fields("sft"), **trainer_keys.fields("dpo")}
    assert set(trainer_keys.RESERVED) <= set(fields)

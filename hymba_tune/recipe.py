"""A recipe: one YAML file that says everything about one stage, and the frozen object it becomes.

    recipe file -> the files it `extends` -> its `tiny` section (with --tiny) -> key=value -> Recipe

Everything is checked here, before anything is downloaded or written: unknown keys, types, contradictions, missing
files. Nothing of the training stack is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from hymba_tune.errors import UserError
from hymba_tune.geometry import CONFIG, LEFTOVERS
from hymba_tune.layers import Origin, Settings, assignment, overlay, read_chain, section
from hymba_tune.paths import expand, find, is_hub_id, task_file
from hymba_tune.topology import Sharing, Topology, find_config, read_sharing
from hymba_tune.trainer_keys import RENAMED, problem, unknown_key
from hymba_tune.trainer_keys import fields as trainer_fields
from hymba_tune.yaml_reader import Location, read_yaml

DORA_TARGETS = ("in_proj", "out_proj", "x_proj.0", "dt_proj.0", "gate_proj", "up_proj", "down_proj")
"""Every projection of a Hymba layer: attention and SSM branch, dt, and the MLP."""


CONTEXT_KEYS = ("max_position_embeddings", "orig_max_position_embeddings", "rope_theta", "rope_type", "seq_length")
"""What of a configuration may change under trained weights: no shape depends on it, and training gets used to it."""

DATA_KINDS: dict[str, Literal["conversations", "preferences", "documents"]] = {
    "sft": "conversations",
    "dpo": "preferences",
    "pretrain": "documents",
}
"""method -> the kind of mix that it learns from."""

# Optimizers that factorise or project a matrix, or step inside the backward pass.
_BY_MATRIX = ("adafactor", "galore", "apollo", "lomo", "adalomo", "stable_adamw", "grokadamw", "schedule_free")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class ModelSection(_Section):
    """Where the weights come from.

    `from`: a folder, a hub id, `tiny` (the embedded model), `scratch` (random weights, needs `config` and `tokenizer`)
    or `stage:NAME` (what that stage wrote). `config` holds HymbaConfig keys; a path to a config.json is read into it.
    On weights that exist it may change CONTEXT_KEYS alone: so a context is extended.
    """

    source: str = Field(alias="from")
    handoff: Literal["merge", "continue", "stack"] | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    backend: Literal["auto", "reference", "cpu", "triton", "packages"] = "auto"


Benchmark = Literal[
    "gsm8k", "ifeval", "mmlu", "bfcl_v2", "rolebench_instruction", "rolebench_role", "rolebench_zh", "gpqa"
]


class DataSection(_Section):
    """What is learned from: a mix, made into rows of at most `max_length` tokens.

    `limit` keeps that many conversations of the mix, `validation` holds that many out; a document that does not fit a
    row is dropped, truncated or (plain text only) split into pieces, and counted. Conversations that repeat a
    benchmark's test item are left out (`decontaminate`: true for all benchmarks, or a list of them, or false).
    """

    mix: str
    max_length: PositiveInt = 8192
    packing: Literal["bfd", "none"] = "bfd"
    too_long: Literal["drop", "truncate", "split"] = "drop"
    seed: int = 0
    limit: PositiveInt | None = None
    validation: PositiveInt | None = None
    decontaminate: bool | list[Benchmark] = True


class AdapterSection(_Section):
    """A low-rank adapter instead of full fine-tuning; `targets` name modules by the end of their names."""

    type: Literal["dora", "lora"]
    r: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] = Field(default=list(DORA_TARGETS), min_length=1)


class TrainerSection(_Section):
    """TRL's own config keys, and `global_batch`: rows a step over all processes (null: no accumulation)."""

    model_config = ConfigDict(extra="allow")

    global_batch: PositiveInt | None = None
    per_device_train_batch_size: PositiveInt = 1


class LaunchSection(_Section):
    """The processes: an accelerate configuration, by its name in `accelerate_configs/` or a file, and how many.

    `processes` is over all `machines`. Each machine runs the same command, and knows by NODE_RANK which it is; they
    meet at MASTER_ADDR and MASTER_PORT (else `port`); see machines.py. No step within `step_timeout` minutes: the run
    is stopped as hung.
    """

    config: str = "single"
    processes: PositiveInt = 1
    machines: PositiveInt = 1
    port: int | None = Field(default=None, ge=1, le=65535)
    step_timeout: float = Field(default=30.0, gt=0)

    @property
    def sharing(self) -> Sharing:
        """How the configuration shares work out; raises UserError if there is no such configuration."""
        return read_sharing(find_config(self.config))

    @property
    def topology(self) -> Topology:
        """Which processes there are; with several machines without the place where they meet."""
        return Topology(find_config(self.config), self.processes, self.machines, port=self.port)


class EvalSection(_Section):
    """What is measured before and after the stage.

    `suites` name suites, tasks and files of one's own (FILE.jsonl:SCORER, an lm-eval FILE.yaml); `data`: the folder
    with benchmark files, where there is no hub.
    """

    suites: list[str] = []
    limit: PositiveInt | None = None
    before: bool = True
    after: bool = True
    batch_tokens: PositiveInt = 16384
    max_new_tokens: PositiveInt | None = None
    data: str | None = None


class OutputSection(_Section):
    """The run directory; `{stage}` stands for the stage's name."""

    dir: str = "runs/{stage}"


class Recipe(_Section):
    """One stage, resolved and checked."""

    stage: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    method: Literal["sft", "dpo", "pretrain"]
    model: ModelSection
    data: DataSection
    adapter: AdapterSection | None = None
    trainer: TrainerSection = TrainerSection()
    launch: LaunchSection = LaunchSection()
    eval: EvalSection = EvalSection()
    output: OutputSection = OutputSection()

    @property
    def trains_adapter(self) -> bool:
        """Whether an adapter learns, a new one or the one that is there, and no other weight."""
        return self.adapter is not None or self.model.handoff == "continue"

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches a step: global_batch / (per_device_train_batch_size * processes)."""
        return self.global_batch // (self.trainer.per_device_train_batch_size * self.launch.processes)

    @property
    def global_batch(self) -> int:
        """Rows a step over all processes."""
        return self.trainer.global_batch or self.trainer.per_device_train_batch_size * self.launch.processes

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """The keyword arguments for TRL's config class that the recipe decides."""
        return {
            **{RENAMED.get(key, key): value for key, value in (self.trainer.model_extra or {}).items()},
            "per_device_train_batch_size": self.trainer.per_device_train_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the names a recipe file uses."""
        return self.model_dump(mode="json", by_alias=True)

    def to_yaml(self) -> str:
        """The resolved recipe as a file that load_recipe reads back unchanged."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), tiny: bool = False) -> Recipe:
    """Read, merge and check a recipe.

    `overrides` are `section.key=value` texts; `tiny` lays the recipe's own `tiny` section on top (below the overrides).
    Paths may be relative to the recipe file, its parent folder, the working directory or the repository; `${NAME}` is
    taken from the environment. Raises UserError that lists every problem, one a line.
    """
    settings = _merged(Path(path) if Path(path).exists() else find(str(path), []) or Path(path), tiny)
    for text in overrides:
        settings = overlay(settings, _with_new_names(assignment(text)))
    settings = _with_paths(settings)
    try:
        recipe = Recipe.model_validate(settings.values)
    except ValidationError as error:
        raise _report(settings, _invalid(error)) from None
    problems = list(_contradictions(recipe))
    if problems:
        raise _report(settings, problems)
    return recipe


def _merged(path: Path, tiny: bool) -> Settings:
    """The recipe file over those it extends, with the sections called `tiny` merged last or left out."""
    chain = read_chain(path)
    merged = Settings({}, {})
    for layer in chain:
        merged = overlay(merged, _with_new_names(_with_config_file(layer)))
    plain, tiny_section = section(merged, "tiny")
    if not tiny:
        return plain
    if tiny_section is None:
        raise UserError(
            f"{path}: has no `tiny` section, so --tiny means nothing here; add one, or extend a recipe with one"
        )
    return overlay(plain, tiny_section)


def _with_config_file(layer: Settings) -> Settings:
    """`model.config: FILE` replaced by what the file says of the model, so that single keys can be laid over it."""
    model = layer.values.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("config"), str):
        return layer
    origin = layer.origin(("model", "config"))
    config, _ = read_yaml(_existing(model["config"], origin, "model.config"))  # JSON is YAML
    config = {key: value for key, value in config.items() if key not in LEFTOVERS}
    return Settings({**layer.values, "model": {**model, "config": config}}, layer.origins)


def _with_new_names(layer: Settings) -> Settings:
    """Keys of `trainer` and `tiny.trainer` under their new names: a later layer wins whichever name it uses."""
    origins = {tuple(RENAMED.get(str(key), key) for key in at): origin for at, origin in layer.origins.items()}
    return Settings(_renamed(layer.values, layer.origin(())), origins)


def _renamed(values: dict[str, Any], origin: Origin) -> dict[str, Any]:
    for old, new in RENAMED.items():
        if old in values and new in values:
            raise UserError(f"{origin.text}: trainer.{old}: the old name of {new}, which is there too; keep one")
    inner = {key: _renamed(values[key], origin) for key in ("tiny", "trainer") if isinstance(values.get(key), dict)}
    return {RENAMED.get(key) or key: value for key, value in (values | inner).items()}


def _with_paths(settings: Settings) -> Settings:
    """Every name of a file or folder made absolute, `${NAME}` and `{stage}` filled in."""
    values = {name: dict(part) if isinstance(part, dict) else part for name, part in settings.values.items()}
    for name, key, resolve in (
        ("model", "from", _weights),
        ("model", "tokenizer", _tokenizer),
        ("data", "mix", _mix),
        ("eval", "data", _existing),
        ("launch", "config", _launch_config),
    ):
        part = values.get(name)
        if isinstance(part, dict) and isinstance(part.get(key), str):
            part[key] = str(resolve(part[key], settings.origin((name, key)), f"{name}.{key}"))
    evaluation = values.get("eval")
    if isinstance(evaluation, dict) and isinstance(evaluation.get("suites"), list):
        origin = settings.origin(("eval", "suites"))
        evaluation["suites"] = [_suite(text, origin) for text in evaluation["suites"]]
    output = values.setdefault("output", {})
    if isinstance(output, dict):
        output.setdefault("dir", OutputSection().dir)
    if isinstance(output, dict) and isinstance(output.get("dir"), str):
        folder = expand(output["dir"], settings.origin(("output", "dir")), "output.dir")
        output["dir"] = str(Path(folder.replace("{stage}", str(values.get("stage")))).absolute())
    return Settings(values, settings.origins)


def _existing(text: str, origin: Origin, field: str) -> Path:
    found = find(expand(text, origin, field), [origin.folder, origin.folder.parent, Path.cwd()])
    if found is None:
        raise UserError(
            f"{origin.text}: {field}: no file or folder {text}; looked in {origin.folder} and the working directory"
        )
    return found


def _suite(text: Any, origin: Origin) -> Any:
    """A suite's name as it is; the file of a task of one's own as an absolute path."""
    own = task_file(text) if isinstance(text, str) else None
    if own is None:
        return text
    file, scorer = own
    return str(_existing(file, origin, "eval.suites")) + (f":{scorer}" if scorer else "")


def _mix(text: str, origin: Origin, field: str) -> Path:
    """A mix by path, or by its name in data_mixes/."""
    name = expand(text, origin, field)
    roots = [origin.folder, origin.folder.parent, Path.cwd()]
    found = find(name, roots) if name.endswith((".yaml", ".yml")) else find(f"data_mixes/{name}.yaml", roots)
    if found is None:
        raise UserError(f"{origin.text}: {field}: no mix {text}; give a .yaml file or the name of one in data_mixes/")
    return found


def _launch_config(text: str, origin: Origin, field: str) -> str:
    """A configuration's name, or the path of the user's own file."""
    return str(_existing(text, origin, field)) if text.endswith((".yaml", ".yml")) else text


def _weights(text: str, origin: Origin, field: str) -> str:
    if text in ("tiny", "scratch") or text.startswith("stage:"):
        return text
    return _folder_or_hub_id(text, origin, field, "tiny, scratch, stage:NAME")


def _tokenizer(text: str, origin: Origin, field: str) -> str:
    return text if text == "tiny" else _folder_or_hub_id(text, origin, field, "tiny")


def _folder_or_hub_id(text: str, origin: Origin, field: str, words: str) -> str:
    name = expand(text, origin, field)
    found = find(name, [origin.folder, origin.folder.parent, Path.cwd()])
    if found is not None and found.is_dir():
        return str(found)
    if not is_hub_id(name):
        raise UserError(f"{origin.text}: {field}: no folder {name}, and it is no hub id (owner/name) or one of {words}")
    return name


def _contradictions(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    """What each section allows but the recipe as a whole does not."""
    model, trainer, launch = recipe.model, recipe.trainer, recipe.launch
    if model.source == "scratch" and not model.config:
        yield ("model", "from"), "scratch needs model.config: HymbaConfig keys, or the path of a config.json"
    if model.source == "scratch" and model.tokenizer is None:
        yield ("model", "from"), "scratch needs model.tokenizer: a folder, a hub id or tiny"
    for key in model.config or {}:
        if key not in CONFIG:
            yield ("model", "config", key), unknown_key(key, list(CONFIG), "a key of HymbaConfig")
        elif model.source != "scratch" and key not in CONTEXT_KEYS:
            yield (
                ("model", "config", key),
                f"{model.source} has weights for its own value; only {', '.join(CONTEXT_KEYS)} may change under them",
            )
    if model.config and model.source != "scratch" and recipe.trains_adapter:
        yield (
            ("model", "config"),
            "an adapter goes on its weights as they are; train all weights in the new context first, or set it to null",
        )
    if model.handoff == "stack" and recipe.adapter is None:
        yield ("model", "handoff"), "stack needs an adapter section: what is stacked is an adapter"
    if model.handoff == "continue" and recipe.adapter is not None:
        yield ("model", "handoff"), "continue trains the adapter that is there; set adapter to null"
    if recipe.data.too_long == "split" and recipe.method != "pretrain":
        yield ("data", "too_long"), f"split: only plain text is; for method {recipe.method} use drop or truncate"
    if recipe.data.too_long == "split" and recipe.data.max_length < 2:
        yield ("data", "max_length"), f"{recipe.data.max_length}: pieces of a text need 2 tokens or more"
    yield from _schedule_problems(trainer.model_extra or {})
    yield from _validation_problems(trainer.model_extra or {}, recipe.data)
    if recipe.method == "dpo" and recipe.data.packing != "none":
        yield ("data", "packing"), f"{recipe.data.packing}: preference pairs are not packed; set it to none"
    dropout = recipe.adapter.dropout if recipe.adapter else 0
    if recipe.method == "dpo" and dropout and (trainer.model_extra or {}).get("disable_dropout", True):
        yield (
            ("adapter", "dropout"),
            f"{dropout}: DPO switches dropout off; set it to 0, or trainer.disable_dropout: false",
        )
    yield from _launch_contradictions(recipe)
    rows = trainer.per_device_train_batch_size * launch.processes
    if trainer.global_batch is not None and trainer.global_batch % rows:
        yield (
            ("trainer", "global_batch"),
            f"{trainer.global_batch} is not a multiple of per_device_train_batch_size x launch.processes = {rows}",
        )
    for key, value in (trainer.model_extra or {}).items():
        wrong = problem(recipe.method, key, value)
        if wrong:
            yield ("trainer", key), wrong


def _validation_problems(options: dict[str, Any], data: DataSection) -> Iterator[tuple[Location, str]]:
    """Held-out losses need held-out rows; and what is measured after a checkpoint is lost with a kill in between."""
    strategy = options.get("eval_strategy")
    wants = [key for key in ("load_best_model_at_end", "eval_on_start") if options.get(key)]
    wants += ["eval_strategy"] if strategy in ("steps", "epoch") else []
    if data.validation is None:
        yield from ((("trainer", key), "needs held-out rows; set data.validation") for key in wants)
    if strategy == "epoch" and options.get("save_strategy") != "epoch":
        yield ("trainer", "eval_strategy"), "epoch: needs save_strategy epoch too, or a resumed run loses an evaluation"


def _schedule_problems(options: dict[str, Any]) -> Iterator[tuple[Location, str]]:
    """transformers' warmup_stable_decay has no default for the length of its decay."""
    kwargs = options.get("lr_scheduler_kwargs") or {}
    if options.get("lr_scheduler_type") != "warmup_stable_decay" or not isinstance(kwargs, dict):
        return
    decay = kwargs.get("num_decay_steps")
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or decay <= 0:
        yield (
            ("trainer", "lr_scheduler_kwargs"),
            f"num_decay_steps: {decay}: warmup_stable_decay needs it: a number of steps, or a share of all below 1",
        )


def _launch_contradictions(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    """Ways to share the work out that can't be, or that nobody can mean."""
    launch, trainer = recipe.launch, recipe.trainer
    try:
        sharing = launch.sharing
    except UserError as error:
        yield ("launch", "config"), str(error).removeprefix("launch.config: ")
        return
    if sharing.kind == "single" and launch.processes != 1:
        yield ("launch", "processes"), f"{launch.processes}: launch.config single is one process"
    if launch.processes % launch.machines:
        yield (
            ("launch", "processes"),
            f"{launch.processes}: over all machines, as many on each: make it a multiple of launch.machines: "
            f"{launch.machines}",
        )
    if sharing.kind in ("ddp", "fsdp") and launch.processes == 1:
        yield ("launch", "processes"), f"1: {launch.config} shares the work of several; set it to the number of GPUs"
    optimizer = str((trainer.model_extra or {}).get("optim", "adamw_torch"))
    reason = _optimizer_problem(optimizer, sharing)
    if reason:
        yield ("trainer", "optim"), f"{optimizer}: {reason} under launch.config {launch.config}; use adamw_torch"
    yield from _reference_problems(recipe, sharing)
    yield from _recomputing_problems(recipe, sharing)


def _reference_problems(recipe: Recipe, sharing: Sharing) -> Iterator[tuple[Location, str]]:
    """DPO of all weights, where no process holds them all."""
    if recipe.method != "dpo" or recipe.trains_adapter or not sharing.spreads_weights:
        return
    name = recipe.launch.config
    if sharing.kind == "fsdp":
        message = (
            f"{name}: TRL would read the reference again from model.from, without its adapters; use zero3 or zero2"
        )
        yield ("launch", "config"), message
    elif not (recipe.trainer.model_extra or {}).get("precompute_ref_log_probs", True):
        message = f"false: under {name} the reference would be a second model; leave it at true"
        yield ("trainer", "precompute_ref_log_probs"), message


def _recomputing_problems(recipe: Recipe, sharing: Sharing) -> Iterator[tuple[Location, str]]:
    """Frozen weights in pieces: TRL recomputes layers in the reentrant way alone."""
    kwargs = recipe.trainer_arguments.get("activation_checkpointing_kwargs") or {}
    if not (recipe.trains_adapter and sharing.stage == 3 and isinstance(kwargs, dict)):
        return
    for key, wrong in (("selective", True), ("use_reentrant", False)):
        if kwargs.get(key) is wrong:
            yield (
                ("trainer", "activation_checkpointing_kwargs"),
                f"{key}: {str(wrong).lower()}: an adapter under ZeRO-3 needs reentrant checkpointing; leave it out",
            )


def _optimizer_problem(optimizer: str, sharing: Sharing) -> str | None:
    """Why an optimizer can't work on weights that are shared out: it would see flat pieces of them."""
    if sharing.offload and optimizer not in ("adamw_torch", "adamw_torch_fused"):
        return "steps are taken by DeepSpeed's CPU Adam"
    if sharing.spreads_weights and ("8bit" in optimizer or "4bit" in optimizer):
        return "its blocks of quantised state would cross the borders between processes"
    if sharing.kind in ("deepspeed", "fsdp") and optimizer.startswith(_BY_MATRIX):
        return "it works on whole matrices, which are cut in pieces"
    return None


_SECTIONS: dict[Location, type[BaseModel]] = {
    (): Recipe,
    ("model",): ModelSection,
    ("data",): DataSection,
    ("adapter",): AdapterSection,
    ("launch",): LaunchSection,
    ("eval",): EvalSection,
    ("output",): OutputSection,
}


def _invalid(error: ValidationError) -> Iterator[tuple[Location, str]]:
    """pydantic's findings in the recipe's own words."""
    for found in error.errors(include_url=False, include_context=True):
        location = tuple(found["loc"])
        kind, value = found["type"], found["input"]
        if kind == "extra_forbidden":
            yield location, _unknown(location)
        elif kind == "missing":
            yield location, "missing; add it"
        elif kind == "literal_error":
            yield location, f"{value!r} is not {found['ctx']['expected']}"
        else:
            yield location, f"{value!r}: {found['msg'][0].lower()}{found['msg'][1:]}"


def _unknown(location: Location) -> str:
    key = str(location[-1])
    known = _keys(_SECTIONS[location[:-1]])
    if len(location) == 1 and key not in known:
        homes = [at[0] for at, part in _SECTIONS.items() if at and key in _keys(part)]
        homes += ["trainer"] if key in trainer_fields("sft") else []
        if homes:
            return f"unknown key; did you mean {homes[0]}.{key}?"
    return unknown_key(key, known)


def _keys(part: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in part.model_fields.items()]


def _report(settings: Settings, problems: Iterator[tuple[Location, str]] | list[tuple[Location, str]]) -> UserError:
    lines = [f"{settings.origin(at).text}: {'.'.join(map(str, at))}: {message}" for at, message in problems]
    return UserError("\n".join(dict.fromkeys(lines)))

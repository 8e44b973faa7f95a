"""What a run would do, before anything starts: settings, parameters, tokens, steps, memory. No weights, no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hymba_tune.errors import UserError
from hymba_tune.geometry import PUBLISHED, Geometry, activations, adapter_parameters, parameters
from hymba_tune.launch import check_launch
from hymba_tune.provenance import gpus
from hymba_tune.recipe import DATA_KINDS, AdapterSection, Recipe
from hymba_tune.zero import States, largest_layer, zero_states

GIB = 2**30
# Conversations that are tokenised to count tokens; larger mixes are extrapolated from evenly spaced ones.
SAMPLE = 2000
# Tokens and columns that TRL's loss scores at a time (trl/kernels/chunked_logprob.py). With Triton their logits exist
# once; in torch the backward holds seven float32 arrays of that size beside them (scaled twice, log p, p, three of the
# gradient) and a mask of a byte an entry.
LOGITS_TOKENS, LOGITS_COLUMNS, LOGITS_COPIES_ON_CPU = 4096, 32768, 8.25


@dataclass(frozen=True)
class DataCount:
    """Conversations or documents of the mix, their tokens and those the loss falls on, and how many rows they make."""

    conversations: int
    tokens: int
    supervised: int
    rows: int
    exact: bool


@dataclass(frozen=True)
class Shared:
    """Memory of a GPU, in bfloat16, where `processes` share the states: the states a stage, and what none divides."""

    processes: int
    states: dict[str, States]
    activations: int
    logits: int


@dataclass(frozen=True)
class Plan:
    """The facts; what could not be known is None, with the reason in the note beside it."""

    recipe: Recipe
    adapter: AdapterSection | None
    parts: dict[str, int] | None
    trained: int | None
    model_note: str
    data: DataCount | None
    data_note: str
    steps: int | None
    memory: dict[str, int] | None
    on_gpu: bool
    shared: Shared | None = None


@dataclass(frozen=True)
class Start:
    """What a stage starts from: the configuration, the tokenizer's folder and the adapter, None where not known."""

    config: Mapping[str, Any] | None
    note: str
    tokenizer: Path | None
    adapter: AdapterSection | None = None


def make_plans(recipes: Sequence[Recipe]) -> list[Plan]:
    """Count what can be counted of each stage, parents first. Raises UserError where the run itself would refuse."""
    written: dict[str, Start] = {}
    plans = []
    for recipe in recipes:
        check_launch(recipe)
        start = _start(recipe, written)
        adapter = start.adapter if recipe.model.handoff == "continue" else recipe.adapter
        plans.append(_make_plan(recipe, start, adapter))
        written[recipe.stage] = replace(start, note=f"what stage {recipe.stage} writes", adapter=adapter)
    return plans


def _make_plan(recipe: Recipe, start: Start, adapter: AdapterSection | None) -> Plan:
    data, data_note = count_data(recipe, start.tokenizer)
    on_gpu = bool(gpus())
    parts = trained = memory = shared = None
    if start.config is not None:
        geometry = Geometry.of(start.config)
        parts = parameters(geometry)
        trained = sum(parts.values())
        if adapter is not None:
            trained = adapter_parameters(geometry, adapter.type, adapter.r, adapter.targets)
        memory = memory_bytes(recipe, geometry, trained, adapter is not None, on_gpu)
        shared = share_out(recipe, geometry, trained, adapter is not None)
    steps = count_steps(recipe, data)
    return Plan(recipe, adapter, parts, trained, start.note, data, data_note, steps, memory, on_gpu, shared)


def _start(recipe: Recipe, written: Mapping[str, Start]) -> Start:
    """What `model.from` is, with the changes of `model.config`."""
    start, changes = _found(recipe, written), recipe.model.config
    return replace(start, config={**start.config, **changes}) if start.config and changes else start


def _found(recipe: Recipe, written: Mapping[str, Start]) -> Start:
    """The configuration and tokenizer behind `model.from`; of a stage listed before it, that stage's."""
    source, tokenizer = recipe.model.source, recipe.model.tokenizer
    own_tokenizer = _folder(tokenizer) if tokenizer is not None else None
    if source == "scratch":
        return Start(recipe.model.config, "random weights", own_tokenizer)
    if source.startswith("stage:"):
        name = source.removeprefix("stage:")
        parent = written.get(name) or Start(None, f"what stage {name} writes", None)
        return replace(parent, tokenizer=own_tokenizer or parent.tokenizer)
    folder = _folder(source)
    if folder is not None:
        return Start(_read_config(folder / "config.json"), str(folder), own_tokenizer or folder)
    return Start(*_hub_config(source), own_tokenizer)


def _folder(name: str) -> Path | None:
    """The local folder behind a name; None for a hub id."""
    if name == "tiny":
        from hymba_tune.tiny import tiny_path

        return tiny_path()
    return Path(name) if Path(name).is_dir() else None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"model.from: {path} is missing or no JSON; name a folder that save_pretrained wrote") from None
    if config.get("model_type") != "hymba":
        raise UserError(f"model.from: {path}: model_type is {config.get('model_type')!r}, not 'hymba'; name a Hymba")
    return config


def _hub_config(name: str) -> tuple[Mapping[str, Any] | None, str]:
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return _read_config(Path(cached)), f"hub: {name} (in the local cache)"
    if name in PUBLISHED:
        return PUBLISHED[name], f"hub: {name} (published configuration)"
    return None, f"hub: {name}, not in the local cache, so not counted"


def count_data(recipe: Recipe, tokenizer: Path | None) -> tuple[DataCount | None, str]:
    """Tokens and rows of the mix as the run would make them, or why they are not counted."""
    from hymba_tune.data.mix import load_mix

    mix = load_mix(recipe.data.mix, DATA_KINDS[recipe.method])
    hub = [name for name, source in mix.sources.items() if source.hub]
    if hub:
        return None, f"on the hub, not counted: {', '.join(hub)}"
    if recipe.method == "dpo":
        return None, f"not counted for method {recipe.method}"
    if tokenizer is None:
        return None, "the tokenizer is on the hub, not counted"
    return _count_local(recipe, mix, tokenizer), "counted"


def _count_local(recipe: Recipe, mix: Any, tokenizer_folder: Path) -> DataCount:
    """Tokenise and pack all examples, or SAMPLE evenly spaced ones, as the run does."""
    from hymba_tune.data.chat import load_tokenizer
    from hymba_tune.data.mix import mix_kept_out, realise_mix
    from hymba_tune.data.packing import best_fit_decreasing, encode_example, fitted

    tokenizer = load_tokenizer(tokenizer_folder)
    data = recipe.data
    items = mix_kept_out(mix, data.decontaminate, recipe.eval.data)
    dataset, _ = realise_mix(mix, data.seed, validation=data.validation, limit=data.limit, keep_out=items)
    count = len(dataset)
    step = max(count // SAMPLE, 1)
    looked_at = range(0, count, step)
    lengths: list[int] = []
    supervised = 0
    for index in looked_at:
        document = encode_example(tokenizer, json.loads(dataset[index]["conversation"]))
        for part in fitted(document, recipe.data.max_length, recipe.data.too_long):
            lengths.append(len(part.input_ids))
            supervised += sum(part.loss_mask)
    packed = recipe.data.packing == "bfd"
    rows = len(best_fit_decreasing(lengths, recipe.data.max_length) if packed else lengths)
    scale = count / max(len(looked_at), 1)
    return DataCount(count, round(sum(lengths) * scale), round(supervised * scale), round(rows * scale), step == 1)


def count_steps(recipe: Recipe, data: DataCount | None) -> int | None:
    """Optimizer steps: ceil(rows / rows a step) for each epoch, unless trainer.max_steps says otherwise."""
    options = recipe.trainer_arguments
    if options.get("max_steps", -1) > 0:
        return int(options["max_steps"])
    if data is None:
        return None
    return math.ceil(math.ceil(data.rows / rows_a_step(recipe)) * options.get("num_train_epochs", 3))


def rows_a_step(recipe: Recipe) -> int:
    """The global batch: micro-batch x accumulation x processes."""
    micro = recipe.trainer.per_device_train_batch_size
    return micro * recipe.gradient_accumulation_steps * recipe.launch.processes


def memory_bytes(recipe: Recipe, geometry: Geometry, trained: int, adapted: bool, on_gpu: bool) -> dict[str, int]:
    """Bytes of one process in a training step, without what the allocator and the libraries add.

    weights: 4 a parameter (float32 masters), trained or frozen, adapter included
    bfloat16 copies: 2 a parameter, where the compute dtype is bfloat16
    gradients: 4 a trained parameter
    optimizer: 8 a trained parameter (Adam's two moments; 2 with an 8-bit optimizer)
    activations: tokens of the micro-batch x geometry.activations over the layers, in their dtypes; with gradient
        checkpointing the input of each layer (C, float32) and the K/V that consumers share, and one layer whole
    logits: at most 4096 tokens of the micro-batch x V (at most 32768): once on a GPU, 8.25 times in float32 on a CPU
    """
    options = recipe.trainer_arguments
    total = sum(parameters(geometry).values()) + (trained if adapted else 0)
    narrow_bytes = 2 if recipe.model.dtype == "bfloat16" or (recipe.model.dtype == "auto" and on_gpu) else 4
    layers = [activations(geometry, layer) for layer in range(len(geometry.letters))]
    bytes_of = [4 * wide + narrow_bytes * narrow for wide, narrow in layers]
    a_token = sum(bytes_of)
    if options.get("activation_checkpointing", True):
        shared = geometry.kv_heads * (geometry.head_dim + geometry.value_head_dim) * narrow_bytes
        a_token = len(layers) * (4 * geometry.hidden + shared) + max(bytes_of)
    tokens = recipe.trainer.per_device_train_batch_size * recipe.data.max_length
    logit_bytes = narrow_bytes if on_gpu else 4 * LOGITS_COPIES_ON_CPU
    return {
        "weights": 4 * total,
        "bfloat16 copies": 2 * total if narrow_bytes == 2 else 0,
        "gradients": 4 * trained,
        "optimizer": (2 if "8bit" in str(options.get("optim", "")) else 8) * trained,
        "activations": tokens * a_token,
        "logits": round(min(tokens, LOGITS_TOKENS) * min(geometry.vocab, LOGITS_COLUMNS) * logit_bytes),
    }


def share_out(recipe: Recipe, geometry: Geometry, trained: int, adapted: bool) -> Shared:
    """What DeepSpeed would make of the recipe on its processes; on a machine's eight GPUs where it names one."""
    processes = recipe.launch.processes if recipe.launch.processes > 1 else 8
    total = sum(parameters(geometry).values()) + (trained if adapted else 0)
    memory = memory_bytes(recipe, geometry, trained, adapted, on_gpu=True)
    states = zero_states(total, trained, largest_layer(geometry), processes)
    return Shared(processes, states, memory["activations"], memory["logits"])


def seconds(plan: Plan, tokens_per_second: float) -> float | None:
    """Of training, at so many tokens a second over all processes; None where the steps are not known.

    A row counts as full where the mix was not counted.
    """
    if plan.steps is None:
        return None
    a_row = plan.data.tokens / plan.data.rows if plan.data and plan.data.rows else plan.recipe.data.max_length
    return plan.steps * rows_a_step(plan.recipe) * a_row / tokens_per_second


def measured_rate(recipe: Recipe) -> float | None:
    """Tokens a second of the run that is in output.dir, if there is one."""
    try:
        last = json.loads((Path(recipe.output.dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        return float(last["tokens"] / last["seconds"])
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError):
        return None


def show(plan: Plan, console: Console | None = None, tokens_per_second: float | None = None) -> None:
    """Print a plan. tokens_per_second: over all processes (None: what the run in output.dir measured, if any)."""
    console = console or Console()
    console.print(f"[bold]{escape(plan.recipe.stage)}[/] ({plan.recipe.method}) -> {escape(plan.recipe.output.dir)}\n")
    _print(console, "Settings", _flat(plan.recipe.to_dict()))
    _print(console, "Model", _model_rows(plan))
    _print(console, "Data and steps", _data_rows(plan))
    if plan.memory is not None:
        place = "a GPU" if plan.on_gpu else "the CPU"
        _print(console, f"Memory of one process, estimated for {place}", _memory_rows(plan.memory))
    if plan.shared is not None:
        _print_shared(console, plan.shared)
    rate = tokens_per_second or measured_rate(plan.recipe)
    if rate is not None:
        where = "given" if tokens_per_second else "measured by the run in output.dir"
        _print(console, "Time", [("training", f"{_duration(seconds(plan, rate))} at {rate:,.0f} tokens/s ({where})")])


def _duration(count: float | None) -> str:
    if count is None:
        return "not known before the steps are,"
    minutes = round(count / 60)
    return f"{minutes // 60:,} h {minutes % 60:02} min" if minutes >= 60 else f"{count / 60:.1f} min"


def _print_shared(console: Console, shared: Shared) -> None:
    """A row a stage, GiB."""
    table = Table(box=None, pad_edge=False)
    for name in ("", "weights", "gradients", "optimizer", "activations", "logits", "together", "host memory"):
        table.add_column(name, justify="right" if name else "left")
    for name, part in shared.states.items():
        values = [part.weights, part.gradients, part.optimizer, shared.activations, shared.logits]
        row = [f"{count / GIB:.2f}" for count in (*values, sum(values), part.host)]
        table.add_row(f"  {escape(name)}", *row)
    title = f"GiB of each of {shared.processes} GPUs with DeepSpeed (bfloat16; buffers not counted)"
    console.print(f"[bold]{title}[/]", table, "", sep="\n")


def _print(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        table.add_row(f"  {escape(name)}", escape(value))
    console.print(f"[bold]{title}[/]", table, "", sep="\n")


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """`section.key` and value of every setting, in the recipe's order."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", json.dumps(value) if not isinstance(value, str) else value))
    return rows


def _model_rows(plan: Plan) -> list[tuple[str, str]]:
    if plan.parts is None or plan.trained is None:
        return [("parameters", f"not known: {plan.model_note}")]
    total = sum(plan.parts.values())
    adapter = plan.adapter
    how = f"{adapter.type}, r {adapter.r}" if adapter else "all weights"
    share = plan.trained / (total + plan.trained if adapter else total)
    return [
        ("from", plan.model_note),
        ("parameters", f"{total:,}"),
        *[(f"  {name}", f"{count:,}") for name, count in plan.parts.items()],
        ("trained", f"{plan.trained:,} ({how}; {share:.2%})"),
    ]


def _data_rows(plan: Plan) -> list[tuple[str, str]]:
    recipe, data = plan.recipe, plan.data
    micro, processes = recipe.trainer.per_device_train_batch_size, recipe.launch.processes
    kind: str = DATA_KINDS[recipe.method]
    rows = [(kind, f"not known: {plan.data_note}")]
    if data is not None:
        about = "" if data.exact else "about "
        rows = [
            (kind, f"{data.conversations:,}{'' if data.exact else f' ({SAMPLE:,} looked at)'}"),
            ("tokens", f"{about}{data.tokens:,}, the loss falls on {about}{data.supervised:,}"),
            ("rows", f"{about}{data.rows:,} of at most {recipe.data.max_length:,} tokens ({recipe.data.packing})"),
        ]
    batch = rows_a_step(recipe)
    many = f"{processes} process{'es' if processes > 1 else ''}"
    product = f"{micro} a device x {recipe.gradient_accumulation_steps} accumulated x {many}"
    return [
        *rows,
        ("rows a step", f"{batch:,} = {product}, at most {batch * recipe.data.max_length:,} tokens"),
        ("steps", f"{plan.steps:,}" if plan.steps is not None else "not known before the data is"),
    ]


def _memory_rows(memory: Mapping[str, int]) -> list[tuple[str, str]]:
    rows = [(name, f"{count / GIB:8.2f} GiB") for name, count in memory.items() if count]
    return [*rows, ("together", f"{sum(memory.values()) / GIB:8.2f} GiB")]

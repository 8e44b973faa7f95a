"""A user's own task as an lm-eval YAML file: its prompts, shots, filters and metrics, our batching and results.

The file is data: `!function`, metrics that lm-eval would fetch as code, and everything else that runs code is refused.
Its rows come from `dataset_path` and `dataset_kwargs` (`json` with `data_files` for local files, which may be relative
to the YAML file). Metrics are those whose value is a mean over items.
"""

from pathlib import Path
from typing import Any

import yaml

from hymba_tune.data.benchmarks import BenchmarkNotFound
from hymba_tune.errors import UserError
from hymba_tune.evaluation.engine import Engine
from hymba_tune.evaluation.harness import Sample, run_tasks
from hymba_tune.evaluation.multiple_choice import likeliest, why_choice
from hymba_tune.evaluation.results import Scores, mean_metric

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
CODE_KEYS = ("class", "unsafe_code", "use_prompt", "custom_dataset", "doc_to_image", "doc_to_audio")
METRICS = {
    "generate_until": ("exact_match",),
    "multiple_choice": ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"),
    "loglikelihood": ("acc",),
}
"""lm-eval's metrics that are means over items, by output_type; the first is the headline where a file names none."""
LOCAL = ("json", "csv", "parquet", "text")
"""What `dataset_path` calls local files; anything else is a hub data set, without which the task is not run."""
_NONE = "none"
"""lm-eval's name of the filter of a task without filters."""

Config = dict[str, Any]


class _NoCode(yaml.SafeLoader):
    """YAML without tags: lm-eval's !function would import a file and run it."""


def _refuse_tag(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    raise UserError(
        f"{node.start_mark.name}:{node.start_mark.line + 1}: {node.tag} runs code, which hymba-tune does not do for an "
        "evaluation; write it as a template, or give the items as a JSONL file with a scorer (FILE.jsonl:SCORER)"
    )


_NoCode.add_multi_constructor("!", _refuse_tag)


def own_config(path: Path) -> Config:
    """The file's configuration, what it includes and what it leaves to defaults filled in.

    Raises UserError for a file that is none, would run code, or has no score an item, with what to change.
    """
    config = _read(path)
    _check(path, config)
    config.setdefault("output_type", "generate_until")
    named = config.get("metric_list") or [{"metric": METRICS[config["output_type"]][0]}]
    config["metric_list"] = [{"higher_is_better": True, **entry, "aggregation": "mean"} for entry in named]
    return config


def headline(config: Config) -> str:
    """The first metric, under the first filter."""
    filters = [entry["name"] for entry in config.get("filter_list") or []]
    return _metric_name(config["metric_list"][0]["metric"], filters[0] if filters else _NONE)


def own_lm_eval_rows(path: Path, config: Config) -> dict[str, Any]:
    """{config, splits}: the task and every row of the splits it names.

    Raises BenchmarkNotFound for a data set that is not there, UserError for local files that cannot be read.
    """
    names = list(dict.fromkeys(config[key] for key in SPLITS if config.get(key)))
    return {"config": config, "splits": {name: _load_split(path, config, name) for name in names}}


def _read(path: Path, seen: tuple[Path, ...] = ()) -> Config:
    """The file's values, what it includes filled in, local data files as absolute paths."""
    try:
        with path.open(encoding="utf-8") as file:
            config = yaml.load(file, _NoCode)  # a SafeLoader
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({str(error).splitlines()[0]}); repair it") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: no lm-eval task (keys and values are needed)")
    _with_absolute_files(config, path.parent)
    base = config.pop("include", None)
    if base is None:
        return config
    included = path.parent / str(base)
    if included in seen:
        raise UserError(f"{path}: include: {base} includes this file; end the circle")
    return _read(included, (*seen, path)) | config


def _with_absolute_files(config: Config, folder: Path) -> None:
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(files, str):
        config["dataset_kwargs"]["data_files"] = _absolute(files, folder)
    elif isinstance(files, list):
        config["dataset_kwargs"]["data_files"] = [_absolute(str(one), folder) for one in files]
    elif isinstance(files, dict):
        for split, names in files.items():
            several = names if isinstance(names, list) else [names]
            files[split] = [_absolute(str(name), folder) for name in several]


def _absolute(name: str, folder: Path) -> str:
    return name if "://" in name else str((folder / name).absolute())


def _check(path: Path, config: Config) -> None:
    if config.get("group") or not isinstance(config.get("task"), str):
        raise UserError(f"{path}: task: needs the name of one task; give the files of a group one by one")
    found = [key for key in CODE_KEYS if config.get(key)]
    if found or "trust_remote_code" in (config.get("dataset_kwargs") or {}):
        raise UserError(f"{path}: {found[0] if found else 'dataset_kwargs.trust_remote_code'}: runs code; take it out")
    if not (config.get("test_split") or config.get("validation_split")):
        raise UserError(f"{path}: test_split: missing; name the split to score")
    if not config.get("dataset_path"):
        raise UserError(f"{path}: dataset_path: missing; json with dataset_kwargs.data_files reads local files")
    output = config.get("output_type", "generate_until")
    if output not in METRICS:
        raise UserError(f"{path}: output_type: {output}: only {', '.join(METRICS)} have a score an item")
    for entry in config.get("metric_list") or []:
        name = entry.get("metric") if isinstance(entry, dict) else entry
        if name not in METRICS[output] or entry.get("aggregation", "mean") != "mean":
            raise UserError(
                f"{path}: metric_list: {name}: only means over items are reported; of {output}: "
                f"{', '.join(METRICS[output])}"
            )


def _load_split(path: Path, config: Config, name: str) -> list[Config]:
    import datasets

    options = {key: value for key, value in (config.get("dataset_kwargs") or {}).items() if value is not None}
    try:
        found = datasets.load_dataset(config["dataset_path"], config.get("dataset_name"), split=name, **options)
    except Exception as error:  # the hub client raises its own errors, its HTTP library's and the system's
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problem = UserError if config["dataset_path"] in LOCAL else BenchmarkNotFound
        raise problem(f"{path}: split {name} of {config['dataset_path']} cannot be loaded ({reason})") from None
    return [dict(row) for row in found]


def run_own_lm_eval(name: str, engine: Engine, rows: dict[str, Any], limit: int | None) -> Scores:
    """The first `limit` rows of the task's test split, or its validation split where it has no test split."""
    config, splits = rows["config"], rows["splits"]
    scored = config.get("test_split") or config["validation_split"]
    config = {key: value for key, value in config.items() if key not in ("dataset_kwargs", "tag")}
    try:
        samples = run_tasks(engine, {name: (config, splits | {scored: splits[scored][:limit]})})[name]
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise UserError(f"{name}: lm-eval cannot run this task ({type(error).__name__}: {error})") from error
    items = [_item(name, sample) for sample in samples]
    metrics = list(dict.fromkeys(metric for item in items for metric in item["verdict"]))
    return Scores({metric: mean_metric([item["verdict"][metric] for item in items]) for metric in metrics}, items)


def _item(name: str, sample: Sample) -> Config:
    scores = {
        _metric_name(metric, filter_name): float(value)
        for filter_name, found in sample.scores.items()
        for metric, value in found.items()
    }
    right = next(iter(scores.values())) > 0
    extracted: Any
    if sample.continuations:
        answer, extracted = likeliest(sample.continuations, sample.responses)
        why = why_choice(extracted, right)
    else:
        answer, extracted = sample.responses[0], {name: found[0] for name, found in sample.filtered.items()}
        why = "right" if right else "not the target"
    return {
        "id": f"{name}/{sample.doc_id}",
        "prompt_sha256": sample.prompt_sha256,
        "prompt": sample.question,
        "answer": answer,
        "extracted": extracted,
        "target": sample.target,
        "verdict": scores,
        "why": why,
        "finish_reason": sample.finish_reason,
        "dropped_prompt_tokens": sample.dropped_prompt_tokens,
    }


def _metric_name(metric: str, filter_name: str) -> str:
    return metric if filter_name == _NONE else f"{metric}_{filter_name.replace('-', '_')}"

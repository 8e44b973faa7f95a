"""The command line: parses, delegates. Heavy imports stand inside the commands: --help and refusals are instant.

Exit codes: 0 done, 1 a bug of ours, 2 something the user can fix, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from hymba_tune import __version__
from hymba_tune.errors import UserError

app = typer.Typer(
    name="hymba-tune",
    help="Post-train NVIDIA's Hymba: one recipe from data to weights to scores.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

data_app = typer.Typer(help="Look at training data before it trains anything.", no_args_is_help=True)
app.add_typer(data_app, name="data")

launch_app = typer.Typer(help="Write a script that runs a recipe on several machines.", no_args_is_help=True)
app.add_typer(launch_app, name="launch")

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, as in recipes/sft1.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings over the recipe's: trainer.max_steps=10")
]
MixFile = Annotated[str, typer.Argument(metavar="MIX", help="A mix file, or the name of one in data_mixes/: sft1_tiny")]
Tokenizer = Annotated[str, typer.Option(help="A folder, run or hub id with a tokenizer, or tiny.")]
Tiny = Annotated[bool, typer.Option("--tiny", help="Lay the recipe's `tiny` section on top: embedded model and data.")]

LaunchConfig = Annotated[
    str | None, typer.Option(help="As launch.config; else the recipe's, or multinode_zero2 where that is single.")
]
Variables = Annotated[
    list[str] | None, typer.Option("--env", metavar="NAME", help="Write this variable's value into the script.")
]


def main() -> None:
    """Entry point of the `hymba-tune` command."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments)
    except UserError as error:
        if debug:
            raise
        print(f"hymba-tune: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if debug:
            raise
        print(f"hymba-tune: unexpected {type(error).__name__}: {error}", file=sys.stderr)
        print("This is a bug; the same command with --debug shows where.", file=sys.stderr)
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"hymba-tune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    """Options before the command; --debug is also taken after it (see main)."""


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    tiny: Tiny = False,
    start: Annotated[str | None, typer.Option("--from", help="Run this stage and what depends on it anew.")] = None,
    only: Annotated[str | None, typer.Option(help="Run no other stage.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Run everything anew, whatever the directory holds.")] = False,
) -> None:
    """Run a recipe or a pipeline: data, training, scores, report. The same command again goes on where it was cut."""
    from hymba_tune.hub import check_hub
    from hymba_tune.pipeline import load_pipeline, run_pipeline

    loaded = load_pipeline(recipe, overrides or (), tiny)
    for stage in loaded.stages:
        check_hub({"model.from": stage.model.source, "model.tokenizer": stage.model.tokenizer})
    try:
        run_pipeline(loaded, start=start, only=only, force=force)
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    tiny: Tiny = False,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Over all processes, for the time; else what the last run measured.")
    ] = None,
) -> None:
    """Say what a run would do: settings, parameters, tokens, steps, memory and time. Loads no weights."""
    from hymba_tune.pipeline import load_pipeline
    from hymba_tune.plan import make_plans, show

    for stage in make_plans(load_pipeline(recipe, overrides or (), tiny).stages):
        show(stage, tokens_per_second=tokens_per_second)


@app.command(name="eval")
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint, adapter or run folder, hub id, or tiny.")
    ],
    tasks: Annotated[list[str] | None, typer.Argument(metavar="TASK", help="The same as --suite TASK.")] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="paper, rolebench, tiny; a task: gsm8k; a file: FILE.jsonl:SCORER, FILE.yaml. Repeatable."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many items of each task.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with benchmark files, where there is no hub.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the results go (runs/eval/MODEL).")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share the work, one a GPU.")] = 1,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of a batch: for speed and memory, not answers.")
    ] = 16_384,
) -> None:
    """Score weights on benchmarks, outside a run. Answers already given are not asked for again."""
    from hymba_tune.hub import check_hub

    check_hub({"MODEL": model})
    from hymba_tune.evaluate import evaluate

    wanted = [*(suite or ()), *(tasks or ())]
    if not wanted:
        raise UserError("eval: nothing to score; add --suite paper, or another suite, task or file")
    folder = out or Path("runs/eval") / Path(model).name
    evaluate(
        model,
        wanted,
        folder,
        limit=limit,
        data=data,
        max_new_tokens=max_new_tokens,
        batch_tokens=batch_tokens,
        processes=processes,
    )


@app.command()
def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_ADAPTER", help="A checkpoint, adapter or run folder, hub id, or tiny.")
    ],
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    tools: Annotated[Path | None, typer.Option(metavar="FILE.json", help="A list of tool definitions.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token always.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.001, max=1, help="Draw from the likeliest tokens of this share.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from so many likeliest tokens; 0 from all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(min=0.001, help="Above 1 repeats less.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 1024,
    seed: Annotated[int | None, typer.Option(help="The same answers again, with a temperature.")] = None,
) -> None:
    """Talk to a model. In a pipe, each line of standard input is a prompt of one conversation."""
    from hymba_tune.hub import check_hub

    check_hub({"MODEL_OR_ADAPTER": model})
    from hymba_tune.chat import Sampling, chat

    try:
        chat(model, Sampling(temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed), system, tools)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:  # the reader of a pipe has left; Python would complain once more when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None


@app.command()
def merge(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="An adapter or run folder; a stack is folded in in its order.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.")],
    base: Annotated[str | None, typer.Option(help="The base, where it is not where the adapter says.")] = None,
) -> None:
    """Fold an adapter into its base: a float32 checkpoint that stands alone."""
    from hymba_tune.hub import check_hub

    check_hub({"ADAPTER": adapter, "--base": base})
    from hymba_tune.export import merge

    weights = merge(adapter, out, base)
    print("\n  + ".join([weights.base, *map(str, weights.adapters)]), f"-> {out}", sep="\n  ")


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint, adapter or run folder, hub id, or tiny.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.")],
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of the weights.")] = "bfloat16",
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Upload it to the hub, too.")] = None,
) -> None:
    """Write a checkpoint for others: official names, tokenizer, chat template, model card. Adapters are folded in."""
    from hymba_tune.hub import check_hub, check_upload

    if push is not None:
        check_upload(push)
    check_hub({"MODEL": model})
    from hymba_tune.export import export

    export(model, out, dtype, push)
    print(out if push is None else f"{out}\nhttps://huggingface.co/{push}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories or pipelines, finished or not.")],
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the comparison of several as a page.")
    ] = None,
) -> None:
    """Write the report of runs anew, from their files; several are compared, each with the first."""
    from hymba_tune.report.compare import compare, write_comparison
    from hymba_tune.report.pipeline import is_pipeline
    from hymba_tune.report.render import rebuild
    from hymba_tune.run_dir import RunDir

    for run in runs:
        if not RunDir(run).recipe.exists() and not is_pipeline(run):
            raise UserError(f"{run}: holds no run (no recipe.yaml); give a run directory, as in runs/sft1")
    if html is not None and len(runs) < 2:
        raise UserError("--html writes a comparison: give two runs or more; a run's own page is its report.html")
    for run in runs:
        print(rebuild(run))
    if len(runs) > 1:
        compare(runs)
    if html is not None:
        print(write_comparison(runs, html))


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, of a run that goes on or is over.")],
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
) -> None:
    """Show a run in the terminal: curves, rate, time left, last answers."""
    from hymba_tune.report.watch import watch

    watch(run, once=once)


@data_app.command(name="preview")
def data_preview(
    mix: MixFile,
    tokenizer: Tokenizer = "tiny",
    rows: Annotated[int, typer.Option(min=1, help="Packed rows, or preference pairs, to show.")] = 3,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens a row, as in data.max_length.")] = 2048,
    seed: Annotated[int, typer.Option(help="As in data.seed.")] = 0,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page instead.")] = None,
) -> None:
    """Show conversations as the model sees them: turns, special tokens, tokens with loss, packing boundaries."""
    from hymba_tune.hub import check_hub

    check_hub({"--tokenizer": tokenizer})
    from hymba_tune.inspection.page import write_preview
    from hymba_tune.inspection.preview import preview_mix
    from hymba_tune.inspection.terminal import show_preview

    preview = preview_mix(mix, tokenizer, rows=rows, max_length=max_length, seed=seed)
    if html is None:
        show_preview(preview)
    else:
        print(write_preview(preview, html))


@data_app.command(name="stats")
def data_stats(
    mix: MixFile,
    tokenizer: Tokenizer = "tiny",
    limit: Annotated[int, typer.Option(min=1, help="Most conversations or pairs to look at.")] = 5000,
    seed: Annotated[int, typer.Option(help="As in data.seed.")] = 0,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page instead.")] = None,
) -> None:
    """Count a mix by source: lengths, turns, tokens, supervised share, languages of code, duplicates."""
    from hymba_tune.hub import check_hub

    check_hub({"--tokenizer": tokenizer})
    from hymba_tune.inspection.page import write_stats
    from hymba_tune.inspection.stats import mix_stats
    from hymba_tune.inspection.terminal import show_stats

    stats = mix_stats(mix, tokenizer, limit=limit, seed=seed)
    if html is None:
        show_stats(stats)
    else:
        print(write_stats(stats, html))


@data_app.command(name="check")
def data_check(
    mix: MixFile,
    data: Annotated[Path | None, typer.Option(help="Folder with benchmark files, where there is no hub.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every overlap as JSON.")] = None,
    seed: Annotated[int, typer.Option(help="As in data.seed.")] = 0,
) -> None:
    """List conversations that repeat a benchmark's test item: by whole texts, and by 13 words in a row."""
    from hymba_tune.hub import check_hub

    check_hub({})
    from hymba_tune.inspection.contamination import check_mix
    from hymba_tune.workers import end_with_parent

    end_with_parent()
    check_mix(mix, data=data, out=out, seed=seed)


@launch_app.command(name="slurm")
def launch_slurm(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="How many.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="Of each node; a process each.")] = 8,
    config: LaunchConfig = None,
    tiny: Tiny = False,
    submit: Annotated[bool, typer.Option("--submit", help="Hand it in with sbatch, too.")] = False,
    partition: Annotated[str | None, typer.Option(help="As sbatch's.")] = None,
    account: Annotated[str | None, typer.Option(help="As sbatch's.")] = None,
    time: Annotated[str | None, typer.Option(help="As sbatch's; at the limit it is queued again and goes on.")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="Of each node (8 a GPU).")] = None,
    option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Any other option of sbatch.")] = None,
    restarts: Annotated[int, typer.Option(min=0, help="How often it is queued again at its time limit.")] = 50,
    env: Variables = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The script (output.dir with .sbatch).")] = None,
) -> None:
    """Write a batch script for SLURM: a launcher a node, a process a GPU, queued again where it was cut."""
    from hymba_tune.cluster import slurm
    from hymba_tune.cluster.job import make_job, write_script

    options = slurm.read_options({"partition": partition, "account": account, "time": time}, option or ())
    sbatch = slurm.find_sbatch() if submit else None
    job = make_job(
        recipe, overrides or (), machines=nodes, processes=gpus, config=config, tiny=tiny, variables=env or ()
    )
    request = slurm.Request(cpus or gpus * slurm.CPUS_A_GPU, restarts, options)
    file = write_script(out or Path(f"{job.output}.sbatch"), slurm.slurm_script(job, request), job)
    print(file)
    print(f"hand it in with: sbatch {file}" if sbatch is None else f"job {slurm.submit(file, sbatch)}")


@launch_app.command(name="hosts")
def launch_hosts(
    recipe: RecipeFile,
    hostfile: Annotated[Path, typer.Option(metavar="FILE", help="A host a line: node1 slots=8.")],
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Of each host whose line says no slots.")] = None,
    config: LaunchConfig = None,
    tiny: Tiny = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where they meet, on the first host.")] = 29500,
    env: Variables = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The script (output.dir with .hosts.sh).")] = None,
) -> None:
    """Write a script that starts a recipe on hosts over ssh, or with pdsh: a launcher a host, a process a GPU."""
    from hymba_tune.cluster.hosts import hosts_script, read_hostfile
    from hymba_tune.cluster.job import make_job, write_script

    hosts = read_hostfile(hostfile, gpus)
    job = make_job(
        recipe,
        overrides or (),
        machines=len(hosts.names),
        processes=hosts.processes,
        config=config,
        tiny=tiny,
        variables=env or (),
    )
    file = (out or Path(f"{job.output}.hosts.sh")).absolute()
    write_script(file, hosts_script(job, hosts, port, file), job)
    print(f"{file}\nstart it with: bash {file}")


@app.command(name="list")
def list_runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the runs are.")] = Path("runs"),
) -> None:
    """List the runs under a folder: stage, state, scores, date."""
    from rich.console import Console

    from hymba_tune.runs import runs_table

    Console().print(runs_table(folder))


@app.command()
def doctor() -> None:
    """Say what this machine has: packages, devices, and which backend each operation takes and why."""
    from hymba_tune.doctor import examine

    if not examine():
        raise typer.Exit(1)


if __name__ == "__main__":
    main()

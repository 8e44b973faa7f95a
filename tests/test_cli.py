"""The command line: instant, clear, and with the right exit code."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hymba_tune import __version__, cli

RECIPE = "stage: one\nmethod: sft\nmodel: {from: tiny}\ndata: {mix: mix.yaml}\n"


def hymba_tune(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hymba_tune.cli", *arguments], capture_output=True, text=True, check=False, cwd=cwd
    )


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "one.yaml").write_text(RECIPE)
    (tmp_path / "mix.yaml").touch()
    return tmp_path


def test_help_lists_the_commands_and_loads_nothing_heavy():
    code = (
        "import sys\nfrom hymba_tune import cli\nsys.argv = ['hymba-tune', '--help']\n"
        "try: cli.main()\nexcept SystemExit as error: assert not error.code\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for command in ("run", "plan", "eval", "report", "watch", "data", "doctor"):
        assert command in shown


def test_version():
    assert hymba_tune("--version").stdout == f"hymba-tune {__version__}\n"


def test_a_mistake_is_one_line_on_stderr_and_code_2(recipe):
    done = hymba_tune("run", "one.yaml", "trainer.learning_rat=1", cwd=recipe)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == ("hymba-tune: command line: trainer.learning_rat: unknown key; did you mean learning_rate?\n")
    assert not (recipe / "runs").exists()


def test_debug_shows_where_a_mistake_was_found(recipe):
    done = hymba_tune("plan", "one.yaml", "x=1", "--debug", cwd=recipe)
    assert "Traceback" in done.stderr
    assert "unknown key" in done.stderr


@pytest.mark.parametrize(
    "arguments", [("run",), ("rum", "one.yaml"), ("run", "one.yaml", "--nonsense"), ("run", "no.yaml")]
)
def test_wrong_usage_is_code_2(arguments, recipe):
    done = hymba_tune(*arguments, cwd=recipe)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_report_of_something_else_is_refused(recipe):
    done = hymba_tune("report", ".", cwd=recipe)
    assert done.returncode == 2
    assert "holds no run (no recipe.yaml); give a run directory" in done.stderr
    assert not (recipe / "report.md").exists()


def test_a_bug_of_ours_is_code_1_without_a_traceback(monkeypatch, capsys, recipe):
    monkeypatch.setattr("hymba_tune.pipeline.load_pipeline", lambda *_: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["hymba-tune", "plan", str(recipe / "one.yaml")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert "unexpected ZeroDivisionError: division by zero" in capsys.readouterr().err


def test_ctrl_c_in_a_run_says_how_to_go_on(monkeypatch, capsys, recipe):
    pipeline = pytest.importorskip("hymba_tune.pipeline")

    def interrupted(*_: object, **__: object) -> None:
        # A shell that starts the tests in the background has them ignore Ctrl-C.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, before)

    monkeypatch.setattr(pipeline, "run_pipeline", interrupted)
    monkeypatch.setattr(sys, "argv", ["hymba-tune", "run", str(recipe / "one.yaml")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130
    assert "stopped; the same command resumes" in capsys.readouterr().err


def test_doctor_names_every_part(capsys, monkeypatch):
    monkeypatch.delenv("HYMBA_TUNE_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["hymba-tune", "doctor"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    shown = capsys.readouterr().out
    for part in (
        "Python",
        "torch",
        "mamba-ssm",
        "HYMBA_TUNE_DATA",
        "not set",
        "selective_scan",
        "reference: available",
    ):
        assert part in shown


def test_doctor_finds_versions_outside_the_supported_range(monkeypatch):
    from hymba_tune import doctor

    monkeypatch.setattr(doctor, "version", lambda name: {"trl": "1.20.0", "peft": None}.get(name, "99"))
    found = {finding.subject: finding for finding in doctor.packages()}
    assert found["trl"].ok is False
    assert found["trl"].found == "1.20.0, but <1.17,>=1.16 is supported"
    assert found["peft"].ok is False
    assert found["peft"].found.startswith("absent, ")
    assert found["torch"].ok is True

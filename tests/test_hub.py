"""An unreachable hub: one message at once, and the local cache still works."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants  # noqa: F401  (it reads the environment once: before these tests change it)
import pytest

from hymba_tune.errors import UserError
from hymba_tune.hub import check_hub

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """No proxy, an empty cache, and a port where nothing listens as the hub; what a test sets is taken back."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", *OFFLINE):
        monkeypatch.setenv(name, "")
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free}")
    monkeypatch.setenv("HF_HOME", str(tmp_path))


def test_a_model_that_cannot_be_had_is_refused():
    with pytest.raises(
        UserError, match=r"model\.from: nobody/nothing is not in the local cache, and the hub at 127.*refused"
    ):
        check_hub({"model.from": "nobody/nothing", "model.tokenizer": None})


def test_offline_mode_named_by_the_user_is_named_in_the_message(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; give a local folder"):
        check_hub({"model.from": "nobody/nothing"})


def test_local_weights_go_on_in_offline_mode(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("some/weights").mkdir(parents=True)
    check_hub({"model.from": "some/weights", "model.tokenizer": "tiny"})
    assert [os.environ[name] for name in OFFLINE] == ["1", "1"]


def test_a_reachable_hub_changes_nothing(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        check_hub({"model.from": "nobody/nothing"})
    assert [os.environ[name] for name in OFFLINE] == ["", ""]


def test_a_run_without_the_hub_ends_at_once_and_writes_nothing(tmp_path):
    (tmp_path / "mix.yaml").touch()
    recipe = "stage: one\nmethod: sft\nmodel: {from: nobody/nothing}\ndata: {mix: mix.yaml}\n"
    (tmp_path / "one.yaml").write_text(recipe)
    done = subprocess.run(
        [sys.executable, "-m", "hymba_tune.cli", "run", "one.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("hymba-tune: model.from: nobody/nothing is not in the local cache")
    assert not (tmp_path / "runs").exists()

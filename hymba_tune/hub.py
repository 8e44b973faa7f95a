"""The Hugging Face hub: whether it can be reached, found out once and at once, and folders sent to it.

Without the check, every file asked for is tried six times over half a minute. Must run before a Hugging Face library is
imported: they read their settings from the environment when they are.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from hymba_tune.errors import UserError
from hymba_tune.paths import is_hub_id

_SECONDS = 5.0


def check_hub(models: Mapping[str, str | None]) -> None:
    """Switch to offline mode if the hub is out of reach; then what is in the local cache still works.

    `models` maps a setting to the weights or tokenizer it names. Raises UserError for a hub id that can be had neither
    from the hub nor from the cache.
    """
    wanted = {field: name for field, name in models.items() if name and is_hub_id(name) and not Path(name).is_dir()}
    why = _out_of_reach()
    if why is None:
        return
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    from huggingface_hub import try_to_load_from_cache

    for field, name in wanted.items():
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            raise UserError(f"{field}: {name} is not in the local cache, and {why}; give a local folder instead")


def check_upload(repository: str) -> None:
    """Raises UserError if a folder can't be sent to `repository` (owner/name): to be known before work is done."""
    if not is_hub_id(repository):
        raise UserError(f"--push: {repository!r} is no place on the hub; give owner/name")
    why = _out_of_reach()
    if why is not None:
        raise UserError(
            f"--push: {repository} can't be reached, {why}; export without --push and upload the folder later"
        )
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError("--push: nobody is logged in to the hub; run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, repository: str) -> None:
    """Send a folder to the hub; a repository that is not there yet is made, and private.

    Raises:
        UserError: the hub refused it, or the connection broke; the folder is untouched.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by hymba-tune")
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--push: {repository}: {reason}; {folder} is whole: `hf upload {repository} {folder}`"
        ) from error


def _out_of_reach() -> str | None:
    """Why the hub can't be asked, None if it can. A proxy is trusted to reach it."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return "HF_HUB_OFFLINE is set"
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return None
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=_SECONDS).close()
    except OSError as error:
        return f"the hub at {endpoint.hostname} can't be reached ({error.strerror or error})"
    return None

"""Which processes run where: an accelerate configuration file, how many processes, on which machines.

The shipped files in accelerate_configs/ say how work is shared out and nothing else; the number of processes comes from
a recipe's `launch` section.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hymba_tune.errors import UserError
from hymba_tune.paths import REPOSITORY
from hymba_tune.yaml_reader import read_yaml

CONFIGS = REPOSITORY / "accelerate_configs"
Kind = Literal["single", "ddp", "deepspeed", "fsdp"]
_KINDS: dict[str, Kind] = {"NO": "single", "MULTI_GPU": "ddp", "DEEPSPEED": "deepspeed", "FSDP": "fsdp"}

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Sharing:
    """How a configuration file shares work out.

    stage: DeepSpeed's ZeRO stage, 0 elsewhere. offload: weights or optimizer lie in the host's memory.
    """

    kind: Kind
    stage: int = 0
    offload: bool = False

    @property
    def spreads_weights(self) -> bool:
        """Whether no process holds all weights."""
        return self.stage == 3 or self.kind == "fsdp"


@dataclass(frozen=True)
class Topology:
    """Where processes run.

    config: an accelerate configuration file.
    processes: over all machines.
    machine: which of the machines this one is; 0 is the one at `address`.
    address, port: where the processes meet; needed with several machines, else a free port of this one.
    """

    config: Path
    processes: int = 1
    machines: int = 1
    machine: int = 0
    address: str | None = None
    port: int | None = None

    def arguments(self) -> list[str]:
        """The options of `accelerate launch`."""
        options: dict[str, object] = {
            "config_file": self.config,
            "num_processes": self.processes,
            "num_machines": self.machines,
            "machine_rank": self.machine,
            "main_process_port": self.port or (free_port() if self.machines == 1 else DEFAULT_PORT),
            "main_process_ip": self.address,
            # accelerate would have DeepSpeed start all machines over ssh; each starts its own ranks here
            "deepspeed_multinode_launcher": "standard" if self.machines > 1 else None,
        }
        return [text for name, value in options.items() if value is not None for text in (f"--{name}", str(value))]


def config_names() -> list[str]:
    """The configurations that ship."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def find_config(name: str) -> Path:
    """The file of a shipped configuration, or a user's own.

    Raises:
        UserError: there is none of that name.
    """
    own = Path(name)
    path = own if own.suffix in (".yaml", ".yml") else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"launch.config: no configuration {name}; use {', '.join(config_names())} or a .yaml file")
    return path.absolute()


def read_sharing(config: Path) -> Sharing:
    """What an accelerate configuration file says of how work is shared out.

    Raises:
        UserError: it is of a kind that can't train Hymba.
    """
    values, _ = read_yaml(config)
    kind = str(values.get("distributed_type", "NO"))
    if kind not in _KINDS:
        raise UserError(f"{config}: distributed_type: {kind}: not supported; use one of {', '.join(_KINDS)}")
    stage: object
    if kind != "DEEPSPEED":
        if kind == "FSDP" and str(_section(values, "fsdp_config").get("fsdp_version")) != "2":
            raise UserError(f"{config}: fsdp_config.fsdp_version: only 2 is supported; see fsdp2.yaml")
        return Sharing(_KINDS[kind])
    section = _section(values, "deepspeed_config")
    settings = section
    if "deepspeed_config_file" in section:
        settings, _ = read_yaml(str(section["deepspeed_config_file"]))
        settings = _section(settings, "zero_optimization")
        offload = [_section(settings, f"offload_{part}").get("device", "none") for part in ("optimizer", "param")]
        stage = settings.get("stage", 0)
    else:
        offload = [settings.get(f"offload_{part}_device", "none") for part in ("optimizer", "param")]
        stage = settings.get("zero_stage", 2)
    return Sharing("deepspeed", int(str(stage)), offload != ["none", "none"])


def _section(values: Mapping[str, object], name: str) -> Mapping[str, object]:
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def free_port() -> int:
    """A port that nobody listens on, on any address of this machine."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port

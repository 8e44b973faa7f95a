"""Commands of a cluster for tests, as files for a PATH: each writes how it was called into $CALLS.

scontrol knows the hosts of $NODES; srun runs its command once a host on this machine and passes TERM on; ssh runs here
what it would run there; `launcher` stands for the Python that runs hymba-tune.
"""

from pathlib import Path

_SCONTROL = """
[[ $1 != show ]] || printf '%s\\n' $NODES
"""

_SRUN = """
while [[ $1 == --* ]]; do shift; done
tasks=()
trap 'kill -TERM "${tasks[@]}"' TERM
for node in $NODES; do
  SLURM_NODEID=${#tasks[@]} "$@" &
  tasks+=($!)
done
worst=0
for task in "${tasks[@]}"; do
  while :; do
    wait "$task"
    code=$?
    kill -0 "$task" 2>/dev/null || break
  done
  ((code <= worst)) || worst=$code
done
exit $worst
"""

_SBATCH = """
[[ -z ${REFUSAL-} ]] || { echo "sbatch: error: $REFUSAL" >&2; exit 1; }
echo 4711
"""

_SSH = """
while [[ $1 == -* ]]; do [[ $1 != -o ]] || shift; shift; done
[[ $1 != "${UNREACHABLE-}" ]] || { echo "ssh: connect to host $1: No route to host" >&2; exit 255; }
shift
exec bash -c "$*"
"""

_LAUNCHER = """
if [[ -n ${HOLD-} ]]; then
  trap 'echo "ended $NODE_RANK" >>"$CALLS"; kill $!; exit 143' TERM
  sleep 60 &
  touch "$HOLD.$NODE_RANK"
  wait $!
fi
exit "${CODE-0}"
"""

_PLACE = 'echo "launcher $NODE_RANK $MASTER_ADDR $MASTER_PORT $(pwd)" "$@"'
_COMMANDS = {"scontrol": _SCONTROL, "srun": _SRUN, "sbatch": _SBATCH, "ssh": _SSH, "launcher": _LAUNCHER}


def write_commands(folder: Path) -> None:
    """Every command into a folder."""
    for name, body in _COMMANDS.items():
        call = _PLACE if name == "launcher" else f'echo "{name} $*"'
        (folder / name).write_text(f'#!/bin/bash\n{call} >>"$CALLS"\n{body}')
        (folder / name).chmod(0o755)

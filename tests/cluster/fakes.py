"""Commands of a cluster for tests, as files for a PATH: each writes how it was called into $CALLS.

scontrol knows the hosts of $NODES; srun runs its command once a host on this machine and passes TERM on; ssh runs here
what it would run there, in a network of the host's own inside `two_networks`; `launcher` stands for the Python that
runs hymba-tune.
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
network=()
[[ -z ${NETWORKS-} ]] || network=(ip netns exec "$1")
shift
exec "${network[@]}" bash -c "$*"
"""

# Two networks of their own, with a cable between; what is called sees neither this machine's nor its loopback.
_TWO_NETWORKS = """
[[ -n ${NETWORKS-} ]] || NETWORKS=1 exec unshare --map-root-user --net --mount "$0" "$@"
set -e
mount -t tmpfs tmpfs /run
for host in $NODES; do ip netns add "$host"; ip -n "$host" link set lo up; done
read -r one two <<<"$NODES"
ip link add cable netns "$one" type veth peer name cable netns "$two"
for host in $NODES; do ip -n "$host" addr add "$host/24" dev cable; ip -n "$host" link set cable up; done
exec "$@"
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
_COMMANDS["two_networks"] = _TWO_NETWORKS


def write_commands(folder: Path) -> None:
    """Every command into a folder."""
    for name, body in _COMMANDS.items():
        call = _PLACE if name == "launcher" else f'echo "{name} $*"'
        (folder / name).write_text(f'#!/bin/bash\n{call} >>"$CALLS"\n{body}')
        (folder / name).chmod(0o755)

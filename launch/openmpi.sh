#!/usr/bin/env bash
# Trains under Open MPI 4 or 5, one process a GPU; mpirun's own arguments come before "--":
#
#   launch/openmpi.sh -np 16 --hostfile hosts -- \
#       --config configs/flex1.py --workdir /shared/runs/flex1 \
#       --config.batch=80 --config.mesh.fsdp=16
#
# MPI starts the processes and tells them who they are; it moves no data. What Open MPI 5 no longer tells
# is where the first one is, so that the hosts are asked before. On SIGTERM to this script all
# of them save and it exits with status 75; give the same command again and the run goes on.
set -euo pipefail

mpi=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
    mpi+=("$1")
    shift
done
if [ $# -eq 0 ]; then
    echo "usage: launch/openmpi.sh MPIRUN_ARGUMENTS -- TRAINING_ARGUMENTS" >&2
    exit 2
fi
shift
first=$(mpirun "${mpi[@]}" bash -c '[ "$OMPI_COMM_WORLD_RANK" != 0 ] || {
    getent hosts "$(hostname)" >/dev/null && hostname || hostname -I | cut -d " " -f 1; }')
export JAX_COORDINATOR_ADDRESS="$first:$((61000 + RANDOM % 4000))"
mpirun -x JAX_COORDINATOR_ADDRESS "${mpi[@]}" python3 -m flexavatar_jax.train --distributed "$@" &
# mpirun kills what hasn't ended a second after SIGTERM; SIGUSR1 it only passes on.
trap 'kill -USR1 $!' TERM
status=0
wait $! || status=$?
while kill -0 $! 2>/dev/null; do  # the signal ended the wait, not the run
    status=0
    wait $! || status=$?
done
exit "$status"

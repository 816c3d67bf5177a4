#!/usr/bin/env bash
# Trains on a Slurm cluster, one process a GPU:
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh \
#       --config configs/flex1.py --workdir /shared/runs/flex1 \
#       --config.batch=80 --config.mesh.fsdp=16
#
# JAX learns from Slurm who the processes are. Before the time limit, or when the job is preempted,
# all of them get SIGTERM, save and exit with status 75, which puts the job back into the queue; where
# a node is lost, --requeue does.
#SBATCH --job-name=flexavatar
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

srun --kill-on-bad-exit=1 python3 -m flexavatar_jax.train --distributed "$@"
status=$?
if [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

#!/usr/bin/env bash
# Prepares a data set on many machines of a Slurm cluster, here in 64 parts:
#
#   parts=$(sbatch --parsable --array=1-64 launch/prepare_slurm.sh \
#       nersemble --source /data/nersemble --out /shared/prepared)
#   sbatch --dependency="afterok:$parts" launch/prepare_slurm.sh \
#       nersemble --source /data/nersemble --out /shared/prepared
#
# The second job finishes the folder when all parts are written. A part that is killed or preempted
# is queued again and goes on; so does one that ends with status 1 (a full disk, a network).
#SBATCH --job-name=prepare
#SBATCH --cpus-per-task=16
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

part=()
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    part=(--part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT")
fi
python3 -m data_pipelines.prepare "$@" --workers "${SLURM_CPUS_PER_TASK:-1}" "${part[@]}"
status=$?
if [ "$status" -eq 1 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

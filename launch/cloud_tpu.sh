#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU VM slice, which a queued resource waits for:
#
#   gcloud compute tpus queued-resources create flex1 --node-id=flex1 --zone=us-west4-a --spot \
#       --accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite
#   gcloud compute tpus queued-resources describe flex1 --zone=us-west4-a    # until it is ACTIVE
#   launch/cloud_tpu.sh flex1 us-west4-a \
#       --config configs/flex1.py --workdir gs://BUCKET/flex1 --config.batch=256
#
# The first call clones the repository in $REPOSITORY on every host and installs the package; where it
# was cut short, the next one finishes. Images of Ubuntu 22.04 come with Python 3.10: for a newer one,
# install it on every host and name it in $PYTHON (by default python3). A TPU knows its own hosts.
# A slice that was taken away is SUSPENDED, and nothing brings it back: delete it (gcloud compute tpus
# queued-resources delete flex1 --zone=us-west4-a --force), create it again and give the same command.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "usage: launch/cloud_tpu.sh TPU_NAME ZONE TRAINING_ARGUMENTS" >&2
    exit 2
fi
name=$1 zone=$2
shift 2
repository=$(printf %q "${REPOSITORY:-}") python=$(printf %q "${PYTHON:-python3}")
# venv/installed is written last: what was cut short is done again.
install="[ -f venv/installed ] || {
    $python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo 'error: $python on the hosts is older than Python 3.11; install a newer one there and name it in PYTHON' >&2
        exit 2
    }
    [ -d flexavatar-jax ] || {
        [ -n $repository ] || { echo 'set REPOSITORY to the git URL to install from' >&2; exit 2; }
        rm -rf unfinished && git clone $repository unfinished && mv unfinished flexavatar-jax
    } && rm -rf venv && $python -m venv venv && venv/bin/pip install -q -e 'flexavatar-jax[tpu]' && touch venv/installed
}"
train="cd flexavatar-jax && ../venv/bin/python -m flexavatar_jax.train --distributed$(printf ' %q' "$@")"
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
    --command="{ $install; } && $train"

#!/usr/bin/env bash
# A night's work as a Slurm job, to be submitted by cron or scrontab:
#   0 20 * * *  sbatch /lab/nightly.sh
# CHANGE what is yours below. One at a time: a second one waits for the first, and a driver that is at work is never joined.
#SBATCH --job-name=nrrn-nightly
#SBATCH --dependency=singleton
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=11:00:00
#SBATCH --output=nrrn-nightly-%j.log
set -euo pipefail
SRC=${SRC:-s3://lab/raw.zarr}          # CHANGE
DST=${DST:-s3://lab/clean.zarr}        # CHANGE
WEIGHTS=${WEIGHTS:-s3://lab/lab.safetensors}  # CHANGE
PYTHON=${PYTHON:-python3}              # CHANGE: the Python that nrrn is installed for
HERE=${HERE:-/lab}                     # CHANGE: where nightly.py is; Slurm runs a copy of this script elsewhere
exec "$PYTHON" "$HERE/nightly.py" "$SRC" "$DST" "$WEIGHTS" "$@"

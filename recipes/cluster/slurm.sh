#!/usr/bin/env bash
#SBATCH --job-name=tessy
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
# One task of an array writes one shard of the prompts:
#   sbatch --array=0-7 slurm.sh RECIPE PROMPTS FOLDER [SHARDS]
# RECIPE, PROMPTS and FOLDER are on storage that all nodes see. The journal is on the node's own disk, where SQLite is
# safe; finished rows go to FOLDER/parts, so that a task that is requeued elsewhere repeats none of them. To run some
# tasks again, name the number of shards of the first run: sbatch --array=3,5 slurm.sh RECIPE PROMPTS FOLDER 8
set -euo pipefail
recipe=$1 prompts=$2 folder=$3 shards=${4:-$SLURM_ARRAY_TASK_COUNT}
journals=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/tessy-journals
exec tessy synthesize "$recipe" "$prompts" --shard "$SLURM_ARRAY_TASK_ID/$shards" \
  --set "parts=$folder/parts" --set "journal=$journals/$SLURM_ARRAY_JOB_ID-$SLURM_ARRAY_TASK_ID.journal"

#!/usr/bin/env bash
#SBATCH --job-name=hybrid-jax
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@600
# One process a node, which drives all of its GPUs, or one a GPU (--ntasks-per-node=GPUS_OF_A_NODE).
# Submit it from the repository's folder, which all nodes see, as they see the run's directory:
#
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 --time=24:00:00 \
#     scripts/launch/slurm.sh train --preset P --data TEXT --out RUN --mesh fsdp=32
#
# `bash scripts/launch/slurm.sh --dry-run train ...` prints what srun would run, here or anywhere.
# Ten minutes before the time is up, and when the job is preempted, Slurm asks the processes to stop
# (--signal without B:, and GraceTime: https://slurm.schedmd.com/sbatch.html and preempt.html); they
# leave a checkpoint and end with exit code 75, as they do when a step hangs. The job is then queued
# again, and the run is resumed.
set -euo pipefail

# EX_TEMPFAIL: the run ended so that it should be started again.
START_AGAIN=75

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

dry_run=''
if [ "${1:-}" = --dry-run ]; then
  dry_run=yes
  shift
fi
if [ "${1:-}" = -- ]; then shift; fi
if [ $# -eq 0 ]; then
  die "there is nothing to run; name it: slurm.sh train --preset P --data TEXT --out RUN --mesh fsdp=8"
fi
if [ -z "$dry_run" ] && [ -z "${SLURM_JOB_ID:-}" ]; then
  die "this is no Slurm job; submit it with sbatch, or look at it with --dry-run."
fi
# sbatch runs a copy from its own folder, so this file's place says nothing.
if [ ! -f scripts/launch/resume.sh ]; then
  die "there is no scripts/launch/resume.sh in $PWD; submit from the repository's folder."
fi

# Only what is set here, for --dry-run to show.
environment=()
if [ -x .venv/bin/hybrid-jax ]; then environment+=("PATH=$PWD/.venv/bin:$PATH"); fi
# srun does not take this from sbatch (since Slurm 22.05), and without it binds a task to one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
  environment+=("SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK")
fi
# One that fails ends the others, which would wait for it: by itself within a minute, by srun after
# ten. Not at once: the first process to end with 75 would have srun kill those that still write.
step=(srun --kill-on-bad-exit=0 --wait=600)
gpus=${SLURM_GPUS_ON_NODE:-0} tasks=${SLURM_NTASKS_PER_NODE:-1}
if [ "$gpus" -gt 0 ] && [ "$tasks" -ne 1 ] && [ "$tasks" -ne "$gpus" ]; then
  die "$tasks tasks for the $gpus GPUs of a node; set --ntasks-per-node to 1 or $gpus."
fi
step+=(sh scripts/launch/resume.sh "$@")

if [ -n "$dry_run" ]; then
  printf '%q ' env "${environment[@]}" "${step[@]}"
  printf '\n'
  echo "# and if that ends with exit code $START_AGAIN: scontrol requeue JOB, which resumes the run"
  exit 0
fi
status=0
env "${environment[@]}" "${step[@]}" || status=$?
if [ "$status" -eq "$START_AGAIN" ]; then
  echo "The run ended to be continued; the job is queued again and will resume it."
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

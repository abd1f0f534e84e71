#!/usr/bin/env bash
# Multi-node training under Slurm; the arguments of the script are those of diffdiscover3d.train:
#
#   sbatch examples/launch/slurm.sh diffusion --preset paper --dataset /shared/scans --batch-size 16 \
#       --output-dir /shared/out/diffusion
#
# A job that is requeued or submitted again resumes the training. The tests run this file with replacements for srun and
# scontrol, because Slurm may be unavailable.
#SBATCH --job-name=diffdiscover3d
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
gpus=${SLURM_GPUS_ON_NODE:-8}
main=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Slurm runs a copy of this file, so the config is located relative to the submission folder
config=${LAUNCH_CONFIG:-${SLURM_SUBMIT_DIR:-.}/examples/launch/multi_node.yaml}
export launch="accelerate launch --config_file $config --num_machines $SLURM_NNODES \
    --num_processes $((SLURM_NNODES * gpus)) --main_process_ip $main --main_process_port ${MAIN_PORT:-29500}"

# single quotes, so that the rank is expanded on each machine
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '$launch --machine_rank "$SLURM_NODEID" -m diffdiscover3d.train "$@"' bash "$@" \
    --resume latest

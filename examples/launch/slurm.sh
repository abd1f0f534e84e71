#!/usr/bin/env bash
# Training on several machines under Slurm; what follows the script are the arguments of diffdiscover3d.train:
#
#   sbatch examples/launch/slurm.sh diffusion --preset paper --dataset /shared/scans --batch-size 16 \
#       --output-dir /shared/out/diffusion
#
# A job that is requeued or submitted again goes on where it stopped. The tests run this file with stand-ins for srun
# and scontrol, since they cannot count on Slurm.
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
# Slurm runs a copy of this file: what lies beside it is found from the folder the job was submitted from
config=${LAUNCH_CONFIG:-${SLURM_SUBMIT_DIR:-.}/examples/launch/multi_node.yaml}
export launch="accelerate launch --config_file $config --num_machines $SLURM_NNODES \
    --num_processes $((SLURM_NNODES * gpus)) --main_process_ip $main --main_process_port ${MAIN_PORT:-29500}"

# single quotes: the rank is that of the machine the line runs on
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '$launch --machine_rank "$SLURM_NODEID" -m diffdiscover3d.train "$@"' bash "$@" \
    --resume latest

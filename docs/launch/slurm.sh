#!/bin/bash
# LMIM pre-training on Slurm: sbatch docs/launch/slurm.sh. Change nodes, GPUs, time and paths to yours.
#
# Five minutes before the time limit Slurm sends USR1 to this script. It stops the run, which saves a
# checkpoint, and puts the job back into the queue: the next start continues from that checkpoint. After a
# node failure Slurm requeues the job itself. A process that dies is restarted by torchrun.
#SBATCH --job-name=lmim
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=128
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -euo pipefail

# Read by torchrun itself: without it a restart can hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Seconds that torchrun gives its processes to save (30 in versions that do not read it).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first_node=${nodes%%$'\n'*}

# One torchrun a node. The id differs in every start of the job, so that none meets what another one left.
srun torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node=8 --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$first_node:29500" \
    --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    -m lmim_fast.pretrain --data /data/union14m-u --teacher runs/mae --output runs/lmim &
step=$!

stopped=no
stop() {
    stopped=yes
    kill -TERM "$step" || true # srun passes it to torchrun, torchrun to the processes
}
trap stop USR1

# A signal ends `wait`, so it is called until the step has ended.
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do
    status=0
    wait "$step" || status=$?
done

if [ "$stopped" = yes ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"

#!/bin/sh
# ImageNet on several machines under Slurm, ResNet34 -> ResNet18 by CTKD:
#   sbatch --nodes=2 scripts/slurm_imagenet.sh --model_t ResNet34 --teacher_weights torchvision
# Data: IMAGENET_DIR, the same path on every machine; the repository and its .venv are on a disk that all of them share.
# Teacher: torchvision's weights, which the first machine downloads, or a file of your own: --path-t FILE.
# A killed worker is restarted up to three times. Two minutes before the job's time limit, the training saves its state
# within the epoch and ends, and the job is queued again. scancel ends it for good.
#SBATCH --job-name=distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a new store after each restart: the old one's addresses are stale
asked=
trap 'asked=yes; scancel --signal=TERM "$SLURM_JOB_ID.0"' USR1  # the first step's processes: srun itself would kill them

srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${PYTHON:-.venv/bin/python}" -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-8}" --max-restarts=3 \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$first:29400" \
    train_student.py --model_s ResNet18 --dataset imagenet --num_workers 8 \
    --distill kd -r 1 -a 1 -b 0 --temperature ctkd-global --lambda_epochs 5 \
    --epochs 120 --batch_size 256 --learning_rate 0.1 --lr_decay_epochs 30,60,90 --weight_decay 1e-4 "$@" &
job=$!
wait "$job"
status=$?
if [ -n "$asked" ]; then
    wait "$job"  # the signal has ended the first one
    status=$?
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

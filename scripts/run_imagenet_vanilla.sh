#!/bin/sh
# ImageNet: trains a network alone, SGD 0.1, batch 256, 120 epochs (CTKD's protocol).
# Published: ResNet18 70.26, ResNet34 73.96 (top-1); torchvision's own are 69.75 and 73.31, without training.
# Data: --data_dir DIR or IMAGENET_DIR=DIR, the folder that holds train/<class> and val/<class>.
# All GPUs of the machine share each batch; --gpu_id 0,1 takes those. Several machines: scripts/slurm_imagenet.sh.
# Later flags win:
#   mdistiller's protocol    --epochs 100 --batch_size 512 --learning_rate 0.2
. "$(dirname "$0")/env.sh"

exec "$python" train_teacher.py --model ResNet18 --dataset imagenet --multiprocessing-distributed --num_workers 8 \
    --epochs 120 --batch_size 256 --learning_rate 0.1 --lr_decay_epochs 30,60,90 --lr_decay_rate 0.1 \
    --weight_decay 1e-4 --momentum 0.9 "$@"

#!/bin/sh
# ImageNet, a network alone, 120 epochs, batch 256: not available yet. Says so, and ends with status 2.
. "$(dirname "$0")/env.sh"

exec "$python" train_teacher.py --model ResNet18 --dataset imagenet --epochs 120 --batch_size 256 --learning_rate 0.1 \
    --lr_decay_epochs 30,60,90 --weight_decay 1e-4 "$@"

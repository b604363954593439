#!/bin/sh
# CIFAR-100: trains a network alone, 240 epochs, SGD 0.05, batch 64 (RepDistiller's protocol, which CTKD shares).
# Published: resnet56 72.34, resnet110 74.31, resnet20 69.06, wrn_40_2 75.61, vgg13 74.64 (top-1).
# Data: --data_dir DIR or CIFAR100_DIR=DIR, the folder that holds cifar-100-python/. Another network: --model NAME.
. "$(dirname "$0")/env.sh"

exec "$python" train_teacher.py --model resnet56 --dataset cifar100 \
    --epochs 240 --batch_size 64 --learning_rate 0.05 --lr_decay_epochs 150,180,210 --lr_decay_rate 0.1 \
    --weight_decay 5e-4 --momentum 0.9 "$@"

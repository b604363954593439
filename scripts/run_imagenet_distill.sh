#!/bin/sh
# ImageNet, ResNet34 -> ResNet18 by CTKD, 120 epochs, batch 256: not available yet. Says so, and ends with status 2.
. "$(dirname "$0")/env.sh"

exec "$python" train_student.py --model_t ResNet34 --model_s ResNet18 --dataset imagenet --distill kd -r 1 -a 1 -b 0 \
    --epochs 120 --batch_size 256 --learning_rate 0.1 --lr_decay_epochs 30,60,90 --weight_decay 1e-4 \
    --have_mlp 1 --mlp_name global --cosine_decay 1 --decay_max 0 --decay_min -1 --decay_loops 5 "$@"

#!/bin/sh
# ImageNet, ResNet34 -> ResNet18 by CTKD, 120 epochs, batch 256: not available yet. Says so, and ends with status 2.
# The published weights of the other methods here (kd_T 4 without CTKD; later flags win):
#   PKT   --distill pkt -b 30000     SP    --distill sp -b 3000     VID   --distill vid -b 1
#   CRD   --distill crd -b 0.8       SRRL  --distill srrl -b 1
#   DKD   --distill dkd -r 1 -a 0 -b 1 --dkd_alpha 1 --dkd_beta 1
. "$(dirname "$0")/env.sh"

exec "$python" train_student.py --model_t ResNet34 --model_s ResNet18 --dataset imagenet --distill kd -r 1 -a 1 -b 0 \
    --epochs 120 --batch_size 256 --learning_rate 0.1 --lr_decay_epochs 30,60,90 --weight_decay 1e-4 \
    --have_mlp 1 --mlp_name global --cosine_decay 1 --decay_max 0 --decay_min -1 --decay_loops 5 "$@"

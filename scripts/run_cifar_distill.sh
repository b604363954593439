#!/bin/sh
# CIFAR-100: resnet56 -> resnet20 by KD with CTKD's global temperature, with the published flags.
# Published: resnet20 alone 69.06, KD 70.66, CTKD 71.19 (top-1; last or best epoch is not stated).
# Data: --data_dir DIR or CIFAR100_DIR=DIR, the folder that holds cifar-100-python/.
# Teacher: sh scripts/run_cifar_vanilla.sh trains it; --train_teacher does so here where it is missing.
# Later flags win, so these give the other rows:
#   KD, fixed temperature       --have_mlp 0 --experiments_name kd
#   CTKD, instance-wise         --mlp_name instance --experiments_name ctkd-instance
#   another pair                --path-t save/models/wrn_40_2_vanilla/ckpt_epoch_240.pth --model_s wrn_16_2
. "$(dirname "$0")/env.sh"

exec "$python" train_student.py --path-t ./save/models/resnet56_vanilla/ckpt_epoch_240.pth \
    --distill kd --model_s resnet20 -r 0.1 -a 0.9 -b 0 --kd_T 4 \
    --batch_size 64 --learning_rate 0.05 \
    --have_mlp 1 --mlp_name global --t_start 1 --t_end 20 \
    --cosine_decay 1 --decay_max 0 --decay_min -1 --decay_loops 10 \
    --save_model --experiments_name fold-1 "$@"

#!/bin/sh
# ImageNet: ResNet34 -> ResNet18 with CTKD's global temperature, 120 epochs, batch 256 (CTKD's protocol).
# Published: ResNet18 alone 70.26, KD 70.83, CTKD 71.32 (top-1), from a teacher with 73.96.
# Data: --data_dir DIR or IMAGENET_DIR=DIR, the folder that holds train/<class> and val/<class>.
# Teacher: torchvision's weights (73.31), downloaded once; a file of your own: TEACHER=FILE.
# All GPUs of the machine share each batch; --gpu_id 0,1 takes those. Several machines: scripts/slurm_imagenet.sh.
# Later flags win, so these give the other rows. With CTKD's global temperature:
#   PKT    --distill pkt --experiments_name pkt+ctkd      -b 30000
#   SP     --distill sp --experiments_name sp+ctkd        -b 3000
#   VID    --distill vid --experiments_name vid+ctkd      -b 1
#   CRD    --distill crd --experiments_name crd+ctkd      -b 0.8
#   RKD    --distill rkd --experiments_name rkd+ctkd      -b 1
#   SRRL   --distill srrl --experiments_name srrl+ctkd    -b 1
#   DKD    --distill dkd --experiments_name dkd+ctkd      -r 1 -a 0 -b 1 --dkd_alpha 1 --dkd_beta 1
# With a fixed temperature of 4:
#   KD     --have_mlp 0 --experiments_name kd
#   RKD    --have_mlp 0 --distill rkd --experiments_name rkd    -b 1
# mdistiller's protocol, 100 epochs, batch 512, tau 1:
#   KD     --have_mlp 0 --experiments_name kd-mdistiller -r 0.5 -a 0.5 --kd_T 1 --epochs 100 --batch_size 512 \
#          --learning_rate 0.2
#   DKD    --have_mlp 0 --distill dkd --experiments_name dkd-mdistiller -r 1 -a 0 -b 1 --dkd_alpha 1 --dkd_beta 0.5 \
#          --dkd_warmup 1 --kd_T 1 --epochs 100 --batch_size 512 --learning_rate 0.2
#   ResNet50 -> MobileNetV1    --model_t ResNet50 --model_s MobileNetV1_Imagenet (and --dkd_beta 2 with DKD)
. "$(dirname "$0")/env.sh"

if [ -n "${TEACHER:-}" ]; then
    set -- --path-t "$TEACHER" "$@"
else
    set -- --model_t ResNet34 --teacher_weights torchvision "$@"
fi
exec "$python" train_student.py --model_s ResNet18 --dataset imagenet --multiprocessing-distributed --num_workers 8 \
    --distill kd -r 1 -a 1 -b 0 --kd_T 4 \
    --epochs 120 --batch_size 256 --learning_rate 0.1 --lr_decay_epochs 30,60,90 --weight_decay 1e-4 \
    --have_mlp 1 --mlp_name global --t_start 1 --t_end 20 \
    --cosine_decay 1 --decay_max 0 --decay_min -1 --decay_loops 5 "$@"

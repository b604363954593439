#!/bin/sh
# COCO: DKD and other methods by mdistiller's protocol (180,000 steps of 8 images, tau 1; DKD's alpha 1, beta 0.25).
# Pairs: PAIRS="R101-R18 R101-R50 R50-MV2", one after the other (default: the first; with --dry_run all three).
# Data: --data_dir DIR or COCO_DIR=DIR, the folder that holds annotations/, train2017/ and val2017/.
# Teachers: detectron2's model_final_f6e8b1.pkl (R101) and model_final_280758.pkl (R50) from its model zoo, given as
# R101=FILE and R50=FILE with --pickle_sha256 HASH, its sha256 that you compared (so one of the two files in a call); or
# a folder of run_coco_vanilla.sh.
# All GPUs of the machine share each batch; --gpu_id 0,1 takes those. Without ImageNet weights: BACKBONE= (empty).
# Published: see docs/detection.md; the numbers are from memory, and none is a target.
# Later flags win, so these give the other rows:
#   KD         --distill kd
#   ReviewKD   --distill reviewkd
#   CTKD       --distill dkd --temperature ctkd-global --clip_grad 10
#   its published range, 1 to 21       --tau_range 20
. "$(dirname "$0")/env.sh"

case " $* " in *" --dry_run "* | *" --dry-run "*) all="R101-R18 R101-R50 R50-MV2" ;; *) all=R101-R18 ;; esac
pairs=${PAIRS:-$all} backbone=${BACKBONE-torchvision}
r101=save/detectron2/model_final_f6e8b1.pkl r50=save/detectron2/model_final_280758.pkl # unless R101 and R50 are given

choose() { # sets teacher, file and student of a pair
    case $1 in
    R101-R18) teacher=ResNet101 file=${R101:-$r101} student=ResNet18 ;;
    R101-R50) teacher=ResNet101 file=${R101:-$r101} student=ResNet50 ;;
    R50-MV2) teacher=ResNet50 file=${R50:-$r50} student=MobileNetV2 ;;
    *) echo "error: PAIRS has $1; it may have R101-R18, R101-R50 and R50-MV2" >&2; exit 2 ;;
    esac
}

for pair in $pairs; do # find missing teachers before any training
    choose "$pair"
    case " $* " in *" -h "* | *" --help "* | *" --dry"* | *" --path_t"* | *" --path-t"*) continue ;; esac
    if [ "$file" != torchvision ] && [ ! -e "$file" ]; then
        echo "error: there is no teacher $file: give ${pair%-*}=FILE, detectron2's file with --pickle_sha256 HASH or the" \
            "folder of a detector that scripts/run_coco_vanilla.sh has trained" >&2
        exit 2
    fi
done
for pair in $pairs; do
    choose "$pair"
    "$python" train_detector.py --dataset coco --path-t "$file" --model_t "faster_rcnn_$teacher" \
        --model_s "faster_rcnn_$student" --multiprocessing-distributed --num_workers 4 \
        ${backbone:+--backbone "$backbone"} --distill dkd --kd_T 1 --dkd_alpha 1 --dkd_beta 0.25 --clip_grad 0 "$@"
done

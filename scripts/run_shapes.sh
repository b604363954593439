#!/bin/sh
# Synthetic shapes: a tiny teacher of 300 steps, then a tiny student of 120 steps alone and under every temperature, with
# three seeds each, into save/shapes. About a quarter of an hour on two CPU cores. It trains in minutes what COCO
# needs days for, and says nothing about COCO: 60 images for training and 60 for validation.
# results/detection_tiny holds what it made. Another folder: OUT=DIR. Flags go to every student, like --tau_range 20. A second call goes on where the first one ended.
. "$(dirname "$0")/env.sh"

out=${OUT:-save/shapes}
"$python" train_detector.py --dataset shapes --model_s faster_rcnn_tiny_wide --iterations 300 --eval_every 100 \
    --run_dir "$out/teacher"
for seed in 1 2 3; do
    "$python" train_detector.py --dataset shapes --model_s faster_rcnn_tiny --seed $seed --run_dir "$out/alone_seed-$seed" "$@"
    for temperature in fixed ctkd-global ctkd-instance dtkd rlkd random annealing standardised normkd ttm wttm cswt idts; do
        "$python" train_detector.py --dataset shapes --path-t "$out/teacher" --model_s faster_rcnn_tiny --seed $seed \
            --skip_validation --temperature $temperature --run_dir "$out/kd_${temperature}_seed-$seed" "$@"
    done
done

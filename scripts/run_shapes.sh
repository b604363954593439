#!/bin/sh
# Synthetic shapes: a tiny teacher of 300 steps, then a tiny student of 120 steps alone and under every temperature, with
# three seeds each, into save/shapes. It takes about a quarter of an hour on two CPU cores, where COCO takes days, and says
# nothing about COCO: 60 images for training and 60 for validation. results/detection_tiny holds such runs.
# Another folder: OUT=DIR. Flags such as --device cpu go to every training; --dry_run shows the teacher, a student alone
# and a distilled one. A second call resumes where the first one ended.
. "$(dirname "$0")/env.sh"

out=${OUT:-save/shapes}
seeds="1 2 3" temperatures="fixed ctkd-global ctkd-instance dtkd rlkd random annealing standardised normkd ttm wttm cswt idts"
case " $* " in *" --dry_run "* | *" --dry-run "*) seeds=1 temperatures=ctkd-global ;; esac
"$python" train_detector.py --dataset shapes --model_s faster_rcnn_tiny_wide --iterations 300 --eval_every 100 \
    --run_dir "$out/teacher" "$@"
for seed in $seeds; do
    "$python" train_detector.py --dataset shapes --model_s faster_rcnn_tiny --seed $seed --run_dir "$out/alone_seed-$seed" "$@"
    for temperature in $temperatures; do
        "$python" train_detector.py --dataset shapes --path-t "$out/teacher" --model_t faster_rcnn_tiny_wide \
            --model_s faster_rcnn_tiny --seed $seed --skip_validation --temperature $temperature \
            --run_dir "$out/kd_${temperature}_seed-$seed" "$@"
    done
done

#!/bin/sh
# The main job on a data set that needs no download: scikit-learn's 1,797 handwritten digits.
# Trains a teacher (resnet20), then the student (resnet8) alone, with KD, and with CTKD's global temperature;
# ends with a table and a picture. Under 4 minutes on two CPU cores. Not a published experiment.
. "$(dirname "$0")/env.sh"

epochs=10
teacher=save/quickstart/resnet20_vanilla_digits
"$python" train_teacher.py --dataset digits --model resnet20 --epochs $epochs --run_dir $teacher "$@"
"$python" train_teacher.py --dataset digits --model resnet8 --epochs $epochs --run_dir save/quickstart/resnet8_alone "$@"
for temperature in fixed ctkd-global; do
    "$python" train_student.py --dataset digits --path-t $teacher --model_s resnet8 --epochs $epochs \
        --distill kd --temperature $temperature --run_dir save/quickstart/resnet8_kd_$temperature "$@"
done
case " $* " in *" --dry_run "* | *" --dry-run "*) exit 0 ;; esac
"$python" compare.py save/quickstart --plot save/quickstart/compare.png
echo "accuracy, tau and lambda of the CTKD run over the epochs: save/quickstart/resnet8_kd_ctkd-global/curve.png"

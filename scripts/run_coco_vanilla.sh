#!/bin/sh
# COCO: a detector alone, by mdistiller's protocol (180,000 steps of 8 images): a teacher, or a student to compare with.
# Data: --data_dir DIR or COCO_DIR=DIR, the folder that holds annotations/, train2017/ and val2017/.
# Later flags win:
#   a student    --model_s faster_rcnn_ResNet18 | faster_rcnn_ResNet50 | faster_rcnn_MobileNetV2
#   a teacher    --model_s faster_rcnn_ResNet101 (or load detectron2's, see docs/detection.md)
# All GPUs of the machine share each batch; --gpu_id 0,1 takes those. Without ImageNet weights: BACKBONE= (empty).
. "$(dirname "$0")/env.sh"

backbone=${BACKBONE-torchvision}
exec "$python" train_detector.py --dataset coco --model_s faster_rcnn_ResNet18 --multiprocessing-distributed \
    --num_workers 4 ${backbone:+--backbone "$backbone"} --clip_grad 0 "$@"

#!/bin/sh
# Rows of the published tables on a GPU, in slices of nine minutes: CTKD's pairs with KD and CTKD first.
# Each slice packs what it trained into an archive in $OUT or results/gpu; --earlier takes such archives, or a folder of
# them, and goes on from there.
#   sh scripts/gpu_campaign.sh --dry_run                    what is finished, and what would be trained first
#   sh scripts/gpu_campaign.sh --earlier results/gpu -- --precision tf32
#   sh scripts/gpu_campaign.sh ctkd --pairs resnet56:resnet20 --seeds 1
# Data: CIFAR100_DIR=DIR, or --data_dir DIR behind the --.
. "$(dirname "$0")/env.sh"

"$python" benchmarks/packages.py requirements.txt
exec "$python" benchmarks/gpu_campaign.py "$@"

#!/bin/sh
# Rows of the published tables on a GPU, in slices of nine minutes: CTKD's pairs with KD and CTKD first.
# Each slice packs its runs into an archive in $OUT or results/gpu. --earlier takes such archives, or a folder of them,
# and resumes their runs.
#   sh scripts/gpu_campaign.sh --dry_run                    the runs: which are finished, and which come next
#   sh scripts/gpu_campaign.sh --earlier results/gpu -- --precision tf32
#   sh scripts/gpu_campaign.sh ctkd --pairs resnet56:resnet20 --seeds 1
# Data: CIFAR100_DIR=DIR, or --data_dir DIR after --.
. "$(dirname "$0")/env.sh"

"$python" benchmarks/packages.py requirements.txt
exec "$python" benchmarks/gpu_campaign.py "$@"

#!/bin/sh
# Trains every run behind the published tables, teachers first. Finished runs are skipped, interrupted runs resume.
#   sh scripts/reproduce.sh --list                            the tables, their runs, progress and published numbers
#   sh scripts/reproduce.sh ctkd                              a table; without a name all of them
#   sh scripts/reproduce.sh ctkd --seeds 3 --jobs 4           three seeds, four runs at a time (each on a GPU of its own)
#   sh scripts/reproduce.sh ctkd --seeds 3 --trials           the seeds of a row side by side on one GPU
#   sh scripts/reproduce.sh ctkd --pairs resnet56:resnet20    one pair, with its networks alone
#   sh scripts/reproduce.sh ctkd --dry_run                    only the commands
#   sh scripts/reproduce.sh short --jobs 2 -- --teacher_table a small table of 40 epochs, for two CPU cores
# Data: CIFAR100_DIR=DIR and IMAGENET_DIR=DIR, or --data_dir DIR after --.
. "$(dirname "$0")/env.sh"

exec "$python" reproduce.py "$@"

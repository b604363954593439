#!/bin/sh
# The published tables: every run behind them, teachers first. What is finished is skipped, what was stopped goes on.
#   sh scripts/reproduce.sh --list                            the tables, their runs, how far they are, what is published
#   sh scripts/reproduce.sh ctkd                              a table; without a name all of them
#   sh scripts/reproduce.sh ctkd --seeds 3 --jobs 4           three seeds, four runs at a time (each on a GPU of its own)
#   sh scripts/reproduce.sh ctkd --seeds 3 --trials           the seeds of a row side by side on one GPU
#   sh scripts/reproduce.sh ctkd --pairs resnet56:resnet20    one pair, with its networks alone
#   sh scripts/reproduce.sh ctkd --dry_run                    only the commands
#   sh scripts/reproduce.sh short --jobs 2 -- --teacher_table a small table of 40 epochs, for two CPU cores
# Data: CIFAR100_DIR=DIR and IMAGENET_DIR=DIR, or --data_dir DIR behind the --.
. "$(dirname "$0")/env.sh"

exec "$python" reproduce.py "$@"

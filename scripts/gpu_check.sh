#!/bin/sh
# What can be checked only on a GPU, in at most nine minutes: tests, A/B of the fast path, conventional loops, teacher
# table, epoch time, memory, agreement with the CPU. Writes gpu_check.txt, .json and .tar.gz into $OUT or results/gpu.
#   PYTHON=python3 sh scripts/gpu_check.sh                  with a Python that has everything in requirements.txt
#   sh scripts/gpu_check.sh --parts speed memory            some parts
#   sh scripts/gpu_check.sh --device cpu                    every part with tiny sizes, to see that it runs
# Data: CIFAR-100 if CIFAR100_DIR=DIR is given, else random images of the same shape.
. "$(dirname "$0")/env.sh"

"$python" benchmarks/packages.py requirements.txt
exec "$python" benchmarks/gpu_check.py "$@"

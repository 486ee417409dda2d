#!/bin/sh
# 5-way 1-shot, and the same weights at 5 shots: Reptile's training is the same for both. 14 000 of 100 000 iterations.
ALSO="5w5s" exec sh "$(dirname "$0")/omniglot.sh" omniglot_reptile_5w1s_short --preset reptile-omniglot-5w1s --seed 0 \
    --compile --iterations 14000 --validate-every 1000 --validation-tasks 100

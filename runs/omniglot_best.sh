#!/bin/sh
# 20-way 1-shot, and the same weights at 5-way and at 5-shot. To pass MAML's 95.8, 98.7, 99.9, 98.9 % (Finn et al. 2017).
ALSO="5w1s 5w5s 20w5s" exec sh "$(dirname "$0")/omniglot.sh" omniglot_best --preset best-omniglot --seed 0 --compile

#!/bin/sh
# 20-way 1-shot. Reptile as published, without transduction: 88.14 ± 0.15 % (Nichol et al. 2018).
exec sh "$(dirname "$0")/omniglot.sh" omniglot_reptile_20w1s --preset reptile-omniglot-20w1s --seed 0

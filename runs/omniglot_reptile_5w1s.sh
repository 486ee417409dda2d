#!/bin/sh
# 5-way 1-shot. Reptile as published, without transduction: 95.39 ± 0.09 % (Nichol et al. 2018).
exec sh "$(dirname "$0")/omniglot.sh" omniglot_reptile_5w1s --preset reptile-omniglot-5w1s --seed 0

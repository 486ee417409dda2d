#!/bin/sh
# 20-way 5-shot. Reptile as published, without transduction: 96.65 ± 0.33 % (Nichol et al. 2018).
exec sh "$(dirname "$0")/omniglot.sh" omniglot_reptile_20w5s --preset reptile-omniglot-20w5s --seed 0

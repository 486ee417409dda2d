#!/bin/sh
# 5-way 5-shot. Reptile as published, without transduction: 98.90 ± 0.10 % (Nichol et al. 2018).
exec sh "$(dirname "$0")/omniglot.sh" omniglot_reptile_5w5s --preset reptile-omniglot-5w5s --seed 0

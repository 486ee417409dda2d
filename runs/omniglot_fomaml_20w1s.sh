#!/bin/sh
# 20-way 1-shot. FOMAML as published: 89.4 ± 0.5 % (Nichol et al. 2018).
exec sh "$(dirname "$0")/omniglot.sh" omniglot_fomaml_20w1s --preset fomaml-omniglot-20w1s --seed 0

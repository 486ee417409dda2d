#!/bin/sh
# 20-way 5-shot. FOMAML as published: 97.9 ± 0.1 % (Nichol et al. 2018).
exec sh "$(dirname "$0")/omniglot.sh" omniglot_fomaml_20w5s --preset fomaml-omniglot-20w5s --seed 0

#!/bin/sh
# 5-way 1-shot. FOMAML as published: 98.3 ± 0.5 % (Nichol et al. 2018).
exec sh "$(dirname "$0")/omniglot.sh" omniglot_fomaml_5w1s --preset fomaml-omniglot-5w1s --seed 0

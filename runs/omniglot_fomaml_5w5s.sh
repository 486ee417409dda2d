#!/bin/sh
# 5-way 5-shot. FOMAML as published: 99.2 ± 0.2 % (Nichol et al. 2018).
exec sh "$(dirname "$0")/omniglot.sh" omniglot_fomaml_5w5s --preset fomaml-omniglot-5w5s --seed 0

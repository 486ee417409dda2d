#!/bin/sh
# 20-way 1-shot. Second-order MAML as published: 95.8 ± 0.3 % (Finn et al. 2017).
exec sh "$(dirname "$0")/omniglot.sh" omniglot_maml_20w1s --preset maml-omniglot-20w1s --seed 0

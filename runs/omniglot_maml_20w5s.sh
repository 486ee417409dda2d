#!/bin/sh
# 20-way 5-shot. Second-order MAML as published: 98.9 ± 0.2 % (Finn et al. 2017).
exec sh "$(dirname "$0")/omniglot.sh" omniglot_maml_20w5s --preset maml-omniglot-20w5s --seed 0

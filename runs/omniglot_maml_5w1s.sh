#!/bin/sh
# 5-way 1-shot. Second-order MAML as published: 98.7 ± 0.4 % (Finn et al. 2017).
exec sh "$(dirname "$0")/omniglot.sh" omniglot_maml_5w1s --preset maml-omniglot-5w1s --seed 0

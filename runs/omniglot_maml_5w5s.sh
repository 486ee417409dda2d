#!/bin/sh
# 5-way 5-shot. Second-order MAML as published: 99.9 ± 0.1 % (Finn et al. 2017).
exec sh "$(dirname "$0")/omniglot.sh" omniglot_maml_5w5s --preset maml-omniglot-5w5s --seed 0

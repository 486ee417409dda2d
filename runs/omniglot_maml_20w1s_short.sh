#!/bin/sh
# 20-way 1-shot by the published protocol of MAML at test, second order, trained in 11 000 outer steps of 4 tasks instead of 60 000
# of 16: inner_lr 1.0 on the mean of the 20 examples' losses instead of 0.1 on their sum, three query images a class, meta_lr 2e-3
# with a cosine. The same weights at 5 shots too.
ALSO=20w5s exec sh "$(dirname "$0")/omniglot.sh" omniglot_maml_20w1s_short --preset maml-omniglot-20w1s --seed 0 --compile \
    --iterations 11000 --meta-batch-size 4 --inner-lr 1.0 --inner-loss mean --query-shots 3 --test-query-shots 1 --meta-lr 2e-3 \
    --schedule cosine --validate-every 1100 --validation-tasks 200

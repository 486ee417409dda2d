#!/bin/sh
# 20-way 5-shot by the published protocol at test, trained in 30 000 outer steps of 4 tasks of 2 shots instead of 60 000 of 16 of 5:
# inner_lr 1.0 on the mean of the 40 examples' losses instead of 0.1 on their sum, three query images a class, meta_lr 2e-3 with a cosine.
exec sh "$(dirname "$0")/omniglot.sh" omniglot_fomaml_20w5s_short --preset fomaml-omniglot-20w5s --seed 0 --compile \
    --iterations 30000 --meta-batch-size 4 --inner-lr 1.0 --inner-loss mean --train-shots 2 --query-shots 3 --test-query-shots 5 \
    --meta-lr 2e-3 --schedule cosine --validate-every 3000 --validation-tasks 200

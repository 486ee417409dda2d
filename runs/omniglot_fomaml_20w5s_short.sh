#!/bin/sh
# 20-way 5-shot by the published protocol at test, trained in 10 000 outer steps of 2 tasks instead of 60 000 of 16: inner_lr
# 1.0 on the mean of the 100 examples' losses, three query images a class, meta_lr 2e-3 with a cosine, autocast to bfloat16.
exec sh "$(dirname "$0")/omniglot.sh" omniglot_fomaml_20w5s_short --preset fomaml-omniglot-20w5s --seed 0 --autocast bfloat16 \
    --iterations 10000 --meta-batch-size 2 --inner-lr 1.0 --inner-loss mean --query-shots 3 --test-query-shots 5 --meta-lr 2e-3 \
    --schedule cosine --validate-every 1000 --validation-tasks 100

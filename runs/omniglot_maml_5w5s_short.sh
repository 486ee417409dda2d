#!/bin/sh
# 5-way 5-shot, the published protocol of MAML, second order, in 20 000 outer steps of 8 tasks instead of 60 000 of 32: twice the
# meta_lr, with a cosine.
exec sh "$(dirname "$0")/omniglot.sh" omniglot_maml_5w5s_short --preset maml-omniglot-5w5s --seed 0 --compile \
    --iterations 20000 --meta-batch-size 8 --meta-lr 2e-3 --schedule cosine --validate-every 2000 --validation-tasks 200

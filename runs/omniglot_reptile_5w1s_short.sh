#!/bin/sh
# 5-way 1-shot, the published protocol of Reptile in 60 000 iterations instead of 100 000, and its weights at 5 shots, which
# the paper trains the same way. The last weights, as published: the step size has come down to zero by then. Validated as
# MAML and FOMAML are, so that the plot of omniglot_seconds.sh compares the same thing; judged by every protocol.
ALSO=5w5s WEIGHTS=last exec sh "$(dirname "$0")/omniglot.sh" omniglot_reptile_5w1s_short --preset reptile-omniglot-5w1s --seed 0 \
    --compile --iterations 60000 --validate-every 5000 --validation-tasks 100 --statistics own

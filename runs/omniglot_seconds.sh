#!/bin/sh
# Validation accuracy at 5-way 1-shot against seconds of training: docs/results/omniglot_seconds.png.
# FOMAML's line is that of omniglot_fomaml_5w1s_short.sh. OMNIGLOT: the folder of the archives; PYTHON: .venv/bin/python.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
kept=runs/omniglot/seconds
out=${OUT:-out}/seconds-$(date +%Y%m%d-%H%M%S)
export OMP_NUM_THREADS=1

train() { # name, minutes, options: stopped after so many minutes
    name=$1 minutes=$2
    shift 2
    timeout "${minutes}m" "$python" -c "from fomaml.cli import main; main()" train "$@" --seed 0 --compile --no-baselines \
        --validation-tasks 200 --out "$out/$name" ${OMNIGLOT:+--data-root "$OMNIGLOT"} || test $? = 124
    mkdir -p "$kept/$name"
    cp "$out/$name/metrics.jsonl" "$kept/$name"
}

train maml 7 --preset maml-omniglot-5w1s --validate-every 100
train reptile 7 --preset reptile-omniglot-5w1s --validate-every 500
train proto-maml 7 --preset best-omniglot --ways 5 --test-augment turns --jitter 0 --iterations 1200 --validate-every 100
"$python" runs/omniglot_plot.py "$kept/fomaml:FOMAML" "$kept/maml:MAML" "$kept/reptile:Reptile" \
    "$kept/proto-maml:fo-Proto-MAML, best-omniglot" --floor 60 --out docs/results/omniglot_seconds.png

#!/bin/sh
# Validation accuracy at 5-way 1-shot against seconds of training: docs/results/omniglot_seconds.png. FOMAML, MAML and Reptile are
# the runs of their rows in docs/results.md. OMNIGLOT: the folder of the archives; PYTHON: .venv/bin/python.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
kept=runs/omniglot/seconds/proto-maml
out=${OUT:-out}/seconds-$(date +%Y%m%d-%H%M%S)
export OMP_NUM_THREADS=1

"$python" -c "from fomaml.app.cli import main; main()" train --preset best-omniglot --ways 5 --test-augment turns --jitter 0 \
    --iterations 1200 --validate-every 100 --seed 0 --compile --no-baselines --validation-tasks 200 --out "$out" \
    ${OMNIGLOT:+--data-root "$OMNIGLOT"}
mkdir -p "$kept"
cp "$out/metrics.jsonl" "$kept"
rows=docs/results/omniglot
"$python" runs/omniglot_plot.py "${rows}_fomaml_5w1s_short:FOMAML" "${rows}_maml_5w1s_short:MAML" \
    "${rows}_reptile_5w1s_short:Reptile" "$kept:fo-Proto-MAML, best-omniglot" --floor 90 \
    --out docs/results/omniglot_seconds.png

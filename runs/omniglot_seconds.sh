#!/bin/sh
# Draws docs/results/omniglot_seconds.png: validation accuracy at 5-way 1-shot against seconds of training. It trains
# first-order Proto-MAML; the lines of FOMAML, MAML and Reptile come from the runs kept under docs/results/.
# Environment: OMNIGLOT, the folder of the archives (else the user's cache, or a download); PYTHON (.venv/bin/python).
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
kept=runs/omniglot/seconds/proto-maml
out=${OUT:-out}/seconds-$(date +%Y%m%d-%H%M%S)
export OMP_NUM_THREADS=1

"$python" -m fomaml train --preset best-omniglot --ways 5 --test-augment turns --jitter 0 \
    --iterations 1200 --validate-every 100 --seed 0 --compile yes --no-baselines --validation-tasks 200 --out "$out" \
    ${OMNIGLOT:+--data-root "$OMNIGLOT"}
mkdir -p "$kept"
cp "$out/metrics.jsonl" "$kept"
rows=docs/results/omniglot
"$python" runs/omniglot_plot.py "${rows}_fomaml_5w1s_short:FOMAML" "${rows}_maml_5w1s_short:MAML" \
    "${rows}_reptile_5w1s_short:Reptile" "$kept:fo-Proto-MAML, best-omniglot" --floor 90 \
    --out docs/results/omniglot_seconds.png

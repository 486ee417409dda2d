#!/bin/sh
# One figure of docs/results.md: train, or go on with a run that was killed, then judge and keep its weights.
# The omniglot_*.sh beside it call it: sh runs/omniglot.sh NAME [options of fomaml train]
# Environment: OMNIGLOT, the folder of the archives (else the user's cache, or a download); OUT, where run directories
# go (out); PYTHON (.venv/bin/python); OMP_NUM_THREADS (1); ALSO, further tasks to judge the run on, such as 5w1s;
# COPIES of each image to judge it with, beside the plain tasks; TURNED and BALANCED, as the options of omniglot_keep.py
# (any value); WEIGHTS, best by validation (the default) or last.
set -eu
name=$1
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
run=${OUT:-out}/$name
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

fomaml() {
    "$python" -c "from fomaml.app.cli import main; main()" "$@"
}

if [ ! -f "$run/config.json" ]; then
    fomaml train "$@" --no-baselines --out "$run" ${OMNIGLOT:+--data-root "$OMNIGLOT"}
elif [ ! -f "$run/result.json" ]; then
    fomaml train --resume "$run"
fi
"$python" runs/omniglot_keep.py "$run" --to "docs/results/$name" ${ALSO:+--also $ALSO} \
    ${WEIGHTS:+--weights "$WEIGHTS"} ${COPIES:+--copies "$COPIES"} ${TURNED:+--turned} ${BALANCED:+--balanced} \
    ${OMNIGLOT:+--data-root "$OMNIGLOT"}
"$python" runs/omniglot_table.py

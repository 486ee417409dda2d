#!/bin/sh
# The comparisons of docs/results.md: the same tasks for every algorithm, one thread each.
# Sinusoids: the same number of iterations for each algorithm. MNIST: the same number of seconds.
# Writes runs/compare/*.txt and *.json; pass the Python to use, by default .venv/bin/python. About half an hour.
set -eu
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
export OMP_NUM_THREADS=1
out=out/compare-$(date +%Y%m%d-%H%M%S)

compare() {
    name=$1
    shift
    "$python" -m fomaml compare "$@" --out "$out/$name"
    mkdir -p runs/compare
    cp "$out/$name/compare.txt" "runs/compare/$name.txt"
    cp "$out/$name/compare.json" "runs/compare/$name.json"
}

compare sinusoid sinusoid --iterations 10000 --test-steps 0 1 5 10 \
    --algorithms fomaml maml reptile anil boil meta-sgd maml++ imaml cavia sign-maml &
compare mnist mnist --question new-labels --shots 1 --seconds 45 \
    --algorithms fomaml maml reptile anil boil meta-sgd maml++ imaml sign-maml zero-head proto-maml
wait

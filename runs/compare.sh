#!/bin/sh
# The tables of the README's comparison: every algorithm that applies, the same tasks, one thread.
# sinusoid: as many iterations each, then as many seconds each; MNIST: the recipe's iterations.
# Writes runs/compare/*.txt and *.json; pass the Python to use, by default python3.
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3}
export OMP_NUM_THREADS=1
out=out/compare-$(date +%Y%m%d-%H%M%S)

fomaml() {
    "$python" -c "from fomaml.cli import main; main()" "$@"
}

keep() {
    mkdir -p runs/compare
    cp "$out/$1/compare.txt" "runs/compare/$1.txt"
    cp "$out/$1/compare.json" "runs/compare/$1.json"
}

regression="fomaml maml reptile anil boil meta-sgd maml++ imaml cavia sign-maml"

fomaml compare sinusoid --algorithms $regression --test-steps 0 1 5 10 --out "$out/sinusoid"
keep sinusoid
fomaml compare sinusoid --algorithms $regression --test-steps 0 1 5 10 --seconds 60 --out "$out/sinusoid-60s"
keep sinusoid-60s
fomaml compare mnist --question new-labels --shots 1 --algorithms $regression zero-head proto-maml --out "$out/mnist"
keep mnist

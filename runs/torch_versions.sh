#!/bin/sh
# Runs the tests on the oldest torch of the range, the oldest that compiles and the newest, each in an environment of
# its own, and keeps the last lines of each in runs/torch_versions/. About ten minutes to install and half an hour to
# run for each on two cores. Arguments are pytest's: `runs/torch_versions.sh tests/engines`.
# Other versions: TORCH="2.8.0 2.10.0" runs/torch_versions.sh
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
folder=${ENVIRONMENTS:-${TMPDIR:-/tmp}/fomaml-torch}
mkdir -p "$folder" runs/torch_versions
status=0
for version in ${TORCH:-2.6.0 2.7.1 2.14.1}; do
    environment=$folder/$version
    if [ ! -e "$environment/.installed" ]; then
        numpy=numpy
        [ "$version" = 2.6.0 ] && numpy='numpy<2.3'  # later ones warn about what that torch does with them
        "$python" -m venv "$environment" &&
            "$environment/bin/pip" install --quiet "torch==$version" "$numpy" --editable '.[test]' &&
            touch "$environment/.installed" || exit 1
    fi
    result=runs/torch_versions/$version.txt
    echo "python -m pytest $*, torch $version" > "$result"
    "$environment/bin/python" -m pytest -q --numprocesses auto --maxprocesses 8 --dist worksteal \
        --show-capture=no --tb=line "$@" > "$folder/$version.log" 2>&1 || status=1
    sed -n '/short test summary/,$p' "$folder/$version.log" >> "$result"
    tail -n 1 "$folder/$version.log"
done
exit $status

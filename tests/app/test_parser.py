"""Command lines that are mistyped: one line with the nearest word, and with the command that has an option."""

import pytest

from commands import refused

OTHERS = "--steps is an option of fomaml evaluate, fomaml adapt, fomaml demo, not of fomaml train"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "name a command: train, evaluate, "),
        ("trian sinusoid", "unknown command 'trian', did you mean train? There are: train, "),
        ("nosuch", "unknown command 'nosuch'; there are: train, "),
        ("--iterations 3", "a command comes first, before '--iterations': train, "),
        ("train sinusoid --itertions 5", "unknown argument '--itertions', did you mean --iterations? see fomaml train"),
        ("train sinusoid --iter 5", "unknown argument '--iter', did you mean --iterations? see fomaml train --help"),
        ("train sinusoid --inner-rl=5", "unknown argument '--inner-rl=5', did you mean --inner-lr?"),
        ("train sinusoid --no-baseline", "unknown argument '--no-baseline', did you mean --no-baselines?"),
        ("train sinusoid -x", "unknown argument '-x'; see fomaml train --help"),
        ("train sinusoid --zzzzzz", "unknown argument '--zzzzzz'; see fomaml train --help"),
        ("train sinusoid --steps 5", f"{OTHERS}, did you mean --test-steps? see fomaml train --help"),
        ("evaluate run --trials 5", "--trials is an option of fomaml tune, not of fomaml evaluate; see"),
        ("train sinusoid --iterations", "--iterations needs one value, N; see fomaml train --help"),
        ("train sinusoid --iterations --shots 3", "--iterations needs one value, N; see"),
        ("train sinusoid --image-size 3", "--image-size needs 2 values, PIXELS; see"),
        ("check foo --input", "--input needs at least one value, N; see fomaml check --help"),
        ("train sinusoid --iterations five", "--iterations takes a whole number, got 'five'; see"),
        ("train sinusoid --iterations 5.0", "--iterations takes a whole number, got '5.0'; see"),
        ("train sinusoid --inner-lr x", "--inner-lr takes a number, got 'x'; see"),
        ("train sinusoid --compile", "--compile needs one value, {auto,yes,no}; see"),
        ("train sinusoid more stuff", "fomaml train takes only SOURCE without the name of an option, got 'more' too;"),
        ("train sinusoid -- --iterations", "fomaml train takes only SOURCE without the name of an option"),
        ("evaluate", "these are missing: RUN; see fomaml evaluate --help"),
        ("adapt run", "these are missing: --support, --out; see fomaml adapt --help"),
        ("train sinusoid --schedule consine", "unknown schedule 'consine', did you mean cosine? There are: constant, "),
        ("train sinusoid --algorithm foaml", "unknown algorithm 'foaml', did you mean fomaml? There are: "),
        ("train sinusiod", "unknown source 'sinusiod', did you mean sinusoid? There are: "),
        ("train sinusoid --model mpl", "unknown model 'mpl', did you mean mlp? There are: "),
        ("train --preset best-omnigot", "unknown preset 'best-omnigot', did you mean best-omniglot? There are: "),
        ("evaluate run --part tst", "unknown part 'tst', did you mean test? There are: test, validation"),
        ("train sinusoid --shots " + "9" * 5000, "--shots takes a whole number, got '999"),
        ("train sinusoid --shots " + "9" * 4000, "--shots must be a whole number from 1 to 1000000000000000, got 999"),
        ("train sinusoid --seed 9999999999999999999999", "--seed must be a whole number from 0 to "),
        ("train sinusoid --inner-lr 1e400", "--inner-lr must be a positive finite number, got inf"),
        ("train sinusoid --inner-steps 10000000", "--inner-steps must be a whole number from 1 to 1000000, got 1"),
    ],
)  # fmt: skip
def test_a_mistyped_command_line(text, message, capsys):
    said = refused(capsys, text.split())
    assert said.startswith(message) and len(said) < 700

"""Speed and memory of this project beside other libraries; `python -m benchmarks --help`."""

"""The parts of `tools/bench_loss.py`: contenders, measurements, the report."""

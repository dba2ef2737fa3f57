"""The parts of tests/benchmark.py, which is their command."""

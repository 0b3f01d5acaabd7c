"""The parts of scripts/benchmark.py, one module each; ``run(settings)`` returns rows."""

"""Measurements that leave a record in results/benchmarks/; scripts/benchmark.py runs them."""

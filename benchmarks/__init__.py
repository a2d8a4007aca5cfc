"""What this package costs, measured beside what it is compared with: ``python -m benchmarks [NAME ...]``."""

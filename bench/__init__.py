"""Benchmarks of fastrnn against torch.nn and other runtimes; see bench/README.md."""

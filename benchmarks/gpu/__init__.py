"""All measurements that need a GPU, in one command: see `benchmarks.gpu.__main__`."""

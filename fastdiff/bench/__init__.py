"""The speed ladder: what each step buys on this machine, `fastdiff bench`, shared with `benchmarks/`."""

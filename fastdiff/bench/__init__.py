"""The speed ladder: what each step buys on this machine, `fastdiff bench`, shared with `benchmarks/`.

May import `pipelines`, `shapes` and what is below.
"""

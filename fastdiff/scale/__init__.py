"""More than one device: batch jobs (`fastdiff batch`) and serving (`fastdiff serve`) on Ray.

Needs the extra `ray`, which nothing here imports before a command runs. May import `pipelines` and what is below.
"""

"""More than one device: batch jobs (`fastdiff batch`) and serving (`fastdiff serve`) on Ray.

Needs the extra `ray`. `commands` holds the command line; nothing here imports Ray before a command runs.
"""

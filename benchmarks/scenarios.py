"""The cumulative ladder and its peers, as `fastdiff bench` and `benchmarks/gpu.py` climb it. Defined in the package.

The ladder on the full-size UNet, on an idle CPU, from the repository's root:

    fastdiff bench --model sdxl-random --size 256x256 --measure step \\
        --json benchmarks/results/ladder_cpu_DATE.json --plot benchmarks/results/ladder_cpu_DATE.png
"""

from fastdiff.bench.ladder import LADDER, Rung, rungs_for
from fastdiff.bench.settings import MEASURES, RECIPE, REFERENCE, SDXL_RANDOM, Settings

__all__ = ["LADDER", "MEASURES", "RECIPE", "REFERENCE", "SDXL_RANDOM", "Rung", "Settings", "rungs_for"]

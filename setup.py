"""Package metadata of fastdiff."""

from pathlib import Path

from setuptools import find_packages, setup

RAY = ["ray[data,serve]>=2.60,<3"]
BENCH = ["pytest>=8", "pytest-benchmark>=5", "matplotlib>=3.9"]
LINT = ["ruff>=0.15", "mypy>=2"]
TEST = [
    *BENCH, *RAY, *LINT, "hypothesis>=6.100", "scikit-image>=0.24", "schemathesis>=4.32", "httpx2", "psutil",
    "pytest-xdist>=3.5", "selenium>=4.20",
]

setup(
    name="fastdiff",
    version="0.1.0",
    description="The fastest way to run Stable Diffusion XL in plain PyTorch, as drop-in diffusers classes",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["fastdiff", "fastdiff.*"]),
    package_data={
        "fastdiff": ["py.typed"],
        "fastdiff.shapes": ["MODEL_CARD.md", "checkpoint/*.json", "checkpoint/*/*"],
        "fastdiff.scale": ["page.html"],
        "fastdiff.models": ["attention.cpp"],
        "fastdiff.weights": ["activations.cpp"],
    },
    install_requires=[
        "torch>=2.11,<2.15",
        "diffusers>=0.42,<0.43",
        # 5.24 takes no adapters with any peft that is out (it asks for 0.22); to be widened when there is one.
        "transformers>=5.17,<5.24",
        "torchao>=0.18,<0.19",
        "accelerate>=1.0",
        "safetensors>=0.4",
        "peft>=0.17",
        "numpy",
        "pillow",
        "tqdm",
    ],
    extras_require={
        "test": TEST,
        "bench": [*BENCH, "openvino>=2026.0"],
        "ray": RAY,
    },
    entry_points={"console_scripts": ["fastdiff=fastdiff.cli:main"]},
)

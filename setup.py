"""The package megatron_lrpath, its command `lrpath` and what they need."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-lrpath",
    version="0.1.0",
    description="Version updates of large language models by learning-rate path switching, on Megatron-Core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_lrpath", "megatron_lrpath.*"]),
    package_data={"megatron_lrpath": ["py.typed", "report/templates/*"]},
    install_requires=[
        "megatron-core>=0.19,<0.20",
        "torch>=2.8",
        "numpy>=2",
        "psutil",  # Megatron saves checkpoints with it and does not declare it
        "sentencepiece",
        "protobuf",  # a SentencePiece model is one of its messages
        "transformers",  # Megatron's Hugging Face tokenizers
        "safetensors",
        "gigatoken>=0.10",  # reads SentencePiece models, several times faster
        "pyarrow",
        "zstandard",
        "pyyaml",
        "rich>=13",
        "plotille>=5",
        "scipy",
        "xxhash",  # checksums of checkpoints at the speed of the disk
        "matplotlib",
        "jinja2",
        "tensorboard",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]"],
        "test": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["lrpath=megatron_lrpath.cli:main"]},
)

"""The package megatron_lrpath, its command `lrpath` and their requirements."""

from pathlib import Path

from setuptools import find_packages, setup

OPTIMIZERS = ["emerging-optimizers>=0.2"]  # muon, dist_muon, soap, lion
KERNELS = [
    "liger-kernel>=0.8.5,<0.9"
]  # cross-entropy on GPUs; training/gpu/measures.py has the same versions
EVALUATION = ["lm_eval[hf]>=0.4.9"]
ARCHIVE = ["fsspec", "s3fs"]  # other stores need their own fsspec packages
DOCS = ["mkdocs-material"]
TESTS = ["pytest", "pytest-xdist", "hypothesis", "jsonschema", "ruff", "mypy", "proselint", "types-PyYAML"]
S3_SERVER = ["moto[s3]", "flask", "flask-cors"]
SHIPPED = [
    "megatron_lrpath.tools",
    "megatron_lrpath.examples",
    "megatron_lrpath.slurm",
    "megatron_lrpath.docs",
]

setup(
    name="megatron-lrpath",
    version="0.2.0",
    description="Version updates of large language models by learning-rate path switching, on Megatron-Core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    # The tools, example plans, Slurm recipes and documents are next to the package; a wheel contains them.
    packages=[*find_packages(include=["megatron_lrpath", "megatron_lrpath.*"]), *SHIPPED],
    package_dir={name: name.rpartition(".")[2] for name in SHIPPED},
    package_data={
        "megatron_lrpath": [
            "py.typed",
            "plan/megatron_arguments.toml",
            "plan/megatron_parser.json",
            "report/templates/*",
            "sft/templates/*",
            "evaluate/tasks/*.yaml",
            "site/**",  # where `make docs` has built it
        ],
        "megatron_lrpath.examples": ["**/*.yaml", "**/*.py"],
        "megatron_lrpath.slurm": ["*.sh", "settings.env.example"],
        "megatron_lrpath.docs": ["*.md"],
    },
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
        "argcomplete",
    ],
    extras_require={
        "gpu": ["transformer-engine[core_cu13,pytorch]", *KERNELS],  # the first as megatron-core's extra `te`
        "kernels": KERNELS,  # without Transformer Engine, which has to be compiled
        "eval": EVALUATION,
        "wandb": ["wandb"],
        "optimizers": OPTIMIZERS,
        "archive": ARCHIVE,
        "docs": DOCS,
        "test": [*TESTS, *DOCS, "wandb", *OPTIMIZERS, *EVALUATION, *KERNELS, *ARCHIVE, *S3_SERVER],
    },
    entry_points={"console_scripts": ["lrpath=megatron_lrpath.cli:main"]},
)

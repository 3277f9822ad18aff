from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = next(line for line in (here / "hf_mixup/__init__.py").read_text().splitlines() if line.startswith("__version__")).split('"')[1]

# every package; a comment says what alone needs one: without it, all else imports and works
REQUIRED = [
    "torch>=2.6",
    "torchvision>=0.21",
    "transformers>=5.17",
    "accelerate>=1.7",  # before it, a run that is resumed in its second epoch sees other batches,
    "huggingface-hub>=1.31",
    "timm>=1.0.23",  # before it, Swin and EVA networks are loaded with buffers that nobody filled
    "safetensors>=0.8",
    "numpy>=2.0",
    "pillow>=11",
    "pyyaml>=6.0",
    "datasets>=4.8.4",  # data sets by name, the scripts; older ones make no arrays beside a torchvision without VideoReader
    "evaluate>=0.4.6",  # hf-mixup evaluate
    "scikit-learn>=1.5",  # the digits
    "scipy>=1.13",  # k-mixup, reports of sweeps
    "matplotlib>=3.9",  # pictures
]

setup(
    name="hf_mixup",
    version=version,
    description="Mixup methods for training image classifiers with Hugging Face",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="hf_mixup contributors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["mixup", "cutmix", "data augmentation", "image classification", "transformers", "timm", "pytorch"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    # scripts, recipes and published results stay where people look for them, and are installed inside the package
    packages=[*find_packages(include=["hf_mixup", "hf_mixup.*"]), "hf_mixup.scripts", "hf_mixup.model_cards"],
    package_dir={
        "hf_mixup.scripts": "training_scripts",
        "hf_mixup.model_cards": "model_cards",
    },
    package_data={
        "hf_mixup": ["py.typed", "report/templates/*"],
        "hf_mixup.scripts": ["recipes/*.yaml"],
        "hf_mixup.model_cards": ["published_results.csv", "published_costs.csv", "published_pretraining.csv"],
    },
    include_package_data=False,
    entry_points={"console_scripts": ["hf-mixup = hf_mixup.cli.main:main"]},
    python_requires=">=3.11",
    install_requires=REQUIRED,
    extras_require={
        "dev": [
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "mypy>=1.15",
            "types-PyYAML>=6.0",
            "build>=1.2",
            "hypothesis>=6.100",
            "torchmetrics>=1.4",
            "foolbox>=3.3",
            "peft>=0.18",
            "optuna>=4.0",
        ],
        "benchmarks": ["kornia>=0.8"],
        "oracles": ["lightly>=1.5"],  # a second opinion for the slow tests
        "docs": [
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.6",
            "mkdocstrings[python]>=0.30",
            "mkdocs-jupyter>=0.25",
            "nbclient>=0.10",
            "ipykernel>=6.29",
        ],
    },
)

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = next(line for line in (here / "hf_mixup/__init__.py").read_text().splitlines() if line.startswith("__version__")).split('"')[1]

setup(
    name="hf_mixup",
    version=version,
    description="Mixup methods for training image models with Hugging Face",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["hf_mixup", "hf_mixup.*"]),
    package_data={"hf_mixup": ["report/templates/*"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.9",
        "torchvision>=0.24",
        "transformers>=5.23",
        "accelerate>=1.15",
        "datasets>=5.0",
        "timm>=1.0.20",
        "evaluate>=0.4.6",
        "huggingface-hub>=2.0",
        "safetensors>=0.5",
        "scikit-learn>=1.5",
        "matplotlib>=3.9",
        "pillow>=11",
        "pyyaml>=6.0",
    ],
    extras_require={
        "dev": ["pytest>=8.0", "pytest-xdist>=3.6", "ruff>=0.9", "hypothesis>=6.100", "scipy>=1.13", "torchmetrics>=1.4", "foolbox>=3.3"],
        "benchmarks": ["kornia>=0.8"],
    },
)

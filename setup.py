"""How simpo_megatron is installed, and what it needs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "simpo_megatron/__init__.py").read_text()).group(1)
README = ROOT / "README.md"

GGUF = ["gguf>=0.10"]
# NeMo 3 stops before 2.4.
OMEGACONF = "omegaconf>=2.3,<2.4"
TEST = [
    *GGUF,
    OMEGACONF,
    "pytest>=8",
    "pytest-xdist>=3.7",
    "hypothesis>=6.100",
    "ruff>=0.14",
    "mypy>=1.18",
    "types-PyYAML",
    "trl>=0.29,<2",
    "accelerate>=1.4",
    "peft>=0.21",
]

setup(
    name="simpo-megatron",
    version=VERSION,
    description="SimPO (arXiv 2405.14734) for Megatron-Core: the loss, the data and the trainer",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["simpo_megatron", "simpo_megatron.*"]),
    package_data={"simpo_megatron": ["demo/*.jsonl", "demo/*.json", "reporting/templates/*"]},
    install_requires=[
        # 2.10 is the first whose torch.load(weights_only=True) stands up to hostile files (CVE-2026-24747).
        "torch>=2.6",
        # From 0.17 on megatron-core asks for Python 3.12; on 3.10 and 3.11 this resolves to 0.16.
        "megatron-core>=0.16.1,<0.20",
        "transformers>=4.57,<6",
        "datasets>=4",
        "pyarrow>=18",
        "safetensors>=0.5",
        "numpy>=1.26",
        "pyyaml>=6",
        "rich>=13",
        "jinja2>=3.1",
        "huggingface_hub>=0.34",
        "matplotlib>=3.8",
        "tensorboard>=2.16",
        # megatron-core's checkpoint writer imports it without declaring it.
        "psutil>=5.9",
    ],
    extras_require={
        # Never the bare package: without its compiled core it breaks megatron-core's import.
        "te": ["transformer-engine[pytorch,core_cu12]>=2.9"],
        "te-cu13": ["transformer-engine[pytorch,core_cu13]>=2.9"],
        # Not together with nemo: they want different versions of urllib3. A later leptonai breaks its import.
        "nemo-run": ["nemo-run>=0.11.1,<0.12", "leptonai>=0.26.6,<0.27"],
        "nemo": ["nemo_toolkit[core]>=3.0,<4", OMEGACONF, "einops", "sentencepiece"],
        "wandb": ["wandb>=0.17"],
        # To make a Hugging Face folder of SmolLM2 for `make demo-smollm2`.
        "gguf": GGUF,
        "bench": ["liger-kernel", "cut-cross-entropy", "trl>=0.29,<2"],
        "test": TEST,
    },
)

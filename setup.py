from setuptools import find_packages, setup

setup(
    name="klear-megatron",
    version="0.1.0",
    description="Klear-Reasoner training on Megatron-Core: SFT, then RL with GPPO",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["klear_megatron*"]),
    package_data={
        "klear_megatron": [
            "py.typed",
            "planning/*.yaml",
            "rollout/cpu_stand_ins/**/*.py",
            "rewards/sandbox/inside/*.py",
        ]
    },
    entry_points={"console_scripts": ["klear-megatron=klear_megatron.cli:main"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.17",
        "transformers>=5.12",
        "safetensors",
        "pydantic>=2.9",
        "PyYAML",
        "datasets",
        "pyarrow",
        "numpy",
        "httpx",
        "psutil",
        "math-verify",
        "antlr4-python3-runtime==4.13.2",
        "pebble",
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]"],
        "launch": ["nemo-run==0.11.1", "leptonai<0.47"],
        "test": [
            "pytest",
            "pytest-timeout",
            "hypothesis",
            "simpy",
            "matplotlib",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-psutil",
            "types-tqdm",
        ],
    },
)

"""The packages of the wheel; `configs/` of the repository lies in it as `iama/configs`. The rest: pyproject.toml."""

from setuptools import find_packages, setup

ROOMS = ("iama", "inference", "trainers")

setup(
    packages=[*find_packages(include=[f"{room}{rest}" for room in ROOMS for rest in ("", ".*")]), "iama.configs"],
    package_dir={"iama.configs": "configs"},
)

"""Versions of everything that the figures depend on."""

import platform
from importlib.metadata import PackageNotFoundError, version

import lrqp_torch

VERSIONED_PACKAGES = (
    "torch",
    "transformers",
    "cvxpy",
    "cvxpylayers",
    "numpy",
    "safetensors",
)


def package_versions() -> dict[str, str]:
    """Versions of Python and of every package that the figures depend on."""
    versions = {"lrqp_torch": lrqp_torch.__version__, "python": platform.python_version()}
    for package in VERSIONED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions

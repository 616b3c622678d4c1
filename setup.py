"""Builds csrc/ into mmpack._native; everything else is in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "mmpack._native",
            [
                "csrc/assembler.cpp",
                "csrc/balance.cpp",
                "csrc/bindings.cpp",
                "csrc/patchify.cpp",
                "csrc/planner.cpp",
            ],
            depends=[
                "csrc/assembler.h",
                "csrc/balance.h",
                "csrc/levels.h",
                "csrc/open_bins.h",
                "csrc/patchify.h",
                "csrc/planner.h",
                "csrc/random.h",
            ],
            cxx_std=20,
            # no fused multiply-add: a plan is the same on every machine
            extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra"],
        )
    ]
)

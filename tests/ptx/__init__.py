"""Runs the PTX that Triton makes of kernels, in numpy: `pytest --emulate` runs the tests of GPUs with it.

parser.py reads PTX; registers.py, arithmetic.py, memory.py, warps.py, asynchronous.py and tensor_cores.py are what
its instructions do; schedule.py runs threads; driver.py stands behind Triton's JIT in place of a GPU's driver, and
mode.py makes a pytest mode of it. Not modelled: weak memory order and proxy fences, timing, the approximation
errors of ex2, lg2, rcp and div, clusters, tensor memory.
"""

"""Settings of OpenMP, which PyTorch computes with on a CPU: import this before torch, which reads them."""

import os

# A thread that waits spins, which takes a core from others, even the awaited: here for 1 ms, then it sleeps.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")  # GNU's OpenMP (Linux): rounds, of some 10 ns
    os.environ.setdefault("KMP_BLOCKTIME", "1")  # Intel's and LLVM's (Windows, macOS): milliseconds

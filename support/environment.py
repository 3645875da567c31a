"""Settings of OpenMP, which PyTorch computes with on a CPU: import this before torch, which reads them.

A thread that waits for the others spins, and takes the time of a core from other programs and from the thread
it waits for. Here it spins for about a millisecond, then it sleeps. Settings of the user's own are kept.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")  # GNU's OpenMP (Linux): rounds, of some 10 ns
    os.environ.setdefault("KMP_BLOCKTIME", "1")  # Intel's and LLVM's (Windows, macOS): milliseconds

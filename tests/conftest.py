"""Settings of the whole suite."""

import os

# Some virtual machines announce the AMX tiles that oneDNN takes for bf16, and then refuse the instruction. Set before torch.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")

# Workers of pytest-xdist share the cores: a thread each. Networks of a few thousand parameters have no use for more.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

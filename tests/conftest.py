"""Settings of the whole suite."""

import os

# Some virtual machines announce the AMX tiles that oneDNN takes for bf16, and then refuse the instruction. Set before torch.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")

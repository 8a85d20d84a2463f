#!/usr/bin/env bash
# install.sh system|wheels: QEMU and AArch64's Python with what runs artifacts, in build/arm64, where
# the tests of this folder look for them. On Debian, as root: first `system`, then, with .venv set up,
# `wheels`.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$PWD/build/arm64
mkdir -p "$folder/downloads"
cd "$folder/downloads"

if [ "$1" = system ]; then
  dpkg --add-architecture arm64
  apt-get update -qq
  apt-get install -qq -y --no-install-recommends qemu-user
  python=$(apt-cache depends python3 | sed -n 's/.*Depends: \(python3[.0-9]*\)$/\1/p' | head -n 1)
  packages=(libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libffi8
    "$python-minimal" "lib$python-minimal" "lib$python-stdlib")
  apt-get download -qq -o APT::Sandbox::User=root "${packages[@]/%/:arm64}"
  for package in *.deb; do dpkg-deb -x "$package" "$folder"; done
  [ -e "$folder/lib" ] || ln -s usr/lib "$folder/lib"
  ln -sf "$python" "$folder/usr/bin/python3"
else
  python=../../../.venv/bin/python
  version=$(basename "$(readlink "$folder/usr/bin/python3")")
  pip=("$python" -m pip download -q --no-deps --only-binary=:all: --python-version "${version#python}"
    --platform manylinux_2_28_aarch64)
  for package in numpy apache-tvm-ffi apache-tvm typing_extensions; do
    installed=$("$python" -c "import importlib.metadata as m; print(m.version('$package'))")
    packages+=("$package==$installed")
  done
  "${pip[@]}" "${packages[@]}"
  for wheel in numpy-*.whl apache_tvm_ffi-*.whl typing_extensions-*.whl; do
    "$python" -m zipfile -e "$wheel" "$folder/site"
  done
fi

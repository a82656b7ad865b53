#!/usr/bin/env bash
# bash run.sh http|engine|rest [--rehearse] [--minutes 4.5]: accepts this host; results in $OUT or ./results.
set -eu
began=$(date +%s)
here=$(cd "$(dirname "$0")" && pwd)
work=${WORK:-$here/work}
python=${PYTHON:-python3}
mkdir -p "$work"
work=$(cd "$work" && pwd)

"$python" -c 'import torch' 2>/dev/null || { echo "run.sh: $python has no torch; name one that has: PYTHON=..." >&2; exit 3; }
if [ ! -e "$work/ready" ] || ! cmp -s "$here/REVISION" "$work/code/REVISION"; then
  rm -rf "$work/ready" "$work/code" "$work/env"
  mkdir -p "$work/code"
  tar -xzf "$here/code.tar.gz" -C "$work/code"
  # A separate environment, searched before the host's packages, takes those that the host lacks or has too old; the
  # host stays as it is. host.pth names the host's folders, because its Python may itself be an environment.
  "$python" -m venv --without-pip "$work/env"
  site=$("$work/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" -c 'import sys; [print(f"import site; site.addsitedir({p!r})") for p in sys.path if p.endswith("-packages")]' > "$site/host.pth"
  install="env PIP_CONFIG_FILE=/dev/null $work/env/bin/python -m pip --disable-pip-version-check --quiet install --no-index --no-cache-dir --no-compile"
  $install --find-links "$here/wheels" --requirement "$here/requirements.txt"
  $install --find-links "$here/wheels" diffusers || echo "run.sh: diffusers cannot be installed; it is left out" >&2
  [ "$("$python" -c 'import torch; print(torch.__file__)')" = "$("$work/env/bin/python" -c 'import torch; print(torch.__file__)')" ] \
    || { echo "run.sh: torch is another one in $work/env" >&2; exit 3; }
  touch "$work/ready"
fi
cd "$work/code"
exec env PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 TRITON_CACHE_DIR="$work/triton" \
  "$work/env/bin/python" -m bench.acceptance.kit.running "$@" --spent $(($(date +%s) - began)) --work "$work" --out "${OUT:-$here/results}"

#!/usr/bin/env bash
# What one GPU says of cegate, in about eight minutes: the tests that need it, then rows of time in order of importance,
# then CrossEarth beside Rein and SAM with two modalities beside timm's.
#
#     scripts/gpu_check.sh [WHEELS]
#
# Needs a Python with torch and triton (PYTHON=... chooses it). WHEELS is a folder of wheels for what is missing, where
# there is no network. Everything goes to benchmarks/results/<device>.md after every row, so that what is measured stays
# when it is cut off; earlier measurements in that file stay too. Please attach the file to an issue.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
export PATH="$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH"  # cmake and ninja of its environment

"$python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "no GPU: torch sees none")' || exit 1
source=(${1:+--no-index --find-links "$1"})
for package in timm transformers rasterio threadpoolctl matplotlib jinja2 rich pytest hypothesis pytest-benchmark peft; do
    "$python" -m pip show -qq "$package" || "$python" -m pip install -q "${source[@]}" "$package" ||
        echo "$package is not there, and rows that need it will be missing" >&2
done
[ -n "${1:-}" ] && "$python" -m pip install -q --no-deps "$1"/transformers-*.whl 2> /dev/null
"$python" -m pip install -q --no-build-isolation --no-deps . || exit 1

name="$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "_"))')"
out="benchmarks/results/$name.md"
[ -f "$out" ] || echo "# Measured on $name" > "$out"
rows="$("$python" benchmarks/gpu_rows.py --list)"
"$python" benchmarks/gpu_rows.py heading --out "$out" || exit 1

log="$(mktemp)"
timeout "${TEST_SECONDS:-150}" "$python" -m pytest -m gpu -q -x --maxfail 20 tests > "$log" 2>&1
printf '\n`pytest -m gpu`: %s\n' "$(tail -n 1 "$log")" | tee -a "$out"
grep -E '^(FAILED|ERROR)' "$log" | sed 's/^/* /' >> "$out"

"$python" benchmarks/gpu_rows.py table --out "$out" > /dev/null
for row in $rows; do
    timeout "${ROW_SECONDS:-60}" "$python" benchmarks/gpu_rows.py "$row" --out "$out" 2> "$log" ||
        printf '| %s | not measured: %s | | | | | | |\n' "$row" "$(tail -n 1 "$log" | cut -c1-160 | tr '|' '/')" >> "$out"
done

for system in crossearth sam; do
    found="$(mktemp -d)/table.md"
    timeout "${SYSTEM_SECONDS:-60}" "$python" -m pytest -m gpu --benchmark-only -q "benchmarks/bench_$system.py" --results "$found" > "$log" 2>&1
    printf '\n%s: %s\n\n' "$system" "$(tail -n 1 "$log")" | tee -a "$out"
    [ -f "$found" ] && cat "$found" >> "$out"
done
echo "written: $out"

#!/usr/bin/env bash
# Everything that needs a GPU, in one command that needs no network and nobody:
#
#   bash benchmarks/on_gpu.sh OUT_DIR [--only tests|ops|decoder|model|sanitizer|profile] [--dry]
#
# Ends within 9 minutes and leaves at most 9 files in OUT_DIR; summary.txt says what was done and what could not be.
# The stages come in the order of their worth, each with its own time limit; one that fails stops no other.
# --dry does the same on a CPU, at tiny sizes, with Triton's interpreter, and with ten times the limits.
set -uo pipefail

usage() {
    echo "usage: bash benchmarks/on_gpu.sh OUT_DIR [--only tests|ops|decoder|model|sanitizer|profile] [--dry]" >&2
    exit 2
}

out="" only="" dry=""
while [ $# -gt 0 ]; do
    case "$1" in
        --only) [ $# -ge 2 ] || usage; only="$2"; shift ;;
        --dry) dry=1 ;;
        -*) usage ;;
        *) [ -z "$out" ] || usage; out="$1" ;;
    esac
    shift
done
[ -n "$out" ] || usage
case "$only" in "" | tests | ops | decoder | model | sanitizer | profile) ;; *) usage ;; esac

mkdir -p "$out" && out="$(cd "$out" && pwd)" || exit 2
cd "$(dirname "$0")/.." || exit 2
summary="$out/summary.txt" log="$out/log.txt"
: >"$summary" && : >"$log" || exit 2

# A GPU's time is dear. A dry run is to show that every stage works, however busy the machine: only a hang is stopped.
patience=$([ -n "$dry" ] && echo 10 || echo 1)
total=$((520 * patience)) # seconds in all, with some left for the summary
started=$SECONDS
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
if [ -n "$dry" ]; then
    device=cpu size=--tiny seconds=0
    export TRITON_INTERPRET=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
else
    device=cuda size="" seconds=2
    export TRITON_INTERPRET=0
fi

say() { echo "$*" | tee -a "$summary"; }

# stage NAME SECONDS COMMAND...: runs it within its limit, times the patience, and what is left of the total; writes
# how it ended.
stage() {
    local name="$1" limit=$(($2 * patience)) left code began
    shift 2
    left=$((total - (SECONDS - started)))
    if [ "$left" -lt 10 ]; then
        say "$(printf '%-22s %s' "$name" "not started: no time left")"
        return 1
    fi
    [ "$limit" -le "$left" ] || limit="$left"
    began=$SECONDS
    printf '\n===== %s: %s\n' "$name" "$*" >>"$log"
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
    code=$?
    case "$code" in
        0) say "$(printf '%-22s ok, %d s' "$name" $((SECONDS - began)))" ;;
        124 | 137) say "$(printf '%-22s stopped after its %d s; what it had written stays' "$name" "$limit")" ;;
        *) say "$(printf '%-22s FAILED with exit code %d after %d s: see log.txt' "$name" "$code" $((SECONDS - began)))" ;;
    esac
    return "$code"
}

wanted() { [ -z "$only" ] || [ "$only" = "$1" ]; }

missing() { say "$(printf '%-22s not done: %s' "$1" "$2")"; }

bench() { # NAME SECONDS EXPRESSION
    # shellcheck disable=SC2086
    stage "$1" "$2" "$python" -m pytest benchmarks --benchmark $size --device "$device" --seconds "$seconds" \
        --results "$out" --replace -p no:cacheprovider -q -k "$3"
}

say "dab_fast on a GPU: $(date -u +%Y-%m-%dT%H:%MZ), ${dry:+dry run on a CPU, }${only:-all stages}"
say "$("$python" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")' 2>>"$log")"
nvidia-smi >>"$log" 2>&1 || say "nvidia-smi: not there"

# The checkout, offline. Where it cannot be installed, it is used in place.
if [ -n "$dry" ]; then
    missing install "dry run: the checkout is used in place"
else
    stage install 120 "$python" -m pip install --no-index --no-build-isolation --no-deps --quiet -e . ||
        say "  the checkout is used in place, without what the build would add"
fi

if [ -z "$dry" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>>"$log"; then
    say "no CUDA device is visible: nothing can be measured (--dry runs on a CPU)"
    exit 1
fi

if wanted tests; then
    if [ -n "$dry" ]; then
        stage "tests (collected)" 60 "$python" -m pytest tests -m gpu --collect-only -q -p no:cacheprovider
    else
        stage "selftest" 60 "$python" -m dab_fast selftest --device cuda
        # Most of their time goes into compiling some hundred kernels, on the cores of the host.
        report="$(mktemp)"
        stage "tests" "$([ "$only" = tests ] && echo 430 || echo 150)" \
            "$python" -m pytest tests -m gpu -q -p no:cacheprovider -n 12 --junitxml="$report"
        rm -f "$out/validated.json"
        stage "validate" 60 "$python" -m benchmarks.validate "$report" --out "$out/validated.json"
        rm -f "$report"
    fi
fi
wanted model && bench "model" 90 "model"
# shellcheck disable=SC2086
wanted model && stage "latency" 45 "$python" -m benchmarks.latency --device "$device" --seconds 15 ${dry:+--tiny --calls 3}
wanted decoder && bench "decoder" 110 "decoder and not compile"
wanted ops && bench "ops" 70 "(modulated or box_position or refine) and not compile"
wanted ops && [ -z "$dry" ] && bench "start" 60 "test_start"
wanted profile && stage "profile" 45 bash -c \
    "'$python' -m benchmarks.profile --device '$device' $size --model >'$out/profile.txt'"
if wanted sanitizer; then
    if [ -n "$dry" ]; then
        missing sanitizer "dry run: there is no GPU code to watch"
    elif ! command -v compute-sanitizer >/dev/null; then
        missing sanitizer "compute-sanitizer is not installed"
    else
        stage "sanitizer" 75 compute-sanitizer --error-exitcode 9 "$python" -m pytest benchmarks --device cuda -q \
            -p no:cacheprovider -k "(modulated or box_position or refine) and (triton or native)"
    fi
fi
# Compilation takes from half a minute to minutes per case.
if [ -z "$dry" ]; then
    wanted ops && bench "ops, compiled" 60 "(modulated or box_position or refine) and compile"
    wanted decoder && bench "decoder, compiled" 120 "decoder and compile"
fi

# Pictures and tables of what there is.
pictures="$(mktemp -d)"
stage plot 40 "$python" -m benchmarks.plot --results "$out" --out "$pictures"
for name in times speedups memory; do
    found="$(find "$pictures" -name "*-$name.png" | head -n 1)"
    [ -z "$found" ] || mv "$found" "$out/$name.png"
done
[ ! -f "$pictures/roofline.png" ] || mv "$pictures/roofline.png" "$out/roofline.png"
rm -rf "$pictures"
tail -c 4000000 "$log" >"$log.short" && mv "$log.short" "$log"

say ""
grep -hE '^(FAILED|ERROR|nothing is validated|photo to objects|times as fast)|[0-9]+ (passed|failed)' "$log" | cut -c1-300 | head -n 40 | tee -a "$summary"
timeout 30 "$python" -m benchmarks.table "$out" 2>>"$log" | tee -a "$summary"
say "done after $((SECONDS - started)) s; files: $(cd "$out" && ls | tr '\n' ' ')"
# In a dry run every stage must have worked; on a GPU the summary says what did.
if [ -n "$dry" ] && grep -q 'FAILED\|stopped after\|not started' "$summary"; then
    exit 1
fi

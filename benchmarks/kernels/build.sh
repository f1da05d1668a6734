#!/bin/sh
# Usage: build.sh OUTPUT [ARCHITECTURE [VARIANTS]]. Compiles the benchmark with every variant of the kernels that a file
# names: a name and what replaces the defaults of csrc/cuda/tuning.h.
set -e
here=$(cd "$(dirname "$0")" && pwd)
flags="-O3 -std=c++17 -arch=${2:-sm_90} -I $here/../../csrc -I $here"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
names=""
while read -r name defines; do
  names="$names X($name)"
  echo "$defines -Dsoftprompt_fast=$name""_kernels -DSPF_VARIANT=$name -c -o $work/$name.o $here/variant.cu"
done < "${3:-$here/variants.txt}" > "$work/jobs"
xargs -P "$(nproc)" -I '{}' sh -c "nvcc {} $flags" < "$work/jobs"
nvcc $flags "-DVARIANTS(X)=$names" -cudart static -Xcompiler -static-libstdc++,-static-libgcc -o "$1" "$here/main.cu" "$work"/*.o

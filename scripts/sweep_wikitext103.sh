#!/usr/bin/env bash
# The sweeps of docs/memory_budget.md on the WikiText-103 sample.
exec "$(dirname "$0")/sweep.sh" wikitext-103-sample runs/sweep-wikitext103

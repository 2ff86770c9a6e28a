#!/usr/bin/env bash
# The sweeps of docs/memory_budget.md on the PG-19 sample.
exec "$(dirname "$0")/sweep.sh" pg19-sample runs/sweep-pg19

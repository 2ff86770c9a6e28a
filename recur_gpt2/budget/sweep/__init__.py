"""`recur-gpt2 sweep`: points, models, report and plots."""

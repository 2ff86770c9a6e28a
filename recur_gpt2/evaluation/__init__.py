"""Protocols, scores, the comparison that run_pg19.py prints, reports and plots."""

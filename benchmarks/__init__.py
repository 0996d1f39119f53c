"""Every claim of this project, one command away: see docs/benchmarks.md."""

"""The journal of jobs: one SQLite file with every accepted job, its replies and how it ended."""

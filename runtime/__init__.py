"""The runtime of a team: its configuration, jobs, engines, APIs and command line."""

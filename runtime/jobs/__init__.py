"""Jobs: one problem on its way through a team, and the orchestrator that runs many over a fleet."""

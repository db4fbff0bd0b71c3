"""HTTP: OpenAI's API over the team and its engines, jobs, control, metrics, and the live page."""

"""What runs a team: configuration, jobs, engines, and the doors to them."""

"""The workflows that come with Troupe."""

"""The roles for any chat model that come with Troupe."""

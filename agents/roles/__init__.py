"""The roles for any chat model that Troupe ships."""

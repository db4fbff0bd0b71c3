"""The workflows that Troupe ships."""

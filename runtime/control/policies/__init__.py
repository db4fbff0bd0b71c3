"""The built-in policies, one module each. Third parties register theirs in the entry-point group `troupe.policies`."""

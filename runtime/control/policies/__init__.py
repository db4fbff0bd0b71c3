"""The policies that ship: one file each. A third party's register through the entry-point group `troupe.policies`."""

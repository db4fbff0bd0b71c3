"""The devices that engines run on: which engine is placed where, and what controls each device."""

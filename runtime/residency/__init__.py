"""Decides which engines are on the device, puts the others to sleep, and wakes them before they are called."""

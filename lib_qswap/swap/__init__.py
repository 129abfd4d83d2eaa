"""Where packed weights are, and how they get to the device in time."""
